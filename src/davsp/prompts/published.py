"""Other people's files of torch.save, measured and brought into our forms: DAVSP's border and UniGuard's noise.

The border is what `train/optimize.py` of zhangyitonggg/DAVSP writes every 50 steps (`noise-1200.pt`); no such file is in any of its
commits, so who has one has trained it. It is float16 in the space after the image processor's normalisation, and was never clamped there,
so that some of its values may be darker than black or whiter than white. `displayable` clamps them and is a prompt like any other;
`exact` keeps them, for replication, and is no picture.

UniGuard's noise is what `image_safety_patch.py` of donghyunkm/LLaVAGuard writes: float32 in pixel units, white = 1, added to the picture
before normalisation. Names of files that circulate say a bound; here it is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from davsp.errors import DavspError
from davsp.prompts.additive import AdditiveNoise
from davsp.prompts.base import check_files, read_delta, sealed
from davsp.prompts.border import CONFIG, BorderConfig, VisualSafetyPrompt
from davsp.prompts.border import TENSORS as CLAMPED
from davsp.runtime.config import read_config
from davsp.runtime.files import read_torch, sha256, to_json, write_all

TENSORS = "exact.safetensors"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Overshoot:
    """How far the border values of a channel (or of all) lie outside [0, 1], in grey levels of 255."""

    channel: str
    values: int
    outside: int
    largest: float
    mean: float  # over the values that are outside; 0 if none is

    @property
    def share(self) -> float:
        """Part of the border values that are outside."""
        return self.outside / self.values

    def figures(self) -> dict[str, float]:
        """As they stand in a prompt's config."""
        facts = {"values": self.values, "outside": self.outside, "outside_share": self.share}
        facts |= {"overshoot_max_levels": self.largest, "overshoot_mean_levels": self.mean}
        return {f"published_{self.channel}_{name}": value for name, value in facts.items()}


def import_published(
    path: str | Path, padding: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> tuple[Float[Tensor, "3 s s"], list[Overshoot]]:
    """Read a border of the authors' code and bring it into display space by x * std + mean; nothing is clamped.

    Args:
        path: a file of torch.save that holds one tensor (1, 3, s, s) or (3, s, s), zero where the picture stands. It
            is read with `weights_only`, so that no code in it is run.
        padding: border width p in pixels, 30 as published; checked against the tensor's zeros.
        mean, std: of the model's image processor, by channel; CLIP's, as LLaVA has them.

    Returns:
        delta (3, s, s), float32, zero inside, and the overshoot of the channels red, green, blue and of all together.

    Raises:
        DavspError: the file holds something else, NaN or infinity, or a border of another width.
    """
    noise = _read(Path(path), "a border", "the noise-*.pt of the authors' training script")
    border = _border(noise, padding, Path(path))
    scale, shift = (torch.tensor(x, dtype=torch.float32).view(3, 1, 1) for x in (std, mean))
    delta = torch.where(border, noise * scale + shift, 0)
    channels = [_overshoot(name, delta[i, border]) for i, name in enumerate(("red", "green", "blue"))]
    return delta, [*channels, _overshoot("all", delta[:, border])]


def published_prompt(
    path: str | Path,
    padding: int,
    form: str = "displayable",
    model_id: str | None = None,
    text: str = "",
    layer: int | None = None,
) -> tuple[VisualSafetyPrompt, list[Overshoot]]:
    """A border of the authors' code as a prompt, clamped ("displayable") or as it is ("exact"), and its overshoot.

    Args:
        path, padding: as for `import_published`.
        form: "displayable" or "exact".
        model_id, text, layer: what the file does not say, for the prompt's config.

    Raises:
        DavspError: an unknown form; else as `import_published`.
    """
    if form not in ("displayable", "exact"):
        raise DavspError(f"--form is displayable or exact, not {form!r}.")
    delta, overshoot = import_published(path, padding)
    figures = {name: value for row in overshoot for name, value in row.figures().items()}
    config = {"model_id": model_id, "layer": layer, "figures": figures, "data": {"published": sha256(path)}}
    if form == "exact":
        return ExactBorder(delta, padding, text, config), overshoot
    return VisualSafetyPrompt(delta, padding, text, config).project_(), overshoot


def save_published(prompt: VisualSafetyPrompt, folder: str | Path) -> None:
    """Save what `published_prompt` made.

    Raises:
        DavspError: the other form is there already, so that the folder would be of neither; or as `save_pretrained`.
    """
    other = CLAMPED if isinstance(prompt, ExactBorder) else TENSORS
    if (Path(folder) / other).exists():
        raise DavspError(f"{folder} already holds {other}, the border in its other form; choose another folder.")
    prompt.save_pretrained(folder)


@dataclass(frozen=True)
class NoiseRange:
    """The values of somebody's noise, in grey levels of 255, and the part of them below zero."""

    lowest: float
    highest: float
    below_zero: float

    @property
    def bound(self) -> float:
        """The largest magnitude."""
        return max(-self.lowest, self.highest)

    def figures(self) -> dict[str, float]:
        """As they stand in a prompt's config."""
        facts = {"bound_levels": self.bound, "lowest_levels": self.lowest, "highest_levels": self.highest}
        return {f"published_{name}": value for name, value in (facts | {"below_zero_share": self.below_zero}).items()}


def published_noise(path: str | Path, model_id: str | None = None) -> tuple[AdditiveNoise, NoiseRange]:
    """UniGuard's noise as a prompt whose eps is the largest value in the file, and the range of its values.

    Args:
        path: a file of torch.save that holds one tensor (3, s, s) or (1, 3, s, s) in pixel units; read with `weights_only`.
        model_id: what the file does not say, for the prompt's config.

    Raises:
        DavspError: the file holds something else, NaN or infinity, a border, only zeros, or values beyond 1.
    """
    delta = _read(Path(path), "noise", "the safety_patch*.pt of UniGuard's training script")
    _, width = _width(delta)
    if width == 0:
        raise DavspError(f"{path} holds only zeros, which is no noise; download it anew.")
    if 2 * width < delta.shape[-1]:
        raise DavspError(
            f"{path} is zero where the picture stands inside a border of {width} pixels: it is a border, not noise; "
            "give --kind border."
        )
    seen = NoiseRange(float(255 * delta.min()), float(255 * delta.max()), float((delta < 0).double().mean()))
    eps = float(delta.abs().max())
    if eps > 1:
        raise DavspError(
            f"{path} has values up to {eps:.4g}, where white is 1, so they are not in pixel units; UniGuard's noise is "
            "saved before normalisation."
        )
    config = {"model_id": model_id, "figures": seen.figures(), "data": {"published": sha256(path)}}
    return AdditiveNoise(delta, eps, config=config), seen


class ExactBorder(VisualSafetyPrompt):
    """A border whose values may be any finite float: it can be trained on and fed to a model, but is no picture."""

    kind = "exact"

    @torch.no_grad()
    def project_(self) -> "ExactBorder":
        """Nothing is clamped, as in the published code."""
        return self

    def image(self, picture: Image.Image) -> Image.Image:
        """Refused: see `apply` for the canvas as floats."""
        self._refuse()

    def border(self) -> Image.Image:
        """Refused, as `image`."""
        self._refuse()

    def quantised(self) -> "ExactBorder":
        """Refused, as `image`; so nothing that measures 8-bit canvases takes this prompt."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise DavspError(
            "an exact border has values that no 8-bit picture can hold: to show, serve or evaluate it as one, "
            "import it with `davsp import-published --form displayable`."
        )

    # -- at rest ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `vsp_config.json` and `exact.safetensors` (float32 in display space, not clamped); all or nothing.

        Raises:
            DavspError: delta holds NaN or infinity, or the folder can't be written.
        """
        from safetensors.torch import save

        _check_finite(self.delta, "this prompt")
        config = BorderConfig.model_validate(self.config | {"safety_text": self.text}).model_dump()
        contents = {TENSORS: save({"delta": self.delta.detach().cpu().float().contiguous()})}
        write_all(folder, contents | {CONFIG: to_json(sealed(config, contents)).encode()})

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> "ExactBorder":
        """Load what `save_pretrained` wrote; from a folder only.

        Raises:
            DavspError: a file is missing or broken; an unknown field; a tensor of another shape, with NaN or infinity.
        """
        folder = Path(source)
        config = read_config(folder / CONFIG, BorderConfig)
        delta = read_delta(folder / TENSORS, config.canvas)
        _check_finite(delta, str(folder / TENSORS))
        check_files(folder, config.files)
        return cls(delta, config.padding, config.safety_text, config.model_dump(exclude={"files"}))


def _read(path: Path, what: str, wanted: str) -> Float[Tensor, "3 s s"]:
    """The tensor in the file, float32."""
    noise = read_torch(path, wanted)
    if not isinstance(noise, Tensor):
        raise DavspError(f"{path} holds a {type(noise).__name__}, not one tensor, so it is not {what}; give {wanted}.")
    shape, side = tuple(noise.shape), noise.shape[-1] if noise.dim() else 0
    dense = noise.layout == torch.strided and noise.is_floating_point()
    if not dense or side == 0 or shape not in ((1, 3, side, side), (3, side, side)):
        raise DavspError(
            f"{path} holds a tensor of shape {shape} and type {noise.dtype}; {what} is dense floats of shape "
            f"(1, 3, s, s) or (3, s, s); give {wanted}."
        )
    noise = noise.detach().float().reshape(3, side, side)
    _check_finite(noise, str(path), what)
    return noise


def _check_finite(delta: Float[Tensor, "3 s s"], place: str, what: str = "a border") -> None:
    if not bool(delta.isfinite().all()):
        raise DavspError(f"{place} holds NaN or infinity, so it is not {what}; train or download it anew.")


def _border(noise: Float[Tensor, "3 s s"], padding: int, path: Path) -> Bool[Tensor, "s s"]:
    """Where the border is; DavspError unless its values reach just `padding` pixels in and all within is zero."""
    depth, width = _width(noise)
    if width == 0:
        raise DavspError(f"{path} holds only zeros: it is a border before its first step; give a trained one.")
    if 2 * width >= len(depth):
        raise DavspError(
            f"{path} has values up to its middle, where the picture stands; a published border is zero there. UniGuard's "
            "noise, which lies on the whole picture, is imported with --kind uniguard."
        )
    if width > padding:
        raise DavspError(
            f"{path} is not zero inside a border of {padding} pixels, its values reach {width} pixels in; "
            f"give --padding {width} if its border is that wide."
        )
    if width < padding:
        raise DavspError(f"{path} holds a border of {width} pixels, not of {padding}; give --padding {width}.")
    return depth < padding


def _width(noise: Float[Tensor, "3 s s"]) -> tuple[Int[Tensor, "s s"], int]:
    """How many pixels each pixel is from the nearest edge, and how many in the values reach; 0: all are zero."""
    along = torch.arange(noise.shape[-1])
    along = torch.minimum(along, along.flip(0))
    depth = torch.minimum(along[:, None], along)
    return depth, int(((depth + 1) * (noise != 0).any(0)).max())


def _overshoot(channel: str, values: Float[Tensor, "..."]) -> Overshoot:
    beyond = 255 * torch.where(values > 1, values - 1, -values).clamp(min=0)
    outside = beyond[beyond > 0]
    largest, mean = (float(outside.max()), float(outside.double().mean())) if len(outside) else (0.0, 0.0)
    return Overshoot(channel, values.numel(), len(outside), largest, mean)
