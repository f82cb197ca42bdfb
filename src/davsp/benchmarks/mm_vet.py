"""MM-Vet (Yu et al., ICML 2024, arXiv 2308.02490): 218 open questions on 200 pictures, six capabilities, scored 0 to 1.

Source: the release mm-vet.zip of github.com/yuweihao/MM-Vet, or whyu/mm-vet and lmms-lab/MMVet on the Hub. Licence: data
CC BY-NC 4.0. A language model grades each answer by the reference (`davsp.judges.graders.MM_VET`); it sees no picture.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from davsp.benchmarks import bootstrap, formats, scoring, source
from davsp.benchmarks.scoring import Scores
from davsp.benchmarks.source import Download, Inventory, Item, PictureSource, Problems
from davsp.errors import DavspError
from davsp.judges.graders import Grader, grades_of
from davsp.metrics import Row
from davsp.query import Grade, Query, Response
from davsp.runtime.files import sha256_bytes

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
COUNTS = {"questions": 218, "rec": 150, "ocr": 96, "know": 84, "gen": 80, "spat": 75, "math": 26}
"""Questions in all and by capability, counted in the released mm-vet.json; a question counts in each of its own."""

NAME = "mm_vet"
MODES = ("sound", "official")

GraderOrGrades = Grader | Sequence[Grade]
"""A grader, or the grades that it gave before."""


def load(
    root: Path, split: str = "test", limit: int | None = None, seed: int = 0, *, skip_broken: bool = False
) -> list[Query]:
    """The questions as queries: category the capabilities ("ocr+math"), group the picture, reference with its tags.

    `answers` holds the alternatives of a reference that only has <OR>.

    Args:
        root: any layout of docs/benchmarks.md.
        split: "test"; there is no other.
        limit: at most so many queries, drawn with `seed`, whole groups of them.
        seed: of the draw.
        skip_broken: leave out what is broken and warn, in place of raising.

    Raises:
        DavspError: nothing known at `root`, another split, an unknown capability, a broken row or picture.
    """
    source.only_test(NAME, split)
    problems = Problems(skip_broken)
    return source.queries(_read(Path(root), problems), NAME, root, limit, seed, problems)


def check(root: Path) -> Inventory:
    """Count questions with a whole picture, in total and by capability."""
    problems, root = Problems(skip=True), Path(root)
    return source.report(_read(root, problems), NAME, root, problems)


def one_answer(reference: str) -> str:
    """The first alternative of a reference, its parts in a row: what a model can be trained to say."""
    return ", ".join(part.strip() for part in reference.split("<OR>")[0].split("<AND>"))


def parse_official(reply: str) -> float:
    """As mm-vet_evaluator.py reads the grader: the first word as a number in [0, 1], else 0."""
    try:
        score = float(reply.split()[0])
    except (IndexError, ValueError):
        return 0.0
    return score if 0 <= score <= 1 else 0.0


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
    """Total, the six capabilities and the integrations (exact sets of them), as fractions, clustered by picture.

    A question counts once in each of its capabilities, so the total is not their mean. A question's score is its mean over
    the grader's runs that scored it; over several runs the total's row also has `std`, the population standard deviation of
    the runs' totals. `unscored` is the share of all that was asked; `score_worst_case` takes it for 0. Over-refusal is in
    the rows, too.

    Args:
        queries: of MM-Vet.
        responses: an answer of one defense to each.
        judge: the grader, or its grades, if they are known. The paper's figures are means over five runs of it.
        model: name for the rows.
        baseline: scores of another defense; each score is followed by its paired difference over the questions that were
            scored both times.
        mode: "sound" leaves unscored questions out and counts them; "official" reads the grader as the authors do and
            scores 0 where that fails.
        seed: of the bootstrap.

    Raises:
        DavspError: an unknown mode, a query without response or grade, or a grade that is not one number in [0, 1].
    """
    scoring.known_mode(NAME, mode, MODES)
    mine = scoring.of_these(queries, responses)
    grades: list[Grade] = list(judge) if isinstance(judge, Sequence) else grades_of(queries, mine, judge)
    head = {"model": model, "defense": scoring.whose(mine)}
    runs = _runs(queries, grades, mode)
    now = _means(queries, runs)
    then = None
    if baseline is not None:
        then = _means(queries, _runs(queries, [g for g in baseline.judgements if isinstance(g, Grade)], mode))
    table: list[Row] = []
    for split, part in _parts(queries).items():
        part_head = head | {"benchmark": queries[0].benchmark, "split": split}
        metric = {"metric": "score" if mode == "sound" else "score_official"}
        split_rows = _rows(part_head | metric, part, now, then, seed)
        if split == "total":
            if len(runs) > 1:
                split_rows[0]["std"] = _spread(part, runs)
            if mode == "sound":
                unscored = [float(run[q.id] is None) for run in runs for q in part]
                groups = [q.group or q.id for _ in runs for q in part]
                split_rows += scoring.rate_rows(part_head | {"metric": "unscored"}, unscored, groups, seed)
                split_rows += _rows(
                    part_head | {"metric": "score_worst_case"}, part, _means(queries, _worst(runs)), None, seed
                )
        table += split_rows
    return Scores(table + scoring.over_refusal(queries, mine, model, baseline, seed), grades, mine)


Means = Mapping[str, float | None]
"""Query id -> its score; None if it has none."""


def _parts(queries: Sequence[Query]) -> dict[str, list[Query]]:
    """The questions of each row: all, by capability, by exact set of capabilities."""
    parts = {"total": list(queries)}
    parts |= {cap: [q for q in queries if cap in q.category.split("+")] for cap in CAPABILITIES}
    for q in queries:
        parts.setdefault("only " + "+".join(sorted(q.category.split("+"), key=CAPABILITIES.index)), []).append(q)
    return parts


def _rows(head: Row, part: Sequence[Query], now: Means, then: Means | None, seed: int) -> list[Row]:
    """The row of a score, and that of its difference."""
    scored = [q for q in part if now[q.id] is not None]
    rows = scoring.rows(head, _table(scored, now), _mean, len(scored), None, seed, 1.0)
    both = [q for q in scored if then is not None and then[q.id] is not None]
    if both and then is not None:
        rows += scoring.rows(head, _table(both, now), _mean, len(both), _table(both, then), seed, 1.0)[1:]
    return rows


def _spread(part: Sequence[Query], runs: Sequence[Means]) -> float | None:
    """The standard deviation of the runs' totals."""
    totals = [[s for q in part if (s := run[q.id]) is not None] for run in runs]
    return pstdev([fmean(total) for total in totals if total]) if any(totals) else None


def _runs(queries: Sequence[Query], grades: Sequence[Grade], mode: str) -> list[Means]:
    """The scores of each run of the grader."""
    runs: dict[int, dict[str, float | None]] = {grade.run: {} for grade in grades}
    for g in grades:
        if g.scores and not (len(g.scores) == 1 and 0 <= g.scores[0] <= 1):
            raise DavspError(f"the grader gave {g.scores} for {g.query_id}; a score is one number between 0 and 1.")
        value = g.scores[0] if g.scores else None
        if mode == "official":
            value = parse_official(g.raw) if g.raw else value or 0.0
        runs[g.run][g.query_id] = value
    for q in queries:
        if not runs or any(q.id not in run for run in runs.values()):
            raise DavspError(
                f"the query {q.id} is missing in a run of the grader; a missing grade is an error, not a 0."
            )
    return list(runs.values())


def _means(queries: Sequence[Query], runs: Sequence[Means]) -> dict[str, float | None]:
    scores = {q.id: [s for run in runs if (s := run[q.id]) is not None] for q in queries}
    return {name: fmean(values) if values else None for name, values in scores.items()}


def _worst(runs: Sequence[Means]) -> list[Means]:
    return [{name: score or 0.0 for name, score in run.items()} for run in runs]


def _table(queries: Sequence[Query], means: Means) -> list[NDArray[np.float64]]:
    return [bootstrap.clusters((q.group or q.id, (means[q.id] or 0.0, 1.0)) for q in queries)]


def _mean(sums: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return sums[0][:, 0] / sums[0][:, 1]


# ------------------------------------------------------------------------------------------------ reading


def _read(root: Path, problems: Problems) -> Download | None:
    for top in (root, root / "mm-vet", root / "mmvet"):
        if path := formats.first(top, "mm-vet.json"):
            return _from_json(path, problems)
    tsv = formats.first(root, "MMVet.tsv", "MM-Vet.tsv")
    if tsv is not None:
        return _from_tsv(tsv, problems)
    paths = formats.shards(root / "data", "test", problems) or formats.shards(root, "test", problems)
    return _from_parquet(paths, problems) if paths else None


def _from_json(path: Path, problems: Problems) -> Download:
    rows = formats.json_file(path, problems)
    if not isinstance(rows, dict):
        raise DavspError(f"{path} is no object of questions by id; fetch it again.")
    items = []
    for name, row in rows.items():
        where = f"{path}, question {name}"
        if formats.has(row, ["imagename", "question", "answer"], where, problems, ["capability"]):
            picture = path.parent / "images" / row["imagename"]
            items += _item(
                name, row["question"], row["answer"], row["capability"], row["imagename"], picture, where, problems
            )
    return _download("release folder", (path,), items)


def _from_tsv(tsv: Path, problems: Problems) -> Download:
    items = []
    for where, row in formats.tsv_rows(tsv, ["question", "answer", "category"], problems):
        group = sha256_bytes(row["image"])[:16]
        capabilities = row["category"].split(",")
        items += _item(row["index"], row["question"], row["answer"], capabilities, group, row["image"], where, problems)
    return _download("TSV", (tsv,), items)


def _from_parquet(paths: Sequence[Path], problems: Problems) -> Download | None:
    if not formats.parquet_has(paths[0], ["capability"]):
        if formats.parquet_has(paths[0], ["category"]) or not formats.parquet_has(paths[0], ["question", "answer"]):
            return None  # another data set's test shards
        raise DavspError(f"{paths[0]} has no column 'capability'; use the release folder or lmms-lab/MMVet.")
    items = []
    for number, (where, row) in enumerate(formats.parquet_rows(paths, ["image", "question", "answer"])):
        image = formats.image_bytes(row["image"], where, problems)
        if image is None or not formats.has(row, ["question", "answer"], where, problems, ["capability"]):
            continue
        capability = row["capability"]
        capabilities = capability.split(",") if isinstance(capability, str) else capability
        name = str(row.get("question_id") or row.get("id") or f"v1_{number}")
        group = sha256_bytes(image)[:16]
        items += _item(name, row["question"], row["answer"], capabilities, group, image, where, problems)
    return _download("parquet", tuple(paths), items)


def _download(layout: str, index: tuple[Path, ...], items: list[Item]) -> Download:
    return Download(layout, index, items, dict(COUNTS))


def _item(
    name: str, question: str, answer: str, capabilities: Any, group: str, picture: PictureSource, where: str,
    problems: Problems,
) -> list[Item]:  # fmt: skip
    """The one item of a row; none if a capability is unknown or there is none."""
    names = [str(c).strip() for c in (capabilities if isinstance(capabilities, list) else [capabilities])]
    if not names:
        problems.add(f"{where} has no capability", "fetch the file again")
        return []
    if unknown := [c for c in names if c not in CAPABILITIES]:
        problems.add(f"{where} has the unknown capability {unknown[0]!r}", "fetch the file again")
        return []
    answers = tuple(a.strip() for a in answer.split("<OR>")) if "<OR>" in answer and "<AND>" not in answer else ()
    category = "+".join(sorted(names, key=CAPABILITIES.index))
    query = Query(name, question, "benign", NAME, category, group, answer, answers)
    return [Item(query, picture, where, ("questions", *names))]
