"""Pictures drawn anew without any search, as somebody would who has seen the frame once: each is one try."""

import io
from collections.abc import Callable

from PIL import Image, ImageFilter, ImageOps

from davsp.prompts import Prompt, VisualSafetyPrompt

Redraw = Callable[[Image.Image, Prompt | None], Image.Image]


def white_frame(picture: Image.Image) -> Image.Image:
    """In the middle of a white field of twice its sides."""
    field = Image.new("RGB", (2 * picture.width, 2 * picture.height), "white")
    field.paste(picture, (picture.width // 2, picture.height // 2))
    return field


def counter_frame(picture: Image.Image, prompt: Prompt | None) -> Image.Image:
    """In a frame of the defender's border with its colours turned round, as if to cancel it; without a border a black one."""
    if not isinstance(prompt, VisualSafetyPrompt):
        return ImageOps.expand(picture, max(1, min(picture.size) // 8), "black")
    frame = ImageOps.invert(prompt.border())
    inside = frame.width - 2 * prompt.padding
    frame.paste(picture.resize((inside, inside), Image.Resampling.BICUBIC), (prompt.padding, prompt.padding))
    return frame


def jpeg(picture: Image.Image) -> Image.Image:
    """As a small JPEG file leaves it."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=20)
    return Image.open(buffer).convert("RGB")


REDRAWS: dict[str, Redraw] = {
    "counter-frame": counter_frame,
    "white-frame": lambda picture, _: white_frame(picture),
    "wide": lambda picture, _: ImageOps.expand(picture, (picture.width // 2, 0), "white"),
    "turned": lambda picture, _: picture.transpose(Image.Transpose.ROTATE_90),
    "inverted": lambda picture, _: ImageOps.invert(picture),
    "faint": lambda picture, _: Image.blend(Image.new("RGB", picture.size, "white"), picture, 0.4),
    "blurred": lambda picture, _: picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 150)),
    "jpeg": lambda picture, _: jpeg(picture),
}
"""Name -> how a picture (RGB) is drawn anew, with the defender's visual prompt at hand."""
