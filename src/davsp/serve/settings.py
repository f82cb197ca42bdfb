"""The proxy's settings."""

import os
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from davsp.errors import DavspError, refused_as
from davsp.runtime import keys
from davsp.runtime.loopback import is_loopback
from davsp.runtime.thought import TAGS
from davsp.serve.fields import ELSEWHERE, never

MIB = 2**20


class ServeSettings(BaseModel):
    """The options of `davsp serve`; an unknown field is refused.

    Attributes:
        upstream: the server's address, up to and with `/v1`.
        model: as the upstream calls it, for what the proxy itself asks; None: the first that it lists.
        canvas: side in pixels at which the upstream's model sees a picture without resampling; visual prompts need it.
        api_key_env: environment variable with the upstream's key.
        token_env: environment variable with the token that clients must bring.
        allow_hosts: HOST or HOST:PORT from which pictures may be fetched, by https; none by default.
        image_free: a request without any picture: `defend` puts the defense's text at its questions, `pass` leaves it alone.
        trust_env: reach the upstream through the proxies that the environment names; otherwise directly.
        allow_fields: of a request, besides those that are known to be harmless (`davsp.serve.fields`).
        plain_names: take the upstream's own model names besides those that carry the defense's hash.
        max_body: bytes of a request.
        max_text: bytes of a request besides its pictures in base64.
        max_values: of its JSON: objects, lists, texts, numbers; JSON inside texts counts.
        max_images: pictures of a request, over all messages.
        max_picture_bytes: of one picture as a file.
        max_pixels: of the smallest square that holds the picture, as that is what a border pads it to.
        max_request_pixels: of all pictures of a request together.
        max_aspect: longer side over shorter one.
        workers: processes.
        concurrency: requests under way in each worker; one more gets a 429.
        threads: pictures that each worker decodes and defends at a time; by default one a core of all workers together.
        max_held: bytes of requests, defended ones included, that each worker holds; one that does not fit gets a 429.
        max_decoding: bytes of pixels that each worker's decoding takes at a time; what does not fit waits, and the largest are decoded alone.
        body_timeout, fetch_timeout, connect_timeout, upstream_timeout: seconds; the last one is the longest silence.
        require_effect: never ready without an effect of the border that was seen at the upstream.
        ready_seconds: for which what /ready saw there holds, before the upstream is asked again.
        reasoning_tags: around what the upstream's model thinks, which a gate does not take for an answer.
        max_new_tokens: of defenses that ask more than once, where the client says nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    upstream: str
    model: str | None = None
    canvas: int | None = Field(None, ge=1)
    host: str = "127.0.0.1"
    port: int = Field(8100, ge=0, le=65535)
    api_key_env: str | None = None
    token_env: str | None = None
    allow_hosts: tuple[str, ...] = ()
    image_free: Literal["defend", "pass"] = "defend"
    trust_env: bool = False
    allow_fields: tuple[str, ...] = ()
    plain_names: bool = False
    max_body: int = Field(32 * MIB, ge=1)
    max_text: int = Field(4 * MIB, ge=1)
    max_values: int = Field(100_000, ge=1)
    max_images: int = Field(8, ge=0)
    max_picture_bytes: int = Field(16 * MIB, ge=1)
    max_pixels: int = Field(36_000_000, ge=1, le=Image.MAX_IMAGE_PIXELS or 0)
    max_request_pixels: int = Field(144_000_000, ge=1)
    max_aspect: float = Field(50, ge=1)
    concurrency: int = Field(128, ge=1)
    workers: int = Field(1, ge=1)
    threads: int = Field(default_factory=lambda values: max(1, (os.cpu_count() or 1) // values.get("workers", 1)), ge=1)
    max_held: int = Field(256 * MIB, ge=1)
    max_decoding: int = Field(256 * MIB, ge=1)
    body_timeout: float = Field(30, gt=0)
    fetch_timeout: float = Field(10, gt=0)
    connect_timeout: float = Field(10, gt=0)
    upstream_timeout: float = Field(600, gt=0)
    require_effect: bool = False
    ready_seconds: float = Field(60, ge=1)
    reasoning_tags: tuple[tuple[str, str], ...] = tuple(TAGS)
    max_new_tokens: int = Field(1024, ge=1)

    @classmethod
    def of(cls, **values: Any) -> "ServeSettings":
        """The settings; those that are None are left at their defaults.

        Raises:
            DavspError: a value is wrong; a key or token is missing; an address beyond loopback without a token.
        """
        with refused_as(lambda field, why, _: f"--{field.replace('_', '-')}: {why.lower()}; correct it."):
            settings = cls(**{name: value for name, value in values.items() if value is not None})
        for name in (name for name in settings.allow_fields if never(name) or name in ELSEWHERE):
            raise DavspError(f"--allow-field {name} would let a picture or a template pass undefended; leave it out.")
        keys.read(settings.api_key_env, "upstream")
        if settings.token is None and not settings.loopback:
            raise DavspError(
                f"--host {settings.host} can be reached from elsewhere; give --token-env, the environment variable with the "
                "token that clients must bring, or stay at 127.0.0.1."
            )
        return settings

    @property
    def token(self) -> str | None:
        """What clients must bring; None: nothing."""
        return keys.read(self.token_env, "proxy")

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches `host`."""
        return is_loopback(self.host)
