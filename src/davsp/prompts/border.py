"""The visual safety prompt: a trainable border around the untouched picture."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from jinja2 import Environment, StrictUndefined
from PIL import Image
from torch import Tensor

from davsp.errors import DavspError
from davsp.files import to_json, write_all
from davsp.prompts.base import (
    Prompt,
    PromptConfig,
    Start,
    check_range,
    from_picture,
    read_config,
    read_delta,
    start_values,
    to_bytes,
)

CONFIG, TENSORS, PICTURE, CARD = "vsp_config.json", "vsp.safetensors", "vsp.png", "README.md"


class BorderConfig(PromptConfig):
    """The fields of `vsp_config.json`."""

    padding: int


class VisualSafetyPrompt(Prompt):
    """T(x, delta) = m * delta + Resize(x): delta in [0, 1] on a border of `padding` pixels, zero inside.

    Source: the paper's equation of T; p = 30 on a 336-pixel canvas there.
    """

    kind = "border"

    def __init__(
        self, delta: Float[Tensor, "3 s s"], padding: int, text: str = "", config: dict[str, Any] | None = None
    ):
        canvas = delta.shape[-1]
        if padding < 1 or 2 * padding >= canvas:
            raise DavspError(
                f"padding {padding} leaves no room on a canvas of {canvas} pixels: "
                f"it must be at least 1 and less than {(canvas + 1) // 2}"
            )
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

        White padding is the published rule; one resize by Pillow replaces its two.
        """
        p = self.padding
        interior = torch.zeros(len(images), 3, self.canvas, self.canvas)
        for row, image in enumerate(images):
            interior[row, :, p:-p, p:-p] = from_picture(self._inside(image))
        return interior

    def painter(self) -> Callable[[Image.Image], Image.Image]:
        """`image` without torch: the 8-bit border is made once, and each picture is pasted into a copy of it."""
        frame, corner = self.border(), (self.padding, self.padding)

        def paint(picture: Image.Image) -> Image.Image:
            canvas = frame.copy()
            canvas.paste(self._inside(picture), corner)
            return canvas

        return paint

    def _inside(self, image: Image.Image) -> Image.Image:
        inside = self.canvas - 2 * self.padding
        return pad_to_square(image.convert("RGB")).resize((inside, inside), Image.Resampling.BICUBIC)

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
        """Write `vsp_config.json`, `vsp.safetensors`, `vsp.png` and the card; all or nothing.

        What is saved is the 8-bit border (float32 k/255), so that tensor and picture are the same prompt.

        Raises:
            DavspError: delta is not in [0, 1], or the folder can't be written.
        """
        from safetensors.torch import save

        check_range(self.delta, 0, 1, "this prompt")
        at_rest = self.quantised()
        config = BorderConfig.model_validate(self.config | {"safety_text": self.text}).model_dump()
        buffer = io.BytesIO()
        at_rest.border().save(buffer, format="PNG")
        contents = {
            TENSORS: save({"delta": at_rest.delta.cpu().contiguous()}),
            PICTURE: buffer.getvalue(),
            CARD: card(config).encode(),
            CONFIG: to_json(config).encode(),
        }
        write_all(folder, contents)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the folder to the hub; `options` go to `upload_folder`. Returns the commit's address."""
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi(token=options.pop("token", None))
        api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> "VisualSafetyPrompt":
        """Load a prompt from a folder or from the hub.

        Raises:
            DavspError: a file is missing or broken; an unknown field; a tensor of another shape, with NaN or outside
                [0, 1]; a picture that is not the tensor's.
        """
        folder = Path(source) if Path(source).is_dir() else _download(str(source), revision)
        config = read_config(folder / CONFIG, BorderConfig)
        delta = read_delta(folder / TENSORS, config.canvas)
        check_range(delta, 0, 1, str(folder / TENSORS))
        prompt = cls(delta, config.padding, config.safety_text, config.model_dump())
        prompt._check_picture(folder / PICTURE)
        return prompt

    def _check_picture(self, path: Path) -> None:
        from davsp.query import open_picture

        picture = open_picture(path)
        if picture.size != (self.canvas, self.canvas):
            raise DavspError(f"{path} is {picture.width}x{picture.height}, not {self.canvas}x{self.canvas}; save anew")
        if not torch.equal(from_picture(picture) * self.mask, self.delta):
            raise DavspError(f"{path} shows another border than {path.with_name(TENSORS)}; save the prompt anew")


def border_mask(canvas: int, padding: int) -> Float[Tensor, "1 s s"]:
    """m: 1 on the border, 0 where the picture stands."""
    mask = torch.ones(1, canvas, canvas)
    mask[:, padding:-padding, padding:-padding] = 0
    return mask


def pad_to_square(picture: Image.Image) -> Image.Image:
    """The picture in the middle of the smallest white square that holds it."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def card(config: dict[str, Any]) -> str:
    """The README of a saved prompt, from its configuration."""
    template = (Path(__file__).parent / "card.md.j2").read_text(encoding="utf-8")
    return (
        Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
        .from_string(template)
        .render(config)
    )


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[CONFIG, TENSORS, PICTURE, CARD]))
    except Exception as error:  # the hub client raises many kinds: bad name, not found, no network, no access
        raise DavspError(
            f"no prompt at {repo_id}: it is neither a folder nor reachable on the hub ({error})"
        ) from error
