"""What border and noise share."""

from collections.abc import Callable, Container, Mapping
from copy import copy, deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_serializer
from torch import Tensor

import davsp
from davsp.errors import DavspError
from davsp.lvlm.templates import CHECKPOINT, NAME, kwargs_of
from davsp.prompts.measured import Measurement
from davsp.runtime.files import check_regular, read_bytes, read_tensors, sha256_bytes

Start = Literal["grey", "random", "white"]
P = TypeVar("P", bound="Prompt")


def _readable(template: str) -> str:
    try:
        kwargs_of(template)
    except (ValueError, RecursionError) as error:
        raise ValueError("names values that are not JSON") from error
    return template


class PromptConfig(BaseModel):
    """The fields that every saved prompt has; a file with other fields is refused.

    `separator` stands between the safety text and the question; `suffix` follows the question as it is. `template` is the conversation
    template that the model was asked by in training, with what it was told (`davsp.lvlm.templates.named`). `license` is the
    author's, an identifier as the hub knows it; `measured` is what a run gave (`davsp card`); `files` is the SHA-256 of each file beside
    this one. Whatever says nothing is left out of the file, so that it is as it was before there was a choice.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model_id: str | None = None
    revision: str | None = None
    canvas: int
    layer: int | None = None
    mu_plus: float | None = None
    mu_minus: float | None = None
    safety_text: str = ""
    separator: str = " "
    suffix: str = ""
    template: Annotated[str, AfterValidator(_readable)] = Field(CHECKPOINT, pattern=NAME, max_length=1000)
    figures: dict[str, Any] = {}
    data: dict[str, Any] = {}
    davsp_version: str = davsp.__version__
    license: str | None = None
    measured: Measurement | None = None
    files: dict[str, str] = {}

    @model_serializer(mode="wrap")
    def _without_usual(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        usual: dict[str, Any] = {
            "separator": " ", "suffix": "", "template": CHECKPOINT, "resizes": 1, "license": None, "measured": None, "files": {},
        }  # fmt: skip
        return {name: value for name, value in dump(self).items() if name not in usual or value != usual[name]}


class Prompt:
    """Pixels that are put around or on every picture, and texts that are put before and after every question.

    Attributes:
        delta: (3, s, s) float32 on the whole canvas; the one thing that is trained.
        text: safety text before the question; "" for none.
        config: how it was trained (model, layer, margins, data hashes, figures), and how the texts are placed.
        kind: "border" or "additive".
    """

    kind: str

    def __init__(self, delta: Float[Tensor, "3 s s"], text: str = "", config: dict[str, Any] | None = None):
        self.delta, self.text, self.config = delta, text, config or {}

    @property
    def canvas(self) -> int:
        """Height and width of the canvas in pixels."""
        return self.delta.shape[-1]

    def resize(self, images: list[Image.Image]) -> Float[Tensor, "b 3 s s"]:
        """The pictures where they will stand on the canvas; float32, each value k/255."""
        raise NotImplementedError

    def apply(self, interior: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        """The finished canvas T(x, delta) in [0, 1] from what `resize` gave; carries the gradient to delta."""
        raise NotImplementedError

    def project_(self: P) -> P:
        """Clamp delta in place to what is allowed."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the prompt's folder, all or nothing, in 8-bit levels."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls: type[P], source: str | Path) -> P:
        """Read the prompt's folder."""
        raise NotImplementedError

    @property
    def separator(self) -> str:
        """What stands between the safety text and the question: one space, if nothing else is said."""
        return str(self.config.get("separator", " "))

    @property
    def suffix(self) -> str:
        """What follows the question as it is, line break and all: nothing, if nothing is said."""
        return str(self.config.get("suffix", ""))

    @property
    def template(self) -> str:
        """The conversation template by which the model was asked in training; the checkpoint's own, if nothing is said."""
        return str(self.config.get("template", CHECKPOINT))

    def question(self, question: str) -> str:
        """The question with the texts around it."""
        return (f"{self.text}{self.separator}{question}" if self.text else question) + self.suffix

    @torch.no_grad()
    def image(self, picture: Image.Image) -> Image.Image:
        """The defended picture as an 8-bit RGB canvas, ready to be saved as PNG or sent to a server."""
        canvas = self.apply(self.resize([picture]).to(self.delta.device))[0]
        return Image.fromarray(to_bytes(canvas))

    def painter(self) -> Callable[[Image.Image], Image.Image]:
        """`image` for a prompt that does not change any more: same pixels, with what is the same for all pictures made once."""
        return self.image

    def with_delta(self: P, delta: Float[Tensor, "3 s s"]) -> P:
        """The same prompt with another delta; it may carry a gradient, and its config may be changed freely."""
        other = copy(self)
        other.delta, other.config = delta, deepcopy(self.config)
        return other

    def with_texts(self: P, text: str, separator: str = " ", suffix: str = "") -> P:
        """The same prompt with other texts: `text`, `separator`, the question, `suffix`."""
        other = self.with_delta(self.delta)
        other.text = text
        other.config |= {"safety_text": text, "separator": separator, "suffix": suffix}
        other.config.pop("measured", None)
        return other

    def quantised(self: P) -> P:
        """The prompt with delta in 8-bit levels, k/255: what a picture file can hold."""
        return self.with_delta(torch.round(self.delta.detach() * 255) / 255)

    def pixels_sha256(self) -> str:
        """What tells this prompt's 8-bit pixels from another's: SHA-256 of the float32 tensor as it is saved."""
        return sha256_bytes(self.quantised().delta.cpu().contiguous().numpy().tobytes())

    def check(self, lvlm: Any) -> None:
        """Raises DavspError unless the LVLM sees this prompt's canvas as it is, without resampling it."""
        lvlm.check_canvas(self.canvas, self.canvas)


def read_delta(path: Path, canvas: int) -> Float[Tensor, "3 s s"]:
    """The one tensor of a saved prompt, float32.

    Raises:
        DavspError: it is missing, or something else is there.
    """
    tensors, shape = read_tensors(path), (3, canvas, canvas)
    delta = tensors.get("delta", torch.empty(0))
    if len(tensors) != 1 or tuple(delta.shape) != shape or not delta.is_floating_point():
        raise DavspError(f"{path} must hold one float tensor 'delta' of shape {shape}; save the prompt anew")
    return delta.float()


def check_range(delta: Float[Tensor, "3 s s"], low: float, high: float, place: str) -> None:
    """Raises DavspError if a value is NaN or outside [low, high]."""
    if not bool(((delta >= low) & (delta <= high)).all()):  # false for NaN as well
        at = tuple((~((delta >= low) & (delta <= high))).nonzero()[0].tolist())
        raise DavspError(
            f"{place}: delta holds NaN or values outside [{low:g}, {high:g}], the first one {float(delta[at]):g} at "
            f"{list(at)}; train or save the prompt anew"
        )


def sealed(config: dict[str, Any], contents: Mapping[str, bytes]) -> dict[str, Any]:
    """The configuration with the SHA-256 of each file that is written beside it."""
    return config | {"files": {name: sha256_bytes(data) for name, data in contents.items()}}


def check_files(folder: Path, files: Mapping[str, str], free: Container[str] = ()) -> None:
    """Compare files with the hashes in a configuration; none is there in folders of older versions.

    Args:
        folder: of the prompt.
        files: name -> SHA-256.
        free: files that may be changed by hand: the card.

    Raises:
        DavspError: a file is missing or another one, or a name is that of no file in the folder.
    """
    for name, saved_hash in files.items():
        if Path(name).name != name:
            raise DavspError(f"{folder}: field 'files' names {name!r}, which is no file of this folder; save anew")
        check_regular(folder / name)
        if name not in free and sha256_bytes(read_bytes(folder / name)) != saved_hash:
            raise DavspError(
                f"{folder / name} is not the file that was saved: its SHA-256 is not that of field 'files.{name}'; "
                "restore it, or save the prompt anew"
            )


def to_bytes(canvas: Float[Tensor, "3 h w"]) -> np.ndarray:
    """A canvas in [0, 1] as uint8 (h, w, 3)."""
    return torch.round(canvas.detach().cpu() * 255).to(torch.uint8).permute(1, 2, 0).numpy()


def from_picture(picture: Image.Image) -> Float[Tensor, "3 h w"]:
    """An RGB picture as float32 k/255, channels first."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def start_values(start: Start, canvas: int, seed: int) -> Float[Tensor, "3 s s"]:
    """Where training begins: grey 128/255, white, or uniform noise from `seed`."""
    if start == "random":
        return torch.rand(3, canvas, canvas, generator=torch.Generator().manual_seed(seed))
    if start not in ("grey", "white"):
        raise DavspError(f"start '{start}' is not known: choose grey, random or white")
    return torch.full((3, canvas, canvas), 128 / 255 if start == "grey" else 1.0)
