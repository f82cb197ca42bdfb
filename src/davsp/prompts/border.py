"""The visual safety prompt: a trainable border around the untouched picture."""

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from jinja2 import Environment, StrictUndefined
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from davsp.errors import DavspError
from davsp.prompts.base import (
    Prompt,
    PromptConfig,
    Start,
    check_files,
    check_range,
    from_picture,
    read_delta,
    sealed,
    start_values,
    to_bytes,
)
from davsp.prompts.canaries import FILE as CANARIES
from davsp.prompts.canaries import Canaries, read_canaries
from davsp.prompts.gate import FILE as GATE
from davsp.prompts.gate import SERVED, Calibration, Served
from davsp.prompts.hub import fetch
from davsp.prompts.measured import measurement, with_interval
from davsp.query import flatten, open_picture, picture_size
from davsp.runtime.config import read_config
from davsp.runtime.files import to_json, write_all

CONFIG, TENSORS, PICTURE, CARD = "vsp_config.json", "vsp.safetensors", "vsp.png", "README.md"
BESIDE = {CANARIES, GATE, SERVED}
"""Files that a prompt may do without."""


class BorderConfig(PromptConfig):
    """The fields of `vsp_config.json`. `resizes` is how often the picture inside is resized: once, or twice as in the authors' code."""

    padding: int
    resizes: Literal[1, 2] = 1


class VisualSafetyPrompt(Prompt):
    """T(x, delta) = m * delta + Resize(x): delta in [0, 1] on a border of `padding` pixels, zero inside.

    Source: the paper's equation of T; p = 30 on a 336-pixel canvas there.

    Attributes:
        canaries: queries that it flips, by which a server's owner sees that it still works there; no part of what it is.
        gate: scores and thresholds by which it is looked through (`davsp.defenses.gate`); no part of it, either.
        served: the threshold by which it is looked through on a server.
    """

    kind = "border"
    canaries: Canaries | None = None
    gate: Calibration | None = None
    served: Served | None = None

    def __init__(
        self, delta: Float[Tensor, "3 s s"], padding: int, text: str = "", config: dict[str, Any] | None = None
    ):
        canvas = delta.shape[-1]
        check_padding(padding, canvas)
        fields = BorderConfig(canvas=canvas, padding=padding, safety_text=text).model_dump()
        super().__init__(delta, text, fields | (config or {}))
        self.padding = padding
        self.mask = border_mask(canvas, padding)
        self.delta = torch.where(self.mask.to(delta.device) > 0, delta, 0)  # the inside is never seen: keep it zero

    @classmethod
    def create(
        cls, canvas: int, padding: int, start: Start = "grey", seed: int = 0, text: str = ""
    ) -> "VisualSafetyPrompt":
        """An untrained border.

        Args:
            canvas: height and width in pixels; the model's own (`lvlm.canvas`).
            padding: border width p in pixels; 1 <= p < canvas / 2.
            start: "grey", "white", or "random" (uniform noise from `seed`).
            text: safety text before the question.

        Raises:
            DavspError: the padding leaves no room for the picture.
        """
        return cls(start_values(start, canvas, seed), padding, text)

    def resize(self, images: list[Image.Image]) -> Float[Tensor, "b 3 s s"]:
        """Each picture padded to a square with white, resized (bicubic, antialiased) to s - 2p, centred; 0 around.

        White padding is the published rule; one resize by Pillow replaces its two, if `resizes` does not say otherwise.
        """
        p = self.padding
        interior = torch.zeros(len(images), 3, self.canvas, self.canvas)
        for row, image in enumerate(images):
            interior[row, :, p:-p, p:-p] = from_picture(self.inside(image))
        return interior

    def painter(self) -> Callable[[Image.Image], Image.Image]:
        """`image` without torch: the 8-bit border is made once, and each picture is pasted into a copy of it."""
        frame, corner = self.border(), (self.padding, self.padding)

        def paint(picture: Image.Image) -> Image.Image:
            canvas = frame.copy()
            canvas.paste(self.inside(picture), corner)
            return canvas

        return paint

    @property
    def resizes(self) -> int:
        """How often the picture is resized: once to its place; or, as in the authors' code, to the canvas and from there to its place."""
        return int(self.config.get("resizes", 1))

    def inside(self, image: Image.Image) -> Image.Image:
        """What stands inside the border: the picture padded to a square and resized."""
        inside, picture = self.canvas - 2 * self.padding, flatten(image)
        return squared(picture, inside) if self.resizes == 1 else sampled(squared(picture, self.canvas), inside)

    def apply(self, interior: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        """T: border from delta, inside from `interior`, bit for bit."""
        return self.mask.to(self.delta) * self.delta + interior

    @torch.no_grad()
    def project_(self) -> "VisualSafetyPrompt":
        """Clamp delta to [0, 1] in place: a border is a picture."""
        self.delta.clamp_(0, 1)
        return self

    def resized(self, canvas: int) -> "VisualSafetyPrompt":
        """The border on another canvas, its width scaled along; itself if that is the same. Zero-shot transfer (Table 3).

        Only what lies on the border is mixed (bilinear, antialiased), never the zeros of the inside.

        Raises:
            DavspError: the scaled border leaves no room for the picture.
        """
        if canvas == self.canvas:
            return self
        size = (canvas, canvas)
        pixels, weight = (
            torch.nn.functional.interpolate(x[None], size, mode="bilinear", antialias=True)[0]
            for x in (self.delta, self.mask.to(self.delta))
        )
        padding = max(1, round(self.padding * canvas / self.canvas))
        config = self.config | {"canvas": canvas, "padding": padding}
        return VisualSafetyPrompt((pixels / weight.clamp(min=1e-6)).clamp(0, 1), padding, self.text, config)

    def border(self) -> Image.Image:
        """The border as an 8-bit picture, mid grey inside."""
        grey = (1 - self.mask).expand(3, -1, -1) * (128 / 255)
        return Image.fromarray(to_bytes(self.delta.cpu() + grey))

    # -- at rest ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `vsp_config.json`, `vsp.safetensors`, `vsp.png` and the card; `canaries.json`, `gate.json` and `gate_served.json` if it
        has them. All or nothing.

        What is saved is the 8-bit border (float32 k/255), so that tensor and picture are the same prompt. The picture's PNG
        text says how wide the border is and which text goes with it: it alone is enough to defend (docs/prompt.md).

        Raises:
            DavspError: delta is not in [0, 1], or the folder can't be written.
        """
        contents = self._contents()
        write_all(folder, contents)
        for name in BESIDE - contents.keys():
            (Path(folder) / name).unlink(missing_ok=True)  # of the border that was there

    def _contents(self, source: str = "this folder or repository") -> dict[str, bytes]:
        """The files; the configuration last, as it seals the others by their hashes."""
        from safetensors.torch import save

        check_range(self.delta, 0, 1, "this prompt")
        at_rest = self.quantised()
        valid = BorderConfig.model_validate(self.config | {"safety_text": self.text})
        if valid.measured and valid.measured.pixels != self.pixels_sha256():
            valid.measured = None  # figures of the prompt that this one was trained from
        config = valid.model_dump()
        buffer, png_text = io.BytesIO(), PngInfo()
        for name, value in self._png_text().items():
            png_text.add_itxt(name, value)
        at_rest.border().save(buffer, format="PNG", pnginfo=png_text)
        contents = {TENSORS: save({"delta": at_rest.delta.cpu().contiguous()}), PICTURE: buffer.getvalue()}
        gate = self.gate if self.gate and self.gate.belong(self) else None  # not of one it was trained from
        served = self.served if self.served and self.served.belong(self) else None
        contents[CARD] = card(sealed(config, contents), source, gate, served).encode()
        seal = {CONFIG: to_json(sealed(config, contents)).encode()}
        canaries = self.canaries if self.canaries and self.canaries.belong(self) else None
        beside = {CANARIES: canaries, GATE: gate, SERVED: served}
        return contents | {name: own.contents() for name, own in beside.items() if own} | seal

    def _png_text(self) -> dict[str, str]:
        """What the picture says of itself, so that it can do without the other files."""
        texts = {"safety_text": self.text, "separator": self.separator, "suffix": self.suffix}
        return {"padding": str(self.padding), **texts, **({} if self.resizes == 1 else {"resizes": str(self.resizes)})}

    def measured(self, run: str | Path) -> "VisualSafetyPrompt":
        """The same prompt whose configuration and card carry the figures of a run that measured it.

        Raises:
            DavspError: the run is not finished, or measured another prompt.
        """
        figures = measurement(run, self.pixels_sha256(), self.text)
        other = self.with_delta(self.delta)
        other.config["measured"] = figures.model_dump()
        return other

    def push_to_hub(self, repo_id: str, *, license: str | None = None, token: str | None = None, **options: Any) -> str:
        """Upload the files to the hub: the four of the prompt, its canaries and its gate.

        Args:
            repo_id: USER/NAME; made if it is not there.
            license: under which the border is given to others, as the hub knows it ("apache-2.0"); None: that of the
                configuration.
            token: None: the one that `hf auth login` left.
            options: private, revision (a branch; made if it is not there), commit_message.

        Returns:
            The commit's address. Its hash is what to give as `revision` when loading.

        Raises:
            DavspError: no licence was named, or the hub refused; nothing was uploaded then.
        """
        from davsp.prompts.hub import push

        if (license := license or self.config.get("license")) is None:
            raise DavspError("the prompt names no licence to publish it under: give license='apache-2.0' or another")
        licensed = self.with_delta(self.delta)
        licensed.config["license"] = license
        if model_id := self.config.get("model_id"):  # a path on this machine is nobody else's business
            licensed.config["model_id"] = hub_name(model_id) or folder_name(model_id)
        contents = licensed._contents(repo_id)
        return push(repo_id, contents, token, gone=sorted(BESIDE - contents.keys()), **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> "VisualSafetyPrompt":
        """Load a prompt from a folder or from the hub.

        Args:
            source: a folder, or a hub id, behind which "@" and a revision may stand.
            revision: hub branch, tag or commit. With HF_HUB_OFFLINE=1 what an earlier load left in the cache is used.

        Raises:
            DavspError: a file is missing or broken; an unknown field; a tensor of another shape, with NaN or outside
                [0, 1]; a picture that is not the tensor's; a file that is not the one that was saved; canaries or a gate of another border.
        """
        folder = fetch(source, revision, [CONFIG, TENSORS, PICTURE, CARD, *sorted(BESIDE)])
        if not (folder / CONFIG).exists() and ((folder / GATE).exists() or (folder / SERVED).exists()):
            raise DavspError(f"{folder} holds a gate without a border; give the folder of a border")
        config = read_config(folder / CONFIG, BorderConfig)
        delta = read_delta(folder / TENSORS, config.canvas)
        check_range(delta, 0, 1, str(folder / TENSORS))
        prompt = cls(delta, config.padding, config.safety_text, config.model_dump(exclude={"files"}))
        if config.measured and config.measured.pixels != prompt.pixels_sha256():
            raise DavspError(f"{folder / CONFIG}: field 'measured.pixels' is of another border; remove 'measured'")
        prompt._check_picture(folder / PICTURE)
        check_files(folder, config.files, free=[CARD])  # last: what is wrong inside a file says more than its hash
        if (folder / CANARIES).exists():
            prompt.canaries = read_canaries(folder / CANARIES, prompt, prompt.canvas - 2 * prompt.padding)
        if (folder / GATE).exists():
            prompt.gate = Calibration.read(folder / GATE, prompt)
        if (folder / SERVED).exists():
            prompt.served = Served.read(folder / SERVED, prompt)
        return prompt

    def _check_picture(self, path: Path) -> None:
        width, height = picture_size(path)  # before a picture that may be huge is decoded
        if (width, height) != (self.canvas, self.canvas):
            raise DavspError(f"{path} is {width}x{height}, not {self.canvas}x{self.canvas}; save anew")
        picture = open_picture(path)
        if not torch.equal(from_picture(picture) * self.mask, self.delta):
            raise DavspError(f"{path} shows another border than {path.with_name(TENSORS)}; save the prompt anew")
        with Image.open(path) as file:
            png_text: Mapping[str, str] = getattr(file, "text", {})
        other = next((name for name, value in self._png_text().items() if png_text.get(name, value) != value), None)
        if other is not None:
            raise DavspError(
                f"{path}: its text '{other}' is not that of {path.with_name(CONFIG)}; save the prompt anew"
            )


def check_padding(padding: int, canvas: int) -> None:
    """Raises DavspError if a border of this width leaves no room for the picture."""
    if padding < 1 or 2 * padding >= canvas:
        raise DavspError(
            f"padding {padding} leaves no room on a canvas of {canvas} pixels: "
            f"it must be at least 1 and less than {(canvas + 1) // 2}"
        )


def border_mask(canvas: int, padding: int) -> Float[Tensor, "1 s s"]:
    """m: 1 on the border, 0 where the picture stands."""
    mask = torch.ones(1, canvas, canvas)
    mask[:, padding:-padding, padding:-padding] = 0
    return mask


def squared(picture: Image.Image, size: int) -> Image.Image:
    """The picture padded to a square and resized, at the cost of its own rows: Pillow resizes each row before it mixes rows, and a
    white one stays white, so what is put above and below a wide picture need not go through the first step.
    """
    width = side = max(picture.size)
    if picture.height < side:
        width = size
        picture = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
    return pad(picture, width, side).resize((size, size), Image.Resampling.BICUBIC)


def sampled(square: Image.Image, size: int) -> Image.Image:
    """A square picture made smaller as torchvision 0.16 resizes a tensor: bilinear between pixel centres, without antialiasing.

    The authors keep floats; here it is rounded to 8 bit, at most half a level.
    """
    levels = np.asarray(square, dtype=np.float32)
    at = ((np.arange(size) + 0.5) * (len(levels) / size) - 0.5).clip(0, len(levels) - 1)
    low = at.astype(int)
    high, part = (low + 1).clip(max=len(levels) - 1), (at - low).astype(np.float32)[:, None]
    rows = levels[low] * (1 - part[..., None]) + levels[high] * part[..., None]
    return Image.fromarray(np.rint(rows[:, low] * (1 - part) + rows[:, high] * part).astype(np.uint8))


def pad_to_square(picture: Image.Image) -> Image.Image:
    """The picture in the middle of the smallest white square that holds it."""
    side = max(picture.size)
    return pad(picture, side, side)


def pad(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture in the middle of a white one of at least its size."""
    if picture.size == (width, height):
        return picture
    white = Image.new("RGB", (width, height), "white")
    white.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return white


def hub_name(model_id: str | None) -> str | None:
    """A model's name if the hub can know it; None for a folder, whose path it refuses as a base_model."""
    if model_id is None or Path(model_id).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_id):
        return None
    return model_id


def folder_name(path: str) -> str:
    """The last part of a path, as Windows or others write it."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def card(
    config: dict[str, Any],
    source: str = "this folder or repository",
    gate: Calibration | None = None,
    served: Served | None = None,
) -> str:
    """The README of a saved prompt, from its configuration and its gates; `source` is where the reader is to load it from."""
    template = (Path(__file__).parent / "card.md.j2").read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["with_interval"] = with_interval
    model_id = config["model_id"]
    base_model = hub_name(model_id)
    shown = base_model or (model_id and f"{folder_name(model_id)} (a folder)")
    shown = shown or " and ".join(config.get("data", {}).get("models", []))  # of a border of several
    facts = config | {"model_id": shown}
    return environment.from_string(template).render(
        facts, source=source, gate=gate, served=served, base_model=base_model
    )
