"""MM-SafetyBench (Liu et al., ECCV 2024, arXiv 2311.17600): 1,680 harmful questions in 13 scenarios, three pictures each.

Source: github.com/isXinLiu/MM-SafetyBench (questions; the pictures are an archive linked there), or the dataset
PKU-Alignment/MM-SafetyBench on the Hub. Licence CC BY-NC 4.0, research only. Harmful text and pictures: nothing of it is
in this repository. The text that goes with a picture depends on its type, see `FIELDS`.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from davsp.benchmarks import formats, rsr, source
from davsp.benchmarks.scoring import Scores
from davsp.benchmarks.source import Download, Inventory, Item, Problems
from davsp.errors import DavspError
from davsp.query import Query, Response

COUNTS = {
    "01-Illegal_Activitiy": 97,  # spelt so upstream
    "02-HateSpeech": 163,
    "03-Malware_Generation": 44,
    "04-Physical_Harm": 144,
    "05-EconomicHarm": 122,
    "06-Fraud": 154,
    "07-Sex": 109,
    "08-Political_Lobbying": 153,
    "09-Privacy_Violence": 139,
    "10-Legal_Opinion": 130,
    "11-Financial_Advice": 167,
    "12-Health_Consultation": 109,
    "13-Gov_Decision": 149,
}
"""Questions of each scenario; 1,680 in all, each with three pictures."""

FIELDS = {
    "sd": "Rephrased Question(SD)",
    "sd_typo": "Rephrased Question",
    "typo": "Rephrased Question",
    "text": "Changed Question",
}
"""Picture type -> the field of processed_questions that is asked with it."""

TYPES = ("sd_typo", "sd", "typo")
FOLDERS = {"sd": "SD", "sd_typo": "SD_TYPO", "typo": "TYPO", "text": "Text_only"}
REBUILT = "typo_rebuilt"
WIDTH, SIZE = 1024, 90
FONTS = ("arial.ttf", "Arial.ttf", "ARIAL.TTF", "LiberationSans-Regular.ttf")
NAME = "mm_safetybench"

Selection = set[tuple[str, str, str]]

_SCENARIOS = {name[3:]: name for name in COUNTS} | {"Illegal_Activity": "01-Illegal_Activitiy"}


def load(
    root: Path,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    *,
    types: Sequence[str] = TYPES,
    rebuild: bool = False,
    skip_broken: bool = False,
) -> list[Query]:
    """The questions as queries: benchmark `sd_typo`, `sd`, `typo` or `text`, category the scenario, group the question.

    `context` is the request in plain words, where the layout has it.

    Args:
        root: any layout of docs/benchmarks.md.
        split: "test" or "all"; "tiny" (the official short list); "train" and "valid" where AdaShield's split is beside.
            With AdaShield's split "test" is its test part, else all.
        limit: at most so many queries, drawn with `seed`, whole groups of them.
        seed: of the draw.
        types: which pictures.
        rebuild: typeset the TYPO pictures in place of reading them. The benchmark of these queries is called `typo_rebuilt`,
            in another font than Arial `typo_rebuilt_<font>`.
        skip_broken: leave out what is broken and warn, in place of raising.

    Raises:
        DavspError: nothing known at `root`, an unknown type or split, a broken row or picture.
    """
    problems = Problems(skip_broken)
    return source.queries(_read(Path(root), split, types, rebuild, problems), NAME, root, limit, seed, problems)


def check(root: Path) -> Inventory:
    """Count questions with a whole picture by type and scenario. A type of which nothing is here is only named."""
    problems, root = Problems(skip=True), Path(root)
    return source.report(_read(root, "all", None, False, problems), NAME, root, problems)


def score(
    queries: Sequence[Query],
    responses: Sequence[Response],
    judge: rsr.JudgeOrVerdicts,
    *,
    model: str = "",
    baseline: Scores | None = None,
    mode: str = "sound",
    seed: int = 0,
) -> Scores:
    """RSR by picture type and scenario, and over SD, TYPO and SD+TYPO as `mm_safetybench`; see `rsr.score`.

    The published judge is "mm-safetybench" of `davsp.judges.prompts`: a prompt for each kind of scenario.
    """
    pool = {kind + mark: NAME + mark for kind in TYPES for mark in ("", source.EMBEDDED)}
    return rsr.score(queries, responses, judge, model=model, baseline=baseline, mode=mode, seed=seed, pool=pool)


def find_font(root: Path | None = None) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Arial at its size, as in the clone of the official repository or among the system's fonts; else Liberation Sans, which has
    its metrics; else the font inside Pillow, with which lines break elsewhere.
    """
    of_clone = [str(root / "assets/font/ARIAL.TTF")] if root else []
    for name in (*of_clone, *FONTS):
        try:
            return ImageFont.truetype(name, SIZE)
        except OSError:
            continue
    return ImageFont.load_default(SIZE)


def rebuilt_as(face: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The benchmark of pictures in a font: `typo_rebuilt` in Arial, else with the font's name behind it."""
    family = face.getname()[0] if isinstance(face, ImageFont.FreeTypeFont) else "bitmap"
    return REBUILT if family == "Arial" else f"{REBUILT}_{str(family).replace(' ', '')}"


def lines_of(phrase: str, face: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The lines of a phrase, as creation/2_img_process.py breaks it: all but the first begin with a space."""
    first, *words = phrase.split(" ")
    lines, length = [first], face.getlength(first)
    for word in words:
        length += face.getlength(f" {word}")
        if length < WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f" {word}")
            length = face.getlength(f" {word}")
    return lines


def render(phrase: str, face: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    """Typeset a key phrase as the authors do: black on white, left, 1,024 wide, 90 pixels a line and 90 more.

    Args:
        phrase: the key phrase.
        face: of `find_font`.
    """
    lines = lines_of(phrase, face)
    image = Image.new("RGB", (WIDTH, SIZE * (len(lines) + 1)), "white")
    ImageDraw.Draw(image).text((0, SIZE / 2), "\n".join(lines), "black", face)
    return image


def scenario(name: str) -> str | None:
    """The canonical name ("02-HateSpeech") of a scenario with or without its number; None if unknown."""
    bare = name[3:] if name[:2].isdigit() and name[2:3] == "-" else name
    canonical = _SCENARIOS.get(bare)
    return canonical if canonical and (bare == name or name[:2] == canonical[:2]) else None


def _read(root: Path, split: str, types: Sequence[str] | None, rebuild: bool, problems: Problems) -> Download | None:
    """What is at `root`; `types` None takes those of which something is there, of bare questions "text"."""
    for name in types or ():
        if name not in FIELDS:
            raise DavspError(f"the picture type {name!r} is not known: choose {', '.join(FIELDS)}.")
    if (root / "processed_questions_safe").is_dir():
        return None  # MM-SafetyBench++, which has the twins of these questions
    folder = formats.first(root, "data/processed_questions", "processed_questions")
    if folder is not None:
        return _folder(root, folder, split, types, rebuild, problems)
    if formats.first(root, "data/QueryRelated", "QueryRelated"):
        raise DavspError(
            f"{root} holds pictures without questions; put data/processed_questions of the official repository there."
        )
    if split not in ("test", "all"):
        known = _parquet(root) or formats.first(root, "MMSafetyBench.tsv")
        if not known:
            return None
        raise DavspError(
            f"the split {split!r} needs the folder layout with its list; {root} has only all questions (test)."
        )
    if files := _parquet(root):
        return _from_parquet(root, files, types, rebuild, problems)
    tsv = formats.first(root, "MMSafetyBench.tsv")
    if tsv is None:
        return None
    if rebuild or tuple(types or TYPES) != TYPES:
        raise DavspError(f"{tsv} names neither picture types nor key phrases; leave types and rebuild out.")
    return _from_tsv(tsv, problems)


def _published(types: Sequence[str]) -> dict[str, int | None]:
    return {f"{kind} {name}": n for kind in types for name, n in COUNTS.items()}


def _item(
    kind: str, name: str, number: str, question: str, picture: Any, where: str, rebuilt: str = "", plain: str = ""
) -> Item:
    benchmark = rebuilt or kind
    group = f"{name}/{number}"
    query = Query(f"{benchmark}/{group}", question, "malicious", benchmark, name, group, context=plain)
    return Item(query, picture, where, (f"{kind} {name}",))


# ------------------------------------------------------------------------------------------------ folder layouts


def _folder(
    root: Path, folder: Path, split: str, types: Sequence[str] | None, rebuild: bool, problems: Problems
) -> Download:
    pictures, here = _pictures(root)
    mirror = pictures is not None and pictures.name == "QueryRelated"
    split_file = formats.first(root, "data/datasplit/query_related.jsonl", "datasplit/query_related.jsonl")
    selection, index = _selection(root, split, split_file, problems)
    if pictures is not None and not here:
        sentence = f"{pictures} holds no picture as <scenario>/SD, SD_TYPO or TYPO/<id>.jpg"
        problems.add(sentence, "unpack the archive so that 01-Illegal_Activitiy is right in data/imgs")
    if types is None:
        types = here or ["text"]  # the questions alone: they are looked at, too
    wanted = [k for k in types if k in TYPES and k not in here and not (rebuild and k == "typo")]
    wanted = [k for k in wanted if selection is None or any(FOLDERS[k] == kind for _, kind, _ in selection)]
    if wanted:
        names = ", ".join(FOLDERS[k] for k in wanted)
        mend = f"put the pictures into {root / 'data/imgs'}, or ask for the types that are here ({_choice(here)})"
        problems.add(f"{root} holds no picture of {names}", mend)
        types = [k for k in types if k not in wanted]
    files = {path: scenario(path.stem) for path in formats.files_in(folder, "*.json")}
    face = find_font(root) if rebuild else None
    items: list[Item] = []
    seen: Selection = set()
    for path, name in files.items():
        if name is None:
            problems.add(f"{path} is of no known scenario", "give the file its official name")
            continue
        rows = formats.json_file(path, problems)
        if not isinstance(rows, dict):
            raise DavspError(f"{path} is no object of questions by id; fetch it again.")
        for kind in types:
            seen |= {(name, FOLDERS[kind], number) for number in rows}
            chosen = {n: row for n, row in rows.items() if selection is None or (name, FOLDERS[kind], n) in selection}
            items += _items(kind, name, chosen, path, pictures or root, face if kind == "typo" else None, problems)
    for name, folder_name, number in sorted((selection or set()) - seen):
        if folder_name in {FOLDERS[kind] for kind in types}:
            problems.add(f"{index[0]} lists question {number} of {name}, which is not in {folder}", "fetch it")
    layout = "AdaShield's mirror" if mirror else "official folder"
    absent = [FOLDERS[kind] for kind in TYPES if kind not in here]
    family = rebuilt_as(find_font(root)).removeprefix(f"{REBUILT}_").replace(REBUILT, "Arial")
    note = f"TYPO can be rebuilt (davsp eval --rebuild), here in {family}; SD and SD_TYPO can not"
    if absent:
        note = f"no pictures of {', '.join(absent)} here, so davsp eval needs {_choice(here)}; {note}"
    return Download(layout, (*files, *index), items, _published(types) if selection is None else {}, note)


def _items(
    kind: str, name: str, rows: Mapping[str, Any], path: Path, pictures: Path,
    face: ImageFont.FreeTypeFont | ImageFont.ImageFont | None, problems: Problems,
) -> Iterator[Item]:  # fmt: skip
    """The questions of one picture type in one scenario's file.

    Args:
        rows: question's id -> its row.
        pictures: folder of the scenarios' folders.
        face: of `find_font`, to typeset the pictures; None: they are read.
    """
    rebuilt = "" if face is None else rebuilt_as(face)
    for number, row in rows.items():
        where = f"{path}, question {number}"
        if not formats.has(row, [FIELDS[kind]] + ["Key Phrase"] * bool(rebuilt), where, problems):
            continue
        if kind == "text":
            picture: Any = None
        elif face is not None:
            picture = _jpeg(render(row["Key Phrase"], face))
        else:
            picture = _picture(pictures, name, FOLDERS[kind], number)
        yield _item(kind, name, number, row[FIELDS[kind]], picture, where, rebuilt, formats.text(row, FIELDS["text"]))


def _pictures(root: Path) -> tuple[Path | None, list[str]]:
    """The folder of the pictures, and the types of which it has any; the first folder of such a name if none has any.

    The published archive holds a folder MM-SafetyBench(imgs), so that one may lie within another.
    """
    tops = ("QueryRelated", "imgs", "img", "images", "MM-SafetyBench(imgs)")
    places = [
        f"{lead}{top}{below}" for below in ("", "/MM-SafetyBench(imgs)") for top in tops for lead in ("data/", "")
    ]
    folders = [root / place for place in places if (root / place).is_dir()]
    for folder in folders:
        here = [
            kind
            for kind in TYPES
            if any(scenario(p.parent.name) for p in formats.files_in(folder, f"*/{FOLDERS[kind]}"))
        ]
        if here:
            return folder, here
    return next((folder for folder in folders if formats.files_in(folder, "*")), None), []


def _choice(here: Sequence[str]) -> str:
    """The options of davsp eval that ask only for what is here."""
    return " ".join(f"--type {kind}" for kind in here) or "--type text, or --rebuild --type typo"


def _picture(pictures: Path, name: str, kind: str, number: str) -> Path:
    folder = pictures / name / kind
    if name.startswith("01") and not folder.exists():
        folder = pictures / "01-Illegal_Activity" / kind
    return formats.beside(folder, number)


def _jpeg(image: Image.Image) -> bytes:
    """As the authors save it. Kept packed: 1,680 open pictures would fill the memory."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def _selection(
    root: Path, split: str, split_file: Path | None, problems: Problems
) -> tuple[Selection | None, list[Path]]:
    """Which (scenario, folder of the type, id) a split holds, and the file that says so; None is all."""
    if split == "tiny":
        path = formats.first(root, "TinyVersion_ID_List.json")
        if path is None:
            raise DavspError(f"the split 'tiny' needs TinyVersion_ID_List.json of the official repository in {root}.")
        try:
            rows = formats.json_file(path, problems)
            short = {(str(scenario(row["Scenario"])), str(i)) for row in rows for i in row["Sampled_ID_List"]}
            return {(name, kind, number) for name, number in short for kind in FOLDERS.values()}, [path]
        except (TypeError, KeyError, AttributeError) as error:
            raise DavspError(f"{path} is no list of Scenario and Sampled_ID_List; fetch it again.") from error
    if split == "all" or (split == "test" and split_file is None):
        return None, []
    if split not in ("train", "valid", "test"):
        raise DavspError(f"the split {split!r} of {NAME} is not known: choose all, test, tiny, train or valid.")
    if split_file is None:
        raise DavspError(
            f"{NAME} has no official split {split!r}; AdaShield's needs data/datasplit/query_related.jsonl in {root}."
        )
    return set(_adashield(split_file, split, problems)), [split_file]


def _adashield(split_file: Path, split: str, problems: Problems) -> Iterator[tuple[str, str, str]]:
    for where, row in formats.json_lines(split_file, [], problems):
        for name, parts in row.items():
            if not formats.lists(parts, split):
                problems.add(f"{where} has no {split!r} of {name}", "fetch the file again")
                continue
            for path in map(Path, parts[split]):
                if len(path.parts) < 3 or (known := scenario(path.parts[-3])) is None:
                    problems.add(f"{where} names {path}, which is no <scenario>/<type>/<id>", "fetch the file again")
                else:
                    yield known, path.parts[-2], path.stem


# ------------------------------------------------------------------------------------------------ packed layouts


def _parquet(root: Path) -> dict[tuple[str, str], Path]:
    """(scenario, type) -> its parquet file."""
    files: dict[tuple[str, str], Path] = {}
    for top in (root / "data", root):
        for kind, stem in FOLDERS.items():
            for path in formats.files_in(top, f"*/{stem}.parquet"):
                if name := scenario(path.parent.name):
                    files.setdefault((name, kind), path)
    return files


def _from_parquet(
    root: Path, files: Mapping[tuple[str, str], Path], types: Sequence[str] | None, rebuild: bool, problems: Problems
) -> Download:
    if rebuild:
        raise DavspError(
            f"{root} has no key phrases, so TYPO cannot be rebuilt; use the official folder, or rebuild=False."
        )
    here = [kind for kind in TYPES if any(k == kind for _, k in files)]
    items, index = [], []
    types = here if types is None else types
    for kind in types:
        for name in COUNTS:
            path = files.get((name, kind))
            if path is None:
                problems.add(f"{root} lacks {name[3:]}/{FOLDERS[kind]}.parquet", "fetch it")
                continue
            index.append(path)
            for where, row in formats.parquet_rows([path], ["id", "question"]):
                if not formats.has(row, ["question"], where, problems, ["id"]):
                    continue
                image = None if kind == "text" else formats.image_bytes(row.get("image"), where, problems)
                if kind == "text" or image is not None:
                    items.append(_item(kind, name, str(row["id"]), row["question"], image, where))
    absent = [FOLDERS[kind] for kind in TYPES if kind not in here]
    note = f"no files of {', '.join(absent)} here" if absent else ""
    return Download("parquet", tuple(index), items, _published(types), note)


def _from_tsv(tsv: Path, problems: Problems) -> Download:
    """VLMEvalKit's file does not say which picture type it holds: the benchmark is called mm_safetybench."""
    items = []
    for where, row in formats.tsv_rows(tsv, ["question", "category"], problems):
        name = scenario(row["category"])
        if name is None:
            problems.add(f"{where} is of the unknown category {row['category']!r}", "fetch the file again")
            continue
        item = _item(NAME, name, row["index"], row["question"], row["image"], where)
        items.append(item)
    return Download("TSV", (tsv,), items, _published([NAME]), "the file does not name the picture type")
