"""LLaVA-Bench (In-the-Wild) (Liu et al., NeurIPS 2023, arXiv 2304.08485): 60 open questions on 24 pictures.

Source: liuhaotian/llava-bench-in-the-wild or lmms-lab/llava-bench-in-the-wild on the Hub. Licence: the data set is tagged
apache-2.0; the reference answers are GPT-4's; the rights in the pictures are not stated. A language model that reads a
caption, not the picture, gives the reference and the answer 1 to 10 each (`davsp.judges.graders.LLAVA_BENCH`); the score is
the ratio of their means.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from davsp.benchmarks import bootstrap, formats, scoring, source
from davsp.benchmarks.scoring import Scores
from davsp.benchmarks.source import Download, Inventory, Item, PictureSource, Problems, Record
from davsp.errors import DavspError
from davsp.judges.graders import Grader, grades_of
from davsp.metrics import Row
from davsp.query import Grade, Query, Response
from davsp.runtime.files import sha256_bytes

COUNTS = {"conv": 17, "detail": 15, "complex": 28}
"""Questions of each category."""

NAME = "llava_bench"
MODES = ("sound", "official")

ScorePair = tuple[float, float]
"""The scores of the reference and of the answer."""

GraderOrGrades = Grader | Sequence[Grade]
"""A grader, or the grades that it gave before."""


def load(
    root: Path, split: str = "test", limit: int | None = None, seed: int = 0, *, skip_broken: bool = False
) -> list[Query]:
    """The questions as queries: category conv, detail or complex, group the picture, reference GPT-4's answer.

    `context` is the caption of the picture, which the grader reads in its place.

    Args:
        root: any layout of docs/benchmarks.md.
        split: "test"; there is no other.
        limit: at most so many queries, drawn with `seed`, whole groups of them.
        seed: of the draw.
        skip_broken: leave out what is broken and warn, in place of raising.

    Raises:
        DavspError: nothing known at `root`, another split, an unknown category, a broken row or picture.
    """
    source.only_test(NAME, split)
    problems = Problems(skip_broken)
    return source.queries(_read(Path(root), problems), NAME, root, limit, seed, problems)


def check(root: Path) -> Inventory:
    """Count questions with a whole picture by category."""
    problems, root = Problems(skip=True), Path(root)
    return source.report(_read(root, problems), NAME, root, problems)


# ------------------------------------------------------------------------------------------------ scoring


def parse_official(reply: str) -> ScorePair:
    """As eval_gpt_review_bench.py reads it: commas to spaces, cut at single spaces, two numbers or (-1, -1).

    So "8, 10" fails, for it has three pieces, and the -1 are averaged in.
    """
    pieces = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(piece) for piece in pieces)
    except ValueError:
        return -1.0, -1.0
    return first, second


def score(
    queries: Sequence[Query],
    responses: Sequence[Response],
    judge: GraderOrGrades,
    *,
    model: str = "",
    baseline: Scores | None = None,
    mode: str = "sound",
    seed: int = 0,
) -> Scores:
    """Mean of the answers' scores over mean of the references', by category and of all questions, clustered by picture.

    The value is a fraction (the published 63.6 is 0.636) and may pass 1. "total" is the ratio over all questions, not the
    mean of the categories. `relative_score_worst_case` takes a pair that could not be read for (10, 1). The grader's version
    shifts scores strongly: report it beside them. Over-refusal is in the rows, too.

    Args:
        queries: of LLaVA-Bench.
        responses: an answer of one defense to each.
        judge: the grader, or its grades, if they are known; of a grader with several runs the first is taken.
        model: name for the rows.
        baseline: scores of another defense; each ratio is followed by its paired difference over the questions that were
            scored both times.
        mode: "sound" leaves unscored pairs out and counts them; "official" reads the grader as the authors do, averages in
            what fails as -1, and rounds means to 3 and the ratio (in %) to 1 decimal.
        seed: of the bootstrap.

    Raises:
        DavspError: an unknown mode, a query without response or grade, scores that are not two in 1 to 10 (sound), or
            (official) references whose mean is not above 0.
    """
    scoring.known_mode(NAME, mode, MODES)
    mine = scoring.of_these(queries, responses)
    grades: list[Grade] = list(judge) if isinstance(judge, Sequence) else grades_of(queries, mine, judge)
    now = _pairs(queries, grades, mode)
    then = None
    if baseline is not None:
        then = _pairs(queries, [g for g in baseline.judgements if isinstance(g, Grade)], mode)
    failed = dict.fromkeys((q.id for q in queries), WORST)
    table: list[Row] = []
    members = {name: [q for q in queries if q.category == name] for name in COUNTS} | {"total": list(queries)}
    for split, part in members.items():
        head = {"model": model, "defense": scoring.whose(mine), "benchmark": queries[0].benchmark, "split": split}
        metric = "relative_score" if mode == "sound" else "relative_score_official"
        split_rows = _rows(head | {"metric": metric}, part, now, then, seed)
        if mode == "official" and part:
            split_rows[0]["value"] = _rounded(split, [now[q.id] for q in part])
        if mode == "sound" and split == "total":
            unscored = [float(q.id not in now) for q in part]
            split_rows += scoring.rate_rows(head | {"metric": "unscored"}, unscored, [q.group for q in part], seed)
            split_rows += _rows(head | {"metric": "relative_score_worst_case"}, part, failed | now, None, seed)
        table += split_rows
    return Scores(table + scoring.over_refusal(queries, mine, model, baseline, seed), grades, mine)


WORST = (10.0, 1.0)
ScorePairs = Mapping[str, ScorePair]


def _rows(head: Row, part: Sequence[Query], now: ScorePairs, then: ScorePairs | None, seed: int) -> list[Row]:
    """The row of a ratio, and that of its difference. With a failed pair of the official mode there is no interval."""
    scored = [q for q in part if q.id in now]
    if any(now[q.id][0] <= 0 for q in scored):
        rows: list[Row] = [head | {"value": None, "low": None, "high": None, "n": len(scored)}]
    else:
        rows = scoring.rows(head, _table(scored, now), _ratio, len(scored), None, seed, None)
    both = [q for q in scored if then is not None and q.id in then]
    if both and then is not None and all(pairs[q.id][0] > 0 for pairs in (now, then) for q in both):
        rows += scoring.rows(head, _table(both, now), _ratio, len(both), _table(both, then), seed, None)[1:]
    return rows


def _rounded(split: str, pairs: Sequence[ScorePair]) -> float:
    """The ratio as the official script prints it."""
    reference, answer = (round(float(np.mean([pair[i] for pair in pairs])), 3) for i in (0, 1))
    if reference <= 0:
        raise DavspError(f"the references of {split} have the mean score {reference}; use mode='sound'.")
    return round(100 * answer / reference, 1) / 100


def _pairs(queries: Sequence[Query], grades: Sequence[Grade], mode: str) -> dict[str, ScorePair]:
    """Query id -> its pair; a query that could not be scored has none."""
    grade_of = {g.query_id: g for g in grades if g.run == 0}
    pairs: dict[str, ScorePair] = {}
    for q in queries:
        if q.id not in grade_of:
            raise DavspError(f"the query {q.id} has no grade; a missing grade is an error.")
        scores, raw = grade_of[q.id].scores, grade_of[q.id].raw
        if scores and not (len(scores) == 2 and all(1 <= value <= 10 for value in scores)):
            raise DavspError(f"the grader gave {scores} for {q.id}; a pair of scores lies between 1 and 10.")
        if mode == "official":
            pairs[q.id] = parse_official(raw) if raw else (scores[0], scores[1]) if scores else (-1.0, -1.0)
        elif scores:
            pairs[q.id] = scores[0], scores[1]
    return pairs


def _table(queries: Sequence[Query], scores: Mapping[str, ScorePair]) -> list[NDArray[np.float64]]:
    return [bootstrap.clusters((q.group or q.id, scores[q.id]) for q in queries)]


def _ratio(sums: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return sums[0][:, 1] / sums[0][:, 0]


# ------------------------------------------------------------------------------------------------ reading


def _read(root: Path, problems: Problems) -> Download | None:
    questions = formats.first(root, "questions.jsonl")
    if questions is not None:
        return _from_jsonl(root, questions, problems)
    tsv = formats.first(root, "LLaVABench.tsv")
    if tsv is not None:
        rows = formats.tsv_rows(tsv, ["question", "gpt4_ans", "caption", "category"], problems)
        return _from_rows("TSV", [tsv], list(rows), "index", "gpt4_ans", problems)
    paths = formats.shards(root / "data", "train", problems) or formats.shards(root, "train", problems)
    if not paths or not formats.parquet_has(paths[0], ["question_id", "gpt_answer", "caption"]):
        return None
    needed = ["question_id", "image", "question", "category", "gpt_answer", "caption"]
    records = []
    for where, row in formats.parquet_rows(paths, needed):
        image = formats.image_bytes(row["image"], where, problems)
        if image is not None and formats.has(row, needed[2:5], where, problems, ["question_id", "caption"]):
            records.append((where, row | {"image": image}))
    return _from_rows("parquet", paths, records, "question_id", "gpt_answer", problems)


def _from_jsonl(root: Path, questions: Path, problems: Problems) -> Download:
    """Three files, joined by `question_id` and picture, not by the order of their lines."""
    files = {name: root / f"{name}.jsonl" for name in ("context", "answers_gpt4")}
    lines = formats.json_lines(files["context"], ["image"], problems, ["caption"])
    context = {image: _caption(row["caption"]) for image, row in _by_key(lines, "image", problems).items()}
    lines = formats.json_lines(files["answers_gpt4"], ["text"], problems, ["question_id"])
    answers = {name: row["text"] for name, row in _by_key(lines, "question_id", problems).items()}
    items = []
    for where, row in formats.json_lines(questions, ["image", "text", "category"], problems, ["question_id"]):
        name, image = str(row["question_id"]), row["image"]
        if name not in answers or image not in context:
            file, key = (files["answers_gpt4"], name) if name not in answers else (files["context"], image)
            problems.add(f"{where}: {file} has nothing on {key}", "fetch it again")
            continue
        query = Query(name, row["text"], "benign", NAME, row["category"], image, answers[name], context=context[image])
        items += _item(query, root / "images" / image, where, problems)
    return Download("official folder", (questions, *files.values()), items, dict(COUNTS))


def _by_key(lines: Iterator[tuple[str, Record]], key: str, problems: Problems) -> dict[str, Record]:
    """Rows by a field that no two of them may share; of two the first one counts."""
    rows: dict[str, Record] = {}
    for where, row in lines:
        name = str(row[key])
        if name in rows:
            problems.add(f"{where} is the second one on {name}", "delete one of the two")
        rows.setdefault(name, row)
    return rows


def _from_rows(
    layout: str, paths: Sequence[Path], rows: Sequence[tuple[str, dict[str, Any]]], key: str, answer: str, problems: Problems
) -> Download:  # fmt: skip
    items = []
    for where, row in rows:
        group, caption = sha256_bytes(row["image"])[:16], _caption(row["caption"])
        query = Query(
            str(row[key]), row["question"], "benign", NAME, row["category"], group, row[answer], context=caption
        )
        items += _item(query, row["image"], where, problems)
    return Download(layout, tuple(paths), items, dict(COUNTS))


def _item(query: Query, picture: PictureSource, where: str, problems: Problems) -> list[Item]:
    """The one item of a row; none if its category is unknown."""
    if query.category not in COUNTS:
        problems.add(f"{where} is of the unknown category {query.category!r}", "fetch the file again")
        return []
    return [Item(query, picture, where, (query.category,))]


def _caption(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
