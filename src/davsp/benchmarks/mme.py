"""MME (Fu et al., arXiv 2306.13394): 2,374 yes/no questions, two a picture, in ten perception and four cognition subtasks.

Source: MME_Benchmark_release_version.zip (github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation),
or lmms-lab/MME on the Hub. No licence file was seen; the pictures come from COCO, Places365, films and landmarks, so take
it as research only. A subtask's score is 100 · acc + 100 · acc+, where acc+ asks for both answers of a picture.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from davsp.benchmarks import bootstrap, formats, official, scoring, source
from davsp.benchmarks.scoring import Scores
from davsp.benchmarks.source import Download, Inventory, Item, PictureSource, Problems
from davsp.errors import DavspError
from davsp.metrics import Row
from davsp.query import Query, Response
from davsp.runtime.files import read_text

PICTURES = {
    "existence": 30,
    "count": 30,
    "position": 30,
    "color": 30,
    "posters": 147,
    "celebrity": 170,
    "scene": 200,
    "landmark": 200,
    "artwork": 200,
    "OCR": 20,
    "commonsense_reasoning": 70,
    "numerical_calculation": 20,
    "text_translation": 20,
    "code_reasoning": 20,
}
COUNTS = {name: 2 * n for name, n in PICTURES.items()}
"""Questions of each subtask."""

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PERCEPTION = tuple(name for name in COUNTS if name not in COGNITION)
NAME = "mme"

TOPS = (
    "MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark_release_version", "MME_Benchmark", "."
)  # fmt: skip
"""Where the subtasks may lie: the present archive has a level more than the first one."""

OFFICIAL = "Please answer yes or no."
SHORT = "\nAnswer the question using a single word or phrase."
"""What LLaVA and lmms-eval put in the place of the official last sentence."""


def load(
    root: Path,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    *,
    short_prompt: bool = False,
    skip_broken: bool = False,
) -> list[Query]:
    """The questions as queries: category the subtask, group its picture, reference "Yes" or "No".

    Args:
        root: any layout of docs/benchmarks.md.
        split: "test"; there is no other.
        limit: at most so many queries, drawn with `seed`, whole groups of them.
        seed: of the draw.
        short_prompt: ask as LLaVA and lmms-eval do (`SHORT`), not word for word as published.
        skip_broken: leave out what is broken and warn, in place of raising.

    Raises:
        DavspError: nothing known at `root`, another split, an unknown subtask, a picture without a Yes and a No question.
    """
    source.only_test(NAME, split)
    problems, root = Problems(skip_broken), Path(root)
    download = _read(root, short_prompt, problems)
    if download is None and _tool(root) is not None:
        raise DavspError(
            f"{root} holds the questions of eval_tool, without pictures; fetch MME_Benchmark_release_version.zip "
            "and unpack it beside them."
        )
    return source.queries(download, NAME, root, limit, seed, problems)


def check(root: Path) -> Inventory:
    """Count questions with a whole picture by subtask, and compare the questions with those of the official eval_tool."""
    problems, root = Problems(skip=True), Path(root)
    download = _read(root, False, problems)
    tool = _tool(root)
    if download is None and tool is not None:
        index = tuple(tool / f"{name}.txt" for name in COUNTS if (tool / f"{name}.txt").exists())
        note = "questions and answers without pictures: fetch MME_Benchmark_release_version.zip"
        download = Download("eval_tool (text only)", index, [], dict(COUNTS), note)
        rows = {path.stem: [_row(line) for line in _lines(path)] for path in index}
    else:
        rows = {}
        for query in (item.query for item in download.items) if download else ():
            picture = PurePosixPath(query.group).name
            rows.setdefault(query.category, []).append((picture, query.question, query.reference))
    report = source.report(download, NAME, root, problems)
    if (root / source.MARK).exists():
        return report
    same = {
        f"questions of {name}": official.questions_hash(rows[name]) == official.MME_QUESTIONS[name] for name in rows
    }
    return replace(report, official=same)


def _row(line: str) -> tuple[str, str, str]:
    """Picture, question and answer of a line of eval_tool, to which users append what a model said."""
    picture, question, answer, *_ = [*line.split("\t"), "", ""]
    return picture, question, answer


# ------------------------------------------------------------------------------------------------ scoring


def parse_official(text: str) -> str:
    """ "yes", "no" or "other" as calculation.py reads an answer: the whole of it, else its first four characters.

    So "know" and "none" are no, and "The answer is yes" is other. Line breaks and tabs, which the official file cannot
    hold, are taken out first, as its users must.
    """
    text = text.replace("\r", "").replace("\n", "").replace("\t", " ").lower()
    if text in ("yes", "no"):
        return text
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def parse_lenient(text: str) -> str:
    """ "yes" or "no" if just one of the two is among the words, or the whole answer is "y" or "n"; else "other"."""
    words = re.findall(r"\w+", text.lower())
    if words in (["y"], ["n"]):
        return {"y": "yes", "n": "no"}[words[0]]
    answers = {"yes", "no"} & set(words)
    return answers.pop() if len(answers) == 1 else "other"


Parser = Callable[[str], str]
PARSERS: dict[str, Parser] = {"official": parse_official, "lenient": parse_lenient}


def score(
    queries: Sequence[Query],
    responses: Sequence[Response],
    judge: Mapping[str, Parser] | None = None,
    *,
    model: str = "",
    baseline: Scores | None = None,
    seed: int = 0,
) -> Scores:
    """acc, acc+ and score of each subtask, and the sums perception (of 2,000), cognition (of 800) and total (of 2,800).

    Every figure is given for each parser, as `acc_official`, `acc_plus_lenient`, ... acc and acc+ are fractions, scores
    are points. Pictures are drawn with replacement within their subtask. A sum is over the subtasks that are there.
    Over-refusal is in the rows, too. A picture is left out if the thought of one of its answers was cut.

    Args:
        queries: of MME.
        responses: an answer of one defense to each.
        judge: parsers by name, answer -> "yes", "no" or "other"; None takes both of `PARSERS`. No model is asked.
        model: name for the rows.
        baseline: scores of another defense; each figure is followed by its paired difference.
        seed: of the bootstrap.

    Raises:
        DavspError: a query has no response, or is of no subtask.
    """
    if unknown := next((q for q in queries if q.category not in COUNTS), None):
        raise DavspError(f"the query {unknown.id} is of the category {unknown.category!r}, which is no subtask of MME.")
    mine = scoring.of_these(queries, responses)
    table: list[Row] = []
    kept, both = _whole(queries, mine), [] if baseline is None else _whole(queries, mine, baseline.responses)
    for parser, parse in (judge or PARSERS).items():
        now, paired = _tables(kept, mine, parse), _tables(both, mine, parse)
        then = None if baseline is None else _tables(both, baseline.responses, parse)
        parts = {name: [name] for name in COUNTS}
        parts |= {"perception": list(PERCEPTION), "cognition": list(COGNITION), "total": list(COUNTS)}
        for split, names in parts.items():
            here = [name for name in names if name in now]
            if not here:
                continue
            strata, after = [now[name] for name in here], [paired[name] for name in here if name in paired]
            before = None if then is None else [then[name] for name in here if name in then]
            measures = [("score", _points, 200.0 * len(here))]
            if len(names) == 1:
                measures = [("acc", _acc, 1.0), ("acc_plus", _acc_plus, 1.0), *measures]
            for metric, statistic, top in measures:
                head = {"model": model, "defense": scoring.whose(mine), "benchmark": queries[0].benchmark}
                head |= {"split": split, "metric": f"{metric}_{parser}"}
                table += scoring.rows(head, strata, statistic, _questions(strata), None, seed, top)
                if before:
                    table += scoring.rows(head, after, statistic, _questions(after), before, seed, top)[1:]
    return Scores(table + scoring.over_refusal(queries, mine, model, baseline, seed), [], mine)


def _whole(queries: Sequence[Query], *answers: Sequence[Response]) -> list[Query]:
    """The questions about pictures of which no answer was cut, under any of some defenses."""
    pairs = [pair for mine in answers for pair in zip(queries, scoring.of_these(queries, mine), strict=True)]
    gone = {(q.category, q.group) for q, r in pairs if r.cut}
    return [q for q in queries if (q.category, q.group) not in gone]


def _questions(strata: Sequence[NDArray[np.float64]]) -> int:
    return round(sum(float(s[:, 1].sum()) for s in strata))


def _tables(queries: Sequence[Query], responses: Sequence[Response], parse: Parser) -> dict[str, NDArray[np.float64]]:
    """Of each subtask, by picture: right answers, questions, 1 if all are right, 1."""
    right: dict[str, dict[str, list[float]]] = {}
    for q, r in zip(queries, scoring.of_these(queries, responses), strict=True):
        good = float(parse(r.text) == q.reference.lower())
        right.setdefault(q.category, {}).setdefault(q.group, []).append(good)
    return {
        name: bootstrap.clusters((g, (sum(v), len(v), float(all(v)), 1)) for g, v in groups.items())
        for name, groups in right.items()
    }


Sums = Sequence[NDArray[np.float64]]


def _acc(sums: Sums) -> NDArray[np.float64]:
    return sums[0][:, 0] / sums[0][:, 1]


def _acc_plus(sums: Sums) -> NDArray[np.float64]:
    return sums[0][:, 2] / sums[0][:, 3]


def _points(sums: Sums) -> NDArray[np.float64]:
    parts = [100 * s[:, 0] / s[:, 1] + 100 * s[:, 2] / s[:, 3] for s in sums]
    return np.sum(np.stack(parts), axis=0)


# ------------------------------------------------------------------------------------------------ reading


def _tool(root: Path) -> Path | None:
    """The official results folder: all questions and answers, no pictures."""
    return formats.first(root, "eval_tool/Your_Results", "Your_Results")


def _read(root: Path, short: bool, problems: Problems) -> Download | None:
    tsv = formats.first(root, "MME.tsv")
    if tsv is not None:
        rows = formats.tsv_rows(tsv, ["question", "answer", "category", "image_path"], problems)
        items = _items(((w, r["category"], r["image_path"], r["question"], r["answer"], r["image"]) for w, r in rows),
                       short, problems)  # fmt: skip
        return Download("TSV", (tsv,), items, dict(COUNTS))
    for top in TOPS:
        folders = [root / top / name for name in COUNTS if (root / top / name).is_dir()]
        if folders:
            return _from_folders(folders, short, problems)
    paths = formats.shards(root / "data", "test", problems) or formats.shards(root, "test", problems)
    return _from_parquet(paths, short, problems) if paths else None


def _from_folders(folders: Sequence[Path], short: bool, problems: Problems) -> Download:
    index: list[Path] = []

    def rows() -> Iterator[tuple[str, str, str, str, str, PictureSource]]:
        for folder in folders:
            nested = (folder / "images").is_dir()
            texts = formats.first(folder, "questions_answers_YN", "question_answers_YN") if nested else folder
            if texts is None:
                problems.add(f"{folder} has images but no questions_answers_YN", "fetch it again")
                continue
            suffixes = (".png", ".jpg", ".jpeg") if folder.name in COGNITION else (".jpg", ".png", ".jpeg")
            for path in formats.files_in(texts, "*.txt"):
                index.append(path)
                picture = formats.beside(folder / "images" if nested else folder, path.stem, suffixes)
                for number, line in enumerate(_lines(path), 1):
                    where = f"{path}, line {number}"
                    parts = line.split("\t")
                    if len(parts) == 2:
                        yield where, folder.name, picture.name, parts[0], parts[1].strip(), picture
                    else:
                        problems.add(f"{where} is no question, tab and answer", "fetch the file again")

    items = _items(rows(), short, problems)
    flat = [folder.name for folder in folders if not (folder / "images").is_dir()]
    note = "subtasks with pictures beside their texts: " + (", ".join(flat) or "none")
    return Download("official folders", tuple(index), items, dict(COUNTS), note)


def _lines(path: Path) -> list[str]:
    return [line for line in read_text(path).replace("\r\n", "\n").split("\n") if line.strip()]


def _from_parquet(paths: Sequence[Path], short: bool, problems: Problems) -> Download | None:
    def rows() -> Iterator[tuple[str, str, str, str, str, PictureSource]]:
        for where, row in formats.parquet_rows(paths, ["question_id", "image", "question", "answer", "category"]):
            image = formats.image_bytes(row["image"], where, problems)
            if image is not None and formats.has(
                row, ["question", "answer", "category"], where, problems, ["question_id"]
            ):
                name = str(row["question_id"]).split("/", 1)[-1]
                yield where, row["category"], name, row["question"], row["answer"], image

    if not formats.parquet_has(paths[0], ["question_id", "image", "question", "answer", "category"]):
        return None  # another data set's test shards
    return Download("parquet", tuple(paths), _items(rows(), short, problems), dict(COUNTS))


def _items(
    rows: Iterator[tuple[str, str, str, str, str, PictureSource]], short: bool, problems: Problems
) -> list[Item]:  # fmt: skip
    """Items of the rows (where, subtask, picture's name, question, answer, picture); both questions of a picture, or none."""
    pairs: dict[str, list[Item]] = {}
    for where, category, name, question, answer, picture in rows:
        if category not in COUNTS:
            problems.add(f"{where} is of the unknown category {category!r}", "fetch the file again")
            continue
        if answer not in ("Yes", "No"):
            problems.add(f"{where} has the answer {answer!r}, neither Yes nor No", "fetch the file again")
            continue
        group = f"{category}/{name}"  # names repeat across subtasks
        pair = pairs.setdefault(group, [])
        if short:
            question = re.sub(r"\s*" + re.escape(OFFICIAL) + r"\s*$", "", question) + SHORT
        query = Query(f"{group}#{len(pair) + 1}", question, "benign", NAME, category, group, answer)
        pair.append(Item(query, picture, where, (category,)))
    items = []
    for group, pair in pairs.items():
        answers = Counter(item.query.reference for item in pair)
        if answers == {"Yes": 1, "No": 1}:
            items += pair
        else:
            counts = f"{answers['Yes']} Yes and {answers['No']} No questions"
            problems.add(f"{pair[0].where}: the picture {group} has {counts}, not one of each", "fetch the file again")
    return items
