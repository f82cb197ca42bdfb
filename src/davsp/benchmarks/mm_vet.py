"""MM-Vet (Yu et al., ICML 2024, arXiv 2308.02490): 218 open questions on 200 pictures, six capabilities, scored 0 to 1.

Source: the release mm-vet.zip of github.com/yuweihao/MM-Vet, or whyu/mm-vet and lmms-lab/MMVet on the Hub. Licence: data
CC BY-NC 4.0. A language model grades each answer; `prompt` and `parse` are what it is asked and how its reply is read.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
from numpy.typing import NDArray

from davsp.benchmarks import bootstrap, scoring, source, tables
from davsp.benchmarks.source import Found, Item, Picture, Problems, Report
from davsp.errors import DavspError
from davsp.files import sha256_bytes
from davsp.metrics import Row
from davsp.query import Query, Response

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
COUNTS = {"questions": 218, "math": 26}
"""Published, and agreeing with released scores; the other capabilities are counted but compared with nothing."""

NAME = "mm_vet"
TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)
"""Of the grader's tries, in turn."""

AGAIN = "\nPredict the correctness of the answer (digit): "
"""Appended to the grader's message when its reply could not be read."""

_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and "
    "Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland is "
    "mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of these "
    "countries do not accurately represent their landscapes. | "
)
FEW_SHOTS = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in "
    "the ground truth means it is totally right only when all elements in the ground truth are present in the "
    "prediction, and <OR> means it is totally right when any one element in the ground truth is present in the "
    "prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right). Just complete the last space of the correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n"
    "--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
    f"{_MEME}The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very "
    "icy and Greenland isn't very green. | 0.4\n"
    f"{_MEME}The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, "
    "despite its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is "
    "why I have trust issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. "
    "The humor in this meme is derived from the unexpected contrast between the names of the countries and their actual "
    "physical characteristics. | 1.0\n"
)

Grade = Callable[[str, str, str], float | None]
"""(question, reference, answer) -> a score in [0, 1], or None where the grader could not tell."""

Run = Mapping[str, float | None]
"""Query id -> its score in one run of the grader."""


def load(
    root: Path, split: str = "test", limit: int | None = None, seed: int = 0, *, skip_broken: bool = False
) -> list[Query]:
    """The questions as queries: category the capabilities ("ocr+math"), group the picture, reference with its tags.

    `answers` holds the alternatives of a reference that only has <OR>.

    Args:
        root: any layout of docs/benchmarks.md.
        split: "test"; there is no other.
        limit: only so many queries, drawn with `seed`.
        seed: of the draw.
        skip_broken: leave out what is broken and warn, in place of raising.

    Raises:
        DavspError: nothing known at `root`, another split, an unknown capability, a broken row or picture.
    """
    if split != "test":
        raise DavspError(f"{NAME} has only the split test, not {split!r}.")
    problems = Problems(skip_broken)
    return source.queries(_read(Path(root), problems), NAME, root, limit, seed, problems)


def check(root: Path) -> Report:
    """Count questions with a whole picture, in total and by capability."""
    problems, root = Problems(skip=True), Path(root)
    return source.report(_read(root, problems), NAME, root, problems)


def prompt(question: str, reference: str, answer: str) -> str:
    """The one message to the grader, as mm-vet_evaluator.py writes it."""
    reference = reference.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{FEW_SHOTS}\n{question} | {reference} | {answer} | "


def parse(reply: str) -> float | None:
    """The grader's score: its first word as a number in [0, 1]; None if it is none."""
    words = reply.split()
    try:
        score = float(words[0])
    except (IndexError, ValueError):
        return None
    return score if 0 <= score <= 1 else None


def grader(ask: Callable[[str, float], str | None]) -> Grade:
    """A `Grade` from a language model: up to five tries at rising temperature, then None.

    Args:
        ask: (message, temperature) -> reply, or None where there was none. At most 3 tokens are needed.
    """

    def grade(question: str, reference: str, answer: str) -> float | None:
        message = prompt(question, reference, answer)
        for number, temperature in enumerate(TEMPERATURES):
            reply = ask(message + AGAIN * (number > 0), temperature)
            if reply is not None and (found := parse(reply)) is not None:
                return found
        return None

    return grade


def grade_all(queries: Sequence[Query], responses: Sequence[Response], grade: Grade) -> dict[str, float | None]:
    """One run of the grader over all answers.

    Raises:
        DavspError: a query has no response, or `grade` gives a number outside [0, 1].
    """
    text_of = scoring.texts(queries, responses)
    run = {q.id: grade(q.question, q.reference, text_of[q.id]) for q in queries}
    for name, score in run.items():
        if score is not None and not (math.isfinite(score) and 0 <= score <= 1):
            raise DavspError(f"the grader gave {score} for {name}; a score lies between 0 and 1.")
    return run


def score(
    queries: Sequence[Query],
    runs: Sequence[Run],
    model: str,
    defense: str,
    baseline: Sequence[Run] | None = None,
    mode: str = "sound",
    seed: int = 0,
) -> list[Row]:
    """Total, the six capabilities and the integrations (exact sets of them), as fractions, clustered by picture.

    A question counts once in each of its capabilities, so the total is not their mean. A question's score is its mean over
    the runs that scored it; the total's row also has `std`, the population standard deviation of the runs' totals.

    Args:
        queries: of MM-Vet.
        runs: of the grader, at least one (the paper: five), each with every query.
        model: name for the rows.
        defense: name for the rows.
        baseline: runs on the answers of the baseline defense; each score is followed by its paired difference over the
            questions scored both times.
        mode: "sound" leaves unscored questions out and counts them; "official" scores them 0, as the authors do.
        seed: of the bootstrap.

    Raises:
        DavspError: an unknown mode, no run, or a query that a run does not have.
    """
    if mode not in ("sound", "official"):
        raise DavspError(f"the mode {mode!r} of {NAME} is not known: choose sound or official.")
    metric = "score" if mode == "sound" else "score_official"
    now = _means(queries, runs, mode)
    then = None if baseline is None else _means(queries, baseline, mode)
    sets = dict.fromkeys("+".join(sorted(q.category.split("+"), key=CAPABILITIES.index)) for q in queries)
    members = {"total": list(queries)}
    members |= {cap: [q for q in queries if cap in q.category.split("+")] for cap in CAPABILITIES}
    members |= {
        f"only {name}": [q for q in queries if set(q.category.split("+")) == set(name.split("+"))] for name in sets
    }
    table: list[Row] = []
    for split, part in members.items():
        head = {"model": model, "defense": defense, "benchmark": NAME, "split": split, "metric": metric}
        scored = [q for q in part if now[q.id] is not None]
        found = scoring.rows(head, _table(scored, now), _mean, len(scored), None, seed, 1.0)
        both = [q for q in scored if then is not None and then[q.id] is not None]
        if both and then is not None:
            found += scoring.rows(head, _table(both, now), _mean, len(both), _table(both, then), seed, 1.0)[1:]
        if split == "total":
            totals = [[run[q.id] or 0.0 for q in part if mode == "official" or run[q.id] is not None] for run in runs]
            found[0]["std"] = pstdev([fmean(total) for total in totals if total]) if any(totals) else None
            if mode == "sound":
                unscored = [float(now[q.id] is None) for q in part]
                found += scoring.rate_rows(head | {"metric": "unscored"}, unscored, [q.group for q in part], seed)
        table += found
    return table


def _means(queries: Sequence[Query], runs: Sequence[Run], mode: str) -> dict[str, float | None]:
    if not runs:
        raise DavspError(f"{NAME} cannot be scored without a run of the grader; give at least one.")
    found: dict[str, float | None] = {}
    for q in queries:
        if any(q.id not in run for run in runs):
            raise DavspError(
                f"the query {q.id} is missing in a run of the grader; a missing answer is an error, not a 0."
            )
        scores = [run[q.id] for run in runs]
        scored = [0.0 if s is None else s for s in scores if mode == "official" or s is not None]
        found[q.id] = fmean(scored) if scored else None
    return found


def _table(queries: Sequence[Query], means: Mapping[str, float | None]) -> list[NDArray[np.float64]]:
    return [bootstrap.clusters((q.group or q.id, (means[q.id] or 0.0, 1.0)) for q in queries)]


def _mean(sums: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return sums[0][:, 0] / sums[0][:, 1]


# ------------------------------------------------------------------------------------------------ reading


def _read(root: Path, problems: Problems) -> Found | None:
    for top in (root, root / "mm-vet", root / "mmvet"):
        if path := tables.first(top, "mm-vet.json"):
            return _from_json(path, problems)
    tsv = tables.first(root, "MMVet.tsv", "MM-Vet.tsv")
    if tsv is not None:
        return _from_tsv(tsv, problems)
    paths = tables.shards(root / "data", "test", problems) or tables.shards(root, "test", problems)
    return _from_parquet(paths, problems) if paths else None


def _from_json(path: Path, problems: Problems) -> Found:
    rows = tables.json_file(path, problems)
    if not isinstance(rows, dict):
        raise DavspError(f"{path} is no object of questions by id; fetch it again.")
    items = []
    for name, row in rows.items():
        where = f"{path}, question {name}"
        if tables.has(row, ["imagename", "question", "answer", "capability"], where, problems):
            picture = path.parent / "images" / row["imagename"]
            items += _item(
                name, row["question"], row["answer"], row["capability"], row["imagename"], picture, where, problems
            )
    return _found("release folder", (path,), items)


def _from_tsv(tsv: Path, problems: Problems) -> Found:
    items = []
    for where, row in tables.tsv_rows(tsv, ["question", "answer", "category"], problems):
        group = sha256_bytes(row["image"])[:16]
        capabilities = row["category"].split(",")
        items += _item(row["index"], row["question"], row["answer"], capabilities, group, row["image"], where, problems)
    return _found("TSV", (tsv,), items)


def _from_parquet(paths: Sequence[Path], problems: Problems) -> Found | None:
    if not tables.parquet_has(paths[0], ["capability"]):
        if tables.parquet_has(paths[0], ["category"]) or not tables.parquet_has(paths[0], ["question", "answer"]):
            return None  # another data set's test shards
        raise DavspError(f"{paths[0]} has no column 'capability'; use the release folder or lmms-lab/MMVet.")
    items = []
    for number, (where, row) in enumerate(tables.parquet_rows(paths, ["image", "question", "answer"])):
        image = tables.image_bytes(row["image"], where, problems)
        if image is None or not tables.has(row, ["question", "answer", "capability"], where, problems):
            continue
        given = row["capability"]
        capabilities = given.split(",") if isinstance(given, str) else list(given)
        name = str(row.get("question_id") or row.get("id") or f"v1_{number}")
        group = sha256_bytes(image)[:16]
        items += _item(name, row["question"], row["answer"], capabilities, group, image, where, problems)
    return _found("parquet", tuple(paths), items)


def _found(layout: str, index: tuple[Path, ...], items: list[Item]) -> Found:
    published = {"questions": COUNTS["questions"], **dict.fromkeys(CAPABILITIES), "math": COUNTS["math"]}
    return Found(layout, index, items, published)


def _item(
    name: str, question: str, answer: str, capabilities: Sequence[str], group: str, picture: Picture, where: str,
    problems: Problems,
) -> list[Item]:  # fmt: skip
    """The one item of a row; none if a capability is unknown."""
    given = [c.strip() for c in capabilities]
    if unknown := [c for c in given if c not in CAPABILITIES]:
        problems.add(f"{where} has the unknown capability {unknown[0]!r}", "fetch the file again")
        return []
    answers = tuple(a.strip() for a in answer.split("<OR>")) if "<OR>" in answer and "<AND>" not in answer else ()
    category = "+".join(sorted(given, key=CAPABILITIES.index))
    query = Query(name, question, "benign", NAME, category, group, answer, answers)
    return [Item(query, picture, where, ("questions", *given))]
