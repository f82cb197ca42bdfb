"""The records that flow: a query goes in, a response comes out, a verdict is passed on it."""

import io
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeVar

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from davsp.errors import DavspError, words_of
from davsp.runtime.files import check_regular, read_bytes, sha256_bytes, write_text

COST = ("calls", "prompt_tokens", "image_tokens")
"""The fields of a response that say what it took, but for time."""

BAND = 2**20
"""Pixels of a picture with transparency that are laid on white at a time."""

Turn = tuple[str, str]
"""Role, "user" or "assistant", and text."""

Question = str | tuple[Turn, ...]
"""What a model is asked: a text, or a conversation whose last turn is the user's. A picture stands in the first turn."""

T = TypeVar("T")
Record = TypeVar("Record", "Query", "Response", "Verdict", "Grade")


@dataclass(frozen=True)
class Query:
    """One image and question, x = (x_v, x_t).

    Attributes:
        id: unique within its benchmark.
        question: the text the user types.
        label: what the user is after.
        benchmark: where it comes from (`sd`, `typo`, `utility`, ...).
        category: scenario or skill.
        group: the intent behind it; intervals are clustered on it.
        reference: the expected answer of a benign query.
        answers: other accepted answers.
        image: a picture, the path of one, or None for a question in words only.
        context: what the picture adds, in words, for judges that can't see it: a caption, or the request as plain text.
        turns: what was said before the question, the user's turn first, then the model's, in turn; () for most. The picture stands in the
            first one.
    """

    id: str
    question: str
    label: Literal["malicious", "benign"]
    benchmark: str
    category: str = ""
    group: str = ""
    reference: str = ""
    answers: tuple[str, ...] = ()
    image: Image.Image | Path | None = None
    context: str = ""
    turns: tuple[Turn, ...] = ()

    @property
    def asked(self) -> Question:
        """What a model is asked: the question, with the turns before it if there are any."""
        return (*self.turns, ("user", self.question)) if self.turns else self.question

    @property
    def told(self) -> str:
        """The same as one text, for judges and pages."""
        return as_text(self.asked)

    def size(self) -> tuple[int, int] | None:
        """Width and height of the picture as its file has it, before a turn by EXIF; nothing is decoded.

        Raises:
            DavspError: the file is missing or no picture.
        """
        if isinstance(self.image, Path):
            return picture_size(self.image)
        return None if self.image is None else self.image.size

    def picture(self) -> Image.Image | None:
        """The picture as RGB: turned as its EXIF says, transparency laid on white.

        Raises:
            DavspError: the file is missing or no picture.
        """
        if isinstance(self.image, Path):
            return open_picture(self.image)
        return None if self.image is None else flatten(unpacked(self.image))


@dataclass(frozen=True)
class Response:
    """What a model answered under a defense.

    Attributes:
        projection: s(x) of the last input token at the vector's layer, where one was given.
        seconds: wall time, shared equally by a batch.
        calls: how often the model was asked for it; None in answers from before this was counted.
        prompt_tokens: of all calls together, pictures and the chat's own marks included; None where a server does not tell.
        image_tokens: how many of these stand for pictures; None where a server answers.
        thought: what the model thought before or between; no judge sees it.
        cut: all its tokens went before there was an answer, so nobody can tell what that would have been: it is unscored.
        finish: "stop": the model ended the answer; "length": it was cut at the longest, and is judged by what there is; empty: not
            known (answers of older versions).
    """

    query_id: str
    defense: str
    text: str
    projection: float | None = None
    seconds: float = 0.0
    calls: int | None = None
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    thought: str = ""
    cut: bool = False
    finish: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one response; `unscored` when it cannot tell.

    Attributes:
        judge: its name, version and, behind a colon, the model that was asked: `davsp/1:deepseek-chat`.
        reason: for the label, in words.
        raw: the judge's own words where a model was asked, cut at 1,000 characters.
        prompt: hash of the unfilled prompt it was asked with.
    """

    query_id: str
    defense: str
    judge: str
    label: Literal["safe", "unsafe", "unscored"]
    reason: str = ""
    raw: str = ""
    prompt: str = ""


@dataclass(frozen=True)
class Grade:
    """The scores that a grader gives one response of a utility benchmark; none where it cannot tell.

    Attributes:
        judge: as in `Verdict`.
        scores: MM-Vet: one in [0, 1]. LLaVA-Bench: the reference's and the answer's, in [1, 10]. () is unscored.
        reason: for the scores, in words.
        raw: the grader's own words where a model was asked, cut at 1,000 characters.
        prompt: hash of the unfilled prompt it was asked with.
        run: which of several passes over the same responses, from 0.
    """

    query_id: str
    defense: str
    judge: str
    scores: tuple[float, ...]
    reason: str = ""
    raw: str = ""
    prompt: str = ""
    run: int = 0


def turns_of(question: Question) -> tuple[Turn, ...]:
    """A question's turns; a text is one of the user."""
    return (("user", question),) if isinstance(question, str) else question


def as_text(question: Question) -> str:
    """A question as one text: of a conversation a line a turn, "user: …"."""
    return question if isinstance(question, str) else "\n".join(f"{role}: {text}" for role, text in question)


def turns_fault(turns: tuple[Turn, ...]) -> str:
    """What is wrong with turns before a question; empty if nothing is."""
    if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2):
        return "the turns before a question are user, assistant, user, assistant, …, and end with the assistant's"
    return "a turn before the question is blank" if not all(text.strip() for _, text in turns) else ""


def single(queries: "Iterable[Query]", who: str) -> None:
    """Raises DavspError if a query has turns before its question, which `who` does not know."""
    if query := next((q for q in queries if q.turns), None):
        raise DavspError(
            f"query {query.id!r} has turns before its question, and {who} takes single questions; leave such queries out, or answer "
            "them with davsp eval"
        )


def open_picture(path: Path) -> Image.Image:
    """Read a picture file as RGB.

    Raises:
        DavspError: missing, or nothing Pillow can decode.
    """
    return _opened(path, flatten)


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture file, as its head says; nothing is decoded.

    Raises:
        DavspError: as `open_picture`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the caller judges the size
        return _opened(path, lambda image: image.size)


def _opened(path: Path, read: Callable[[Image.Image], T]) -> T:
    check_regular(path)
    if os.path.isdir(path):  # not Path's, which fails on a long name
        raise DavspError(f"cannot open image {path}: it is a folder; give a PNG, JPEG or WebP file in it")
    try:
        with Image.open(path) as image:
            return read(image)
    except DavspError as error:
        raise DavspError(f"cannot open image {path}: {error}") from error
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        mend = "" if getattr(error, "strerror", None) else "; give a whole PNG, JPEG or WebP file"
        raise DavspError(f"cannot open image {path}: {undecodable(error)}{mend}") from error


def undecodable(error: Exception) -> str:
    """Why a picture could not be read: the system's reason, else Pillow's; it names no file."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture of a known format"
    return getattr(error, "strerror", None) or f"it cannot be decoded ({words_of(error)})"


def unpacked(image: Image.Image) -> Image.Image:
    """A second picture of the same bytes, if this one was opened from memory and is not decoded yet: it then stays packed.

    Thousands of pictures from parquet or TSV files, decoded and kept, would fill the memory. Any other is given back as it is.
    """
    if isinstance(image, ImageFile) and isinstance(image.fp, io.BytesIO) and getattr(image, "n_frames", 1) == 1:
        return Image.open(io.BytesIO(image.fp.getvalue()))
    return image


def flatten(image: Image.Image) -> Image.Image:
    """RGB, upright by its EXIF, transparency laid on white (alpha, or one transparent colour), 16-bit grey in 8 bit.

    A picture that is so already is given back itself.

    Raises:
        DavspError: its numbers do not say what they show: 32 bits, floats, 16 bits with one transparent colour.
    """
    deep = _is_deep_grey(image)
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if deep:
        image = image.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L")  # else clipped to white
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        return _on_white(image)
    if image.mode != "RGB":
        image = image.convert("RGB")
        image.info.clear()  # of EXIF that Pillow passed over as broken when it opened the file, and would read anew in this copy
    return image


def _is_deep_grey(image: Image.Image) -> bool:
    """Whether it is grey in 16 bits, white 65535; DavspError where the numbers do not say what they show."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    tags = getattr(image, "tag_v2", {})  # TIFF: bits a number, and whether 0 is black
    usual = (tags.get(258, (16,)), tags.get(262, 1)) == ((16,), 1)
    if (deep and not usual) or (image.mode in ("I", "F") and not deep):
        raise DavspError(
            f"the picture's numbers (mode {image.mode}) do not say which one is white; save it as an 8-bit PNG"
        )
    packed = [str(tile[3]) for tile in getattr(image, "tile", ())]  # 48-bit colour has the mode RGB
    if "transparency" in image.info and any(";16" in name for name in (image.mode, *packed)):
        raise DavspError(
            "the picture has 16 bits a channel and one transparent colour, which has no like in 8; save it as an 8-bit PNG"
        )
    return deep


def _on_white(image: Image.Image) -> Image.Image:
    """The picture on white, some rows at a time: of a large one only itself and the result are in memory."""
    result, step = Image.new("RGB", image.size), max(1, BAND // image.width)
    for top in range(0, image.height, step):
        rows = image.crop((0, top, image.width, min(top + step, image.height))).convert("RGBA")
        white = Image.new("RGBA", rows.size, "white")
        result.paste(Image.alpha_composite(white, rows).convert("RGB"), (0, top))
    return result


def write_jsonl(path: str | Path, records: "Iterable[Query | Response | Verdict | Grade]") -> None:
    """Write records as JSON lines, atomically. A picture is written as its hash and size."""
    write_text(path, "".join(json_line(r) for r in records))


def read_jsonl(path: str | Path, cls: type[Record]) -> list[Record]:
    """Read records back. A query's picture is not in the file, so its `image` is None.

    Raises:
        DavspError: a line is not such a record; the message names file and line.
    """
    records = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):  # of bytes: text may hold U+2028
        try:
            values = json.loads(line)
            if cls is Query:
                values |= {"image": None, "answers": tuple(values["answers"])}
                values["turns"] = tuple((role, text) for role, text in values.get("turns", ()))
            if cls is Grade:
                values |= {"scores": tuple(map(float, values["scores"]))}
            records.append(cls(**values))
        except (ValueError, TypeError, KeyError) as error:
            raise DavspError(
                f"{path}, line {number} is no {cls.__name__} ({words_of(error)}); delete the file to start anew"
            ) from error
    return records


def json_line(record: "Query | Response | Verdict | Grade") -> str:
    """A record as it stands in a file, line end included. What is not known of an answer's cost is left out, and no thought."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    if isinstance(record, Response):
        values = {name: value for name, value in values.items() if value is not None or name not in COST}
        values = {name: value for name, value in values.items() if value or name not in ("thought", "cut", "finish")}
    if isinstance(record, Query):
        picture = record.picture()
        values = {name: value for name, value in values.items() if value or name != "turns"}
        values["image"] = picture and {"sha256": sha256_bytes(picture.tobytes()), "size": list(picture.size)}
    return json.dumps(values, ensure_ascii=False) + "\n"
