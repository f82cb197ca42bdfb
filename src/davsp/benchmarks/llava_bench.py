"""LLaVA-Bench (In-the-Wild) (Liu et al., NeurIPS 2023, arXiv 2304.08485): 60 open questions on 24 pictures.

Source: liuhaotian/llava-bench-in-the-wild or lmms-lab/llava-bench-in-the-wild on the Hub. Licence: the data set is tagged
apache-2.0; the reference answers are GPT-4's; the rights in the pictures are not stated. A language model that reads a
caption, not the picture, gives the reference and the answer 1 to 10 each; the score is the ratio of their means.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from davsp.benchmarks import bootstrap, scoring, source, tables
from davsp.benchmarks.source import Found, Item, Picture, Problems, Report
from davsp.errors import DavspError
from davsp.files import sha256_bytes
from davsp.metrics import Row
from davsp.query import Query

COUNTS = {"conv": 17, "detail": 15, "complex": 28}
"""Questions of each category."""

NAME = "llava_bench"
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with a few sentences describing the image. \n"
    "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
    "respectively. The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential bias "
    "and ensuring that the order in which the responses were presented does not affect your judgment."
)

Pair = tuple[float, float]
"""The scores of the reference and of the answer."""


def load(
    root: Path, split: str = "test", limit: int | None = None, seed: int = 0, *, skip_broken: bool = False
) -> list[Query]:
    """The questions as queries: category conv, detail or complex, group the picture, reference GPT-4's answer.

    Args:
        root: any layout of docs/benchmarks.md.
        split: "test"; there is no other.
        limit: only so many queries, drawn with `seed`.
        seed: of the draw.
        skip_broken: leave out what is broken and warn, in place of raising.

    Raises:
        DavspError: nothing known at `root`, another split, an unknown category, a broken row or picture.
    """
    if split != "test":
        raise DavspError(f"{NAME} has only the split test, not {split!r}.")
    problems = Problems(skip_broken)
    found, _ = _read(Path(root), problems)
    return source.queries(found, NAME, root, limit, seed, problems)


def captions(root: Path) -> dict[str, str]:
    """Query id -> the caption of its picture, which the grader reads in the picture's place.

    Raises:
        DavspError: nothing known at `root`, or a broken row.
    """
    found, texts = _read(Path(root), Problems())
    if found is None:
        raise DavspError(
            f"{root} holds no {NAME} in a known layout; docs/benchmarks.md shows where to get it and how it lies."
        )
    return texts


def check(root: Path) -> Report:
    """Count questions with a whole picture by category."""
    problems, root = Problems(skip=True), Path(root)
    return source.report(_read(root, problems)[0], NAME, root, problems)


# ------------------------------------------------------------------------------------------------ scoring


def prompt(caption: str, question: str, reference: str, answer: str) -> str:
    """The message to the grader, beside `SYSTEM`: the reference is Assistant 1, the answer Assistant 2."""
    return (
        f"[Context]\n{caption}\n\n[Question]\n{question}\n\n[Assistant 1]\n{reference}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n[System]\n{RULE}\n\n"
    )


def parse(reply: str) -> Pair | None:
    """The two numbers that are all of the first line, each in 1 to 10; None if it holds anything else."""
    first = reply.strip().split("\n", 1)[0].strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:\s*[,;]\s*|\s+)(\d+(?:\.\d+)?)", first)
    pair = (float(match[1]), float(match[2])) if match else None
    return pair if pair and all(1 <= value <= 10 for value in pair) else None


def parse_official(reply: str) -> Pair:
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
    pairs: Mapping[str, Pair | None],
    model: str,
    defense: str,
    baseline: Mapping[str, Pair | None] | None = None,
    mode: str = "sound",
    seed: int = 0,
) -> list[Row]:
    """Mean of the answers' scores over mean of the references', by category and of all questions, clustered by picture.

    The value is a fraction (the published 63.6 is 0.636) and may pass 1. "total" is the ratio over all questions, not the
    mean of the categories. The grader's version shifts scores strongly: report it beside them.

    Args:
        queries: of LLaVA-Bench.
        pairs: query id -> scores of reference and answer; None where the grader could not tell.
        model: name for the rows.
        defense: name for the rows.
        baseline: pairs of the baseline defense; each ratio is followed by its paired difference over the questions
            scored both times.
        mode: "sound" leaves unscored pairs out and counts them; "official" averages them in as -1, and rounds means to
            3 and the ratio (in %) to 1 decimal.
        seed: of the bootstrap.

    Raises:
        DavspError: an unknown mode, a query without an entry, a score outside 1 to 10 (sound), or (official) references whose
            mean is not above 0.
    """
    if mode not in ("sound", "official"):
        raise DavspError(f"the mode {mode!r} of {NAME} is not known: choose sound or official.")
    now = _scores(queries, pairs, mode)
    then = None if baseline is None else _scores(queries, baseline, mode)
    metric = "relative_score" if mode == "sound" else "relative_score_official"
    table: list[Row] = []
    members = {name: [q for q in queries if q.category == name] for name in COUNTS} | {"total": list(queries)}
    for split, part in members.items():
        head = {"model": model, "defense": defense, "benchmark": NAME, "split": split, "metric": metric}
        scored = [q for q in part if q.id in now]
        if any(now[q.id][0] <= 0 for q in scored):  # a failed pair of the official mode: no interval of a quirk
            found: list[Row] = [head | {"value": None, "low": None, "high": None, "n": len(scored)}]
        else:
            found = scoring.rows(head, _table(scored, now), _ratio, len(scored), None, seed, None)
        if mode == "official" and scored:
            reference, answer = (round(float(np.mean([now[q.id][i] for q in scored])), 3) for i in (0, 1))
            if reference <= 0:
                raise DavspError(f"the references of {split} have the mean score {reference}; use mode='sound'.")
            found[0]["value"] = round(100 * answer / reference, 1) / 100
        both = [q for q in scored if then is not None and q.id in then]
        if both and then is not None and all(scores[q.id][0] > 0 for scores in (now, then) for q in both):
            found += scoring.rows(head, _table(both, now), _ratio, len(both), _table(both, then), seed, None)[1:]
        if mode == "sound" and split == "total":
            unscored = [float(q.id not in now) for q in part]
            found += scoring.rate_rows(head | {"metric": "unscored"}, unscored, [q.group for q in part], seed)
        table += found
    return table


def _scores(queries: Sequence[Query], pairs: Mapping[str, Pair | None], mode: str) -> dict[str, Pair]:
    found = {}
    for q in queries:
        if q.id not in pairs:
            raise DavspError(f"the query {q.id} has no pair of scores; a pair that could not be read is None.")
        pair = pairs[q.id]
        if mode == "sound" and pair is not None and not all(1 <= value <= 10 for value in pair):
            raise DavspError(f"the query {q.id} has the scores {pair}; they lie between 1 and 10.")
        if pair is None and mode == "official":
            pair = (-1.0, -1.0)
        if pair is not None:
            found[q.id] = pair
    return found


def _table(queries: Sequence[Query], scores: Mapping[str, Pair]) -> list[NDArray[np.float64]]:
    return [bootstrap.clusters((q.group or q.id, scores[q.id]) for q in queries)]


def _ratio(sums: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return sums[0][:, 1] / sums[0][:, 0]


# ------------------------------------------------------------------------------------------------ reading


def _read(root: Path, problems: Problems) -> tuple[Found | None, dict[str, str]]:
    """What is at `root`, and its captions by query id."""
    questions = tables.first(root, "questions.jsonl")
    if questions is not None:
        return _from_jsonl(root, questions, problems)
    tsv = tables.first(root, "LLaVABench.tsv")
    if tsv is not None:
        rows = tables.tsv_rows(tsv, ["question", "gpt4_ans", "caption", "category"], problems)
        return _packed("TSV", [tsv], list(rows), "index", "gpt4_ans", problems)
    paths = tables.shards(root / "data", "train", problems) or tables.shards(root, "train", problems)
    if not paths or not tables.parquet_has(paths[0], ["question_id", "gpt_answer", "caption"]):
        return None, {}
    needed = ["question_id", "image", "question", "category", "caption", "gpt_answer"]
    packed = []
    for where, row in tables.parquet_rows(paths, needed):
        image = tables.image_bytes(row["image"], where, problems)
        if image is not None and tables.has(row, needed, where, problems):
            packed.append((where, row | {"image": image}))
    return _packed("parquet", paths, packed, "question_id", "gpt_answer", problems)


def _from_jsonl(root: Path, questions: Path, problems: Problems) -> tuple[Found, dict[str, str]]:
    """Three files, joined by `question_id` and picture, not by the order of their lines."""
    files = {name: root / f"{name}.jsonl" for name in ("context", "answers_gpt4")}
    context = {
        row["image"]: _caption(row["caption"])
        for _, row in tables.json_lines(files["context"], ["image", "caption"], problems)
    }
    lines = tables.json_lines(files["answers_gpt4"], ["question_id", "text"], problems)
    answers = {str(row["question_id"]): row["text"] for _, row in lines}
    items, texts = [], {}
    for where, row in tables.json_lines(questions, ["question_id", "image", "text", "category"], problems):
        name, image = str(row["question_id"]), row["image"]
        if name not in answers or image not in context:
            file, key = (files["answers_gpt4"], name) if name not in answers else (files["context"], image)
            problems.add(f"{where}: {file} has nothing on {key}", "fetch it again")
            continue
        texts[name] = context[image]
        items += _item(
            name, row["text"], row["category"], image, answers[name], root / "images" / image, where, problems
        )
    return Found("official folder", (questions, *files.values()), items, dict(COUNTS)), texts


def _packed(
    layout: str, paths: Sequence[Path], rows: Sequence[tuple[str, dict[str, Any]]], key: str, answer: str, problems: Problems
) -> tuple[Found, dict[str, str]]:  # fmt: skip
    items, texts = [], {}
    for where, row in rows:
        name, image = str(row[key]), row["image"]
        texts[name] = _caption(row["caption"])
        group = sha256_bytes(image)[:16]
        items += _item(name, row["question"], row["category"], group, row[answer], image, where, problems)
    return Found(layout, tuple(paths), items, dict(COUNTS)), texts


def _item(
    name: str, question: str, category: str, group: str, reference: str, picture: Picture, where: str, problems: Problems
) -> list[Item]:  # fmt: skip
    """The one item of a row; none if its category is unknown."""
    if category not in COUNTS:
        problems.add(f"{where} is of the unknown category {category!r}", "fetch the file again")
        return []
    query = Query(name, question, "benign", NAME, category, group, reference)
    return [Item(query, picture, where, (category,))]


def _caption(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(value)
