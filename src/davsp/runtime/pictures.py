"""Pictures as they go to a server: lossless PNG in a data URL. And what tells two of them apart."""

import base64
import io
from hashlib import sha256

from PIL import Image


def png(image: Image.Image) -> bytes:
    """A picture as PNG of its own size, no pixel changed."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(picture: bytes) -> str:
    """A PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def part(picture: bytes) -> dict[str, object]:
    """A PNG as one part of a message of OpenAI's protocol."""
    return {"type": "image_url", "image_url": {"url": data_url(picture)}}


def pixels_hash(image: Image.Image) -> str:
    """A hash of a picture's mode, size and pixels, however its file has them."""
    return sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()
