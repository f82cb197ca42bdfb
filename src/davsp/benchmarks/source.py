"""What the loaders share: pictures that are looked at before they are used, counts, and what is wrong with them.

A loader reads a folder into a `Download`; `load` makes queries of it, `check` counts what is there. Whatever is wrong goes
to `Problems`, which raises, or with `skip_broken` notes it and lets the reader go on.
"""

import hashlib
import io
import random
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from davsp.benchmarks.official import is_official
from davsp.errors import DavspError
from davsp.query import Query, undecodable
from davsp.runtime.files import read_json

MAX_PIXELS = 89_478_485  # Pillow's own bound against decompression bombs
MOVING = {"GIF", "PNG", "TIFF", "WEBP"}  # not MPO: phones write a JPEG and its preview so

MARK = "davsp-embedded.json"
EMBEDDED = "_embedded"
"""A folder with this file is an embedded counterpart (`davsp.embedded.counterparts`): the file has its counts and, where the
set has it in no file, the question; the benchmarks of its queries have this behind their names, so that no figure of it
passes for one of the real set."""

PictureSource = Path | bytes | Image.Image | None
Record = dict[str, Any]


class SkippedWarning(UserWarning):
    """What `skip_broken` left out."""


class ShortWarning(UserWarning):
    """A data set of which not as much is here as was published."""


class Problems(list[str]):
    """Sentences on what is wrong. Without `skip` the first one is raised as DavspError."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.skip = skip

    def add(self, sentence: str, mend: str) -> None:
        """Raise the sentence, or note it."""
        if not self.skip:
            raise DavspError(f"{sentence}; {mend}, or give skip_broken=True.")
        self.append(sentence)


@dataclass(frozen=True)
class Item:
    """One question before its picture was looked at.

    Attributes:
        query: without its picture.
        picture: a path, the bytes of a file, a rendered picture, or None for a question in words only.
        where: file and row, for messages.
        counts: the counts it adds to.
    """

    query: Query
    picture: PictureSource
    where: str
    counts: tuple[str, ...]


@dataclass(frozen=True)
class Download:
    """A data set as it lies on disk.

    Attributes:
        layout: which of the known distributions it is.
        index: the files that list the questions.
        items: the questions, in the order of the files.
        published: count name -> published number; None where none was published.
        note: what is not here, what can be rebuilt.
    """

    layout: str
    index: tuple[Path, ...]
    items: list[Item]
    published: Mapping[str, int | None] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Count:
    """How many of a category are here and whole."""

    name: str
    here: int
    published: int | None

    def __str__(self) -> str:
        return f"{self.here} of {'?' if self.published is None else self.published} in {self.name}"

    @property
    def good(self) -> bool:
        return self.published is None or self.here == self.published


@dataclass(frozen=True)
class Inventory:
    """What `check` counted in a folder; `layout` is empty if the folder was not recognised.

    Attributes:
        benchmark: name of the data set.
        root: the folder looked at.
        layout: which distribution it is.
        counts: by category, against the published numbers.
        broken: one sentence for each missing or broken picture and each row that cannot be used.
        index: file -> sha256 of the files that list the questions.
        note: what is not here, what can be rebuilt.
        official: file -> whether it is as its authors published it, where that is known (`davsp.benchmarks.official`).
    """

    benchmark: str
    root: Path
    layout: str = ""
    counts: tuple[Count, ...] = ()
    broken: tuple[str, ...] = ()
    index: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    official: Mapping[str, bool] = field(default_factory=dict)

    @property
    def short(self) -> list[Count]:
        """The categories that have not the published number."""
        return [count for count in self.counts if not count.good]

    @property
    def good(self) -> bool:
        """Recognised, as many as published, nothing broken."""
        return bool(self.layout) and not self.short and not self.broken


# ------------------------------------------------------------------------------------------------ from a download to queries


def only_test(name: str, split: str) -> None:
    """Raise DavspError if a data set that is a test as a whole is asked for another split."""
    if split != "test":
        raise DavspError(f"{name} has only the split test, not {split!r}.")


def queries(
    download: Download | None, name: str, root: Path, limit: int | None, seed: int, problems: Problems
) -> list[Query]:
    """The queries of a download; every picture is decoded once, so that none fails in the middle of a run.

    Args:
        download: None if the folder was not recognised.
        name: of the data set, for messages.
        root: the folder, for messages.
        limit: take at most so many, drawn with `seed` in whole groups (the pictures of an intent, the questions on a
            picture), in the order of the files.
        seed: of the draw.
        problems: raises, or notes what was left out; that is told by one SkippedWarning. A data set that is short of
            the published counts is used, with a ShortWarning.

    Raises:
        DavspError: not recognised, nothing left, or a problem that is not skipped.
    """
    if download is None:
        raise DavspError(
            f"{root} holds no {name} in a known layout; docs/benchmarks.md shows where to get it and how it lies."
        )
    if limit is not None and limit < 1:
        raise DavspError(f"limit={limit} takes nothing; give 1 or more.")
    download = _counterpart(download, Path(root))
    items = _unique(download.items, problems)
    if short := [count for count in _counts(download, items) if not count.good]:
        rest = f" and {len(short) - 3} more" if len(short) > 3 else ""
        text = (
            f"{name} is not as published: {', '.join(map(str, short[:3]))}{rest}; `davsp data check {root}` tells all."
        )
        warnings.warn(text, ShortWarning, stacklevel=3)
    if limit is not None and limit < len(items):
        items = _sample(items, limit, seed)
    whole = [_with_picture(item) for item in _whole(items, problems)]
    if problems:
        rest = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        text = f"{name}: skipped {len(problems)}: " + "; ".join(problems[:3]) + rest
        warnings.warn(text, SkippedWarning, stacklevel=3)
    if not whole:
        raise DavspError(f"{root} holds no usable question of {name}; run `davsp data check {root}`.")
    return whole


def _sample(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """Whole groups that are `limit` items or a few less; part of one group if it alone is more."""
    groups: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(item.query.group or item.query.id, []).append(i)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    indices: list[int] = []
    for members in order:
        if len(indices) + len(members) <= limit:
            indices += members
    return [items[i] for i in sorted(indices or order[0][:limit])]


def report(download: Download | None, name: str, root: Path, problems: Problems) -> Inventory:
    """Count what is there and whole against what was published; nothing is raised for broken rows."""
    if download is None:
        return Inventory(name, root)
    download = _counterpart(download, root)
    whole = _whole(_unique(download.items, problems), problems)
    counts = tuple(_counts(download, whole))
    index = {str(path.relative_to(root)): _sha256(path) for path in download.index}
    drawn = (root / MARK).exists()  # its files have the published names
    known = {} if drawn else {str(path.relative_to(root)): is_official(name, path) for path in download.index}
    official = {file: good for file, good in known.items() if good is not None}
    return Inventory(name, root, download.layout, counts, tuple(problems), index, download.note, official)


def _counterpart(download: Download, root: Path) -> Download:
    """An embedded counterpart as such, anything else as it is."""
    if not (root / MARK).exists():
        return download
    body = read_json(root / MARK)
    counts = body.get("counts") if isinstance(body, dict) else None
    if not isinstance(counts, dict):
        raise DavspError(f"{root / MARK} holds no counts; make the folder anew with `davsp data embedded`.")
    question = {"question": body["question"]} if "question" in body else {}
    queries = [replace(item.query, benchmark=item.query.benchmark + EMBEDDED, **question) for item in download.items]
    items = [replace(item, query=query) for item, query in zip(download.items, queries, strict=True)]
    published = {key: counts[key] for key in download.published if key in counts}
    return replace(download, layout=f"{download.layout}, embedded", items=items, published=published)


def _counts(download: Download, items: Sequence[Item]) -> list[Count]:
    counted = Counter(key for item in items for key in item.counts)
    names = dict.fromkeys([*download.published, *counted])
    return [Count(key, counted[key], download.published.get(key)) for key in names]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:  # in pieces: a parquet file may be of a gigabyte
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unique(items: Sequence[Item], problems: Problems) -> list[Item]:
    by_id: dict[str, Item] = {}
    for item in items:
        if item.query.id in by_id:
            problems.add(f"{item.where}: the id {item.query.id!r} occurs twice", "delete one of the rows")
        else:
            by_id[item.query.id] = item
    return list(by_id.values())


def _whole(items: Sequence[Item], problems: Problems) -> list[Item]:
    known: dict[Path, str] = {}
    whole = []
    for item in items:
        if isinstance(item.picture, Path):
            if item.picture not in known:
                known[item.picture] = fault(item.picture)
                if why := known[item.picture]:
                    problems.add(f"{item.where}: the picture {item.picture} {why}", "mend it or fetch it again")
            why = known[item.picture]
        elif why := fault(item.picture):
            problems.add(f"{item.where}: the picture of {item.query.id} {why}", "mend it or fetch it again")
        if not why:
            whole.append(item)
    return whole


def _with_picture(item: Item) -> Query:
    picture = item.picture
    return replace(item.query, image=Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture)


def fault(picture: PictureSource) -> str:
    """What is wrong with a picture, decoded to its end; "" if it is whole and an ordinary 8-bit still one."""
    if picture is None or isinstance(picture, Image.Image):
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged below
            with Image.open(picture if isinstance(picture, Path) else io.BytesIO(picture)) as image:
                if why := _unfit(image):
                    return why
                image.draft("RGB", (1, 1))  # a JPEG is read to its end, but at an eighth of its size
                image.load()
    except FileNotFoundError:
        return "is missing"
    except Image.DecompressionBombError:
        return f"has more than {MAX_PIXELS / 1e6:.0f} million pixels"
    except MemoryError:
        return "does not fit into memory"
    except (
        Exception
    ) as error:  # Pillow's decoders raise whatever broken bytes lead them to: TypeError, EOFError, struct.error…
        why = undecodable(error)
        return f"cannot be read ({why})" if getattr(error, "strerror", None) else f"is truncated or no picture: {why}"
    return ""


def _unfit(image: Image.Image) -> str:
    if image.width * image.height > MAX_PIXELS:
        return f"has more than {MAX_PIXELS / 1e6:.0f} million pixels"
    if image.size == (1, 1):
        return "is a single pixel"
    if image.format in MOVING and getattr(image, "n_frames", 1) > 1:
        return "is animated"
    if image.mode == "CMYK":
        return "is in CMYK, whose RGB colours depend on a profile"
    deep = any(
        re.search(r";16[BLN]", str(tile[3])) for tile in getattr(image, "tile", ())
    )  # 48-bit colour has the mode RGB
    if deep or image.mode.startswith(("I", "F")):
        return "has more than 8 bits a channel"
    return ""
