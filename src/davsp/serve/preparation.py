"""What is sent on for a request: its bytes in, a defended body out. All of it runs in threads."""

import json
import re
import secrets
from contextlib import closing
from itertools import chain
from typing import Any

from PIL import Image

from davsp.defenses import Defense
from davsp.serve import calls, fields
from davsp.serve.bodies import Body, parse
from davsp.serve.pictures import Budget, decoded, from_data_url, url_bytes
from davsp.serve.protocols import Protocol
from davsp.serve.refusals import Refusal, bad
from davsp.serve.settings import ServeSettings
from davsp.serve.sweep import sweep


class Preparation:
    """One defense's work on requests.

    Attributes:
        once: whether the defense asks the model once, so that what is sent on is all there is to do.
        suffix: what the names of the upstream's models carry here.
        budget: of the pixels that are decoded at a time.
    """

    def __init__(self, defense: Defense, settings: ServeSettings, suffix: str) -> None:
        self.defense, self.settings, self.suffix = defense, settings, suffix
        self.once, self.budget = calls.asks_once(defense), Budget(settings.max_decoding)

    def read(self, protocol: Protocol, data: bytearray, paints: bool) -> tuple[Body | None, list[str], list[bytes]]:
        """A request's pictures' addresses and what is sent on, or, if there is more to do before, the request; runs in a thread.

        Args:
            data: the bytes; the body's pictures are views of them, so both are let go together.
            paints: whether this thread may do so; texts wait for the others.
        """
        body = parse(data, self.settings)
        urls = protocol.picture_urls(protocol.check(body.value))
        fields.check(body.value, self.settings.allow_fields, protocol.known)
        body.value["model"] = self._plain(body.value.get("model"))
        if len(urls) > self.settings.max_images:
            most = self.settings.max_images
            raise bad(f"the request holds {len(urls)} pictures, at most {most}.", "too_many_pictures")
        ready = (self.once or self.idle(urls)) and (paints or not urls) and not elsewhere(urls, body)
        return (None, urls, self.defended(protocol, body, urls, {})) if ready else (body, urls, [])

    def idle(self, urls: list[str]) -> bool:
        """Whether a request is sent on as it came."""
        return not urls and self.settings.image_free == "pass"

    def files(self, urls: list[str], body: Body, fetched: dict[str, bytes]) -> list[bytes]:
        """The pictures' files. Raises Refusal: a data URL that is none, or too large."""
        most = self.settings.max_picture_bytes
        return [fetched[url] if url in fetched else from_data_url(url, most, body.pictures) for url in urls]

    def defended(
        self, protocol: Protocol, body: Body, urls: list[str], fetched: dict[str, bytes], defense: Defense | None = None
    ) -> list[bytes]:
        """What is sent on, in one piece; runs in a thread, where Pillow, zlib and base64 leave the interpreter free.

        Args:
            defense: that the conversation is put under; None: the proxy's own.
        """
        place = secrets.token_hex()  # in a canvas' stead; no client can know it
        conversation, canvases = body.value[protocol.conversation], list[bytes]()

        def send(picture: Image.Image) -> str:
            canvases.append(url_bytes(picture))
            return place

        with closing(decoded(self.files(urls, body, fetched), self.settings, self.budget)) as pictures:
            if not self.idle(urls):
                conversation = protocol.defended(defense or self.defense, conversation, pictures, send)
        leaving = body.value | {protocol.conversation: conversation}
        sweep(leaving, {place}, self.settings.max_values)
        try:
            text = json.dumps(leaving, allow_nan=False).encode()
        except ValueError as error:
            raise bad("the body holds a number that JSON has no word for.") from error
        return [_filled(text, place.encode(), canvases)]

    def _plain(self, name: Any) -> str:
        """The upstream's own name of a model."""
        if not isinstance(name, str) or not name:
            raise bad("model must be a text.", param="model")
        plain = name.removesuffix(self.suffix)
        if plain != name or (self.settings.plain_names and not re.search(r"\+davsp-[0-9a-f]{12}$", name)):
            return plain
        mend = re.sub(r"\+davsp-[0-9a-f]{12}$", "", name) + self.suffix
        raise Refusal(
            404, f"model {name!r} is not served; under this defense it is {mend!r}.", "model_not_found", "model"
        )


def elsewhere(urls: list[str], body: Body) -> list[str]:
    """The addresses of pictures that did not come with the request, each once."""
    return [url for url in dict.fromkeys(urls) if url not in body.pictures and url[:5].lower() != "data:"]


def _filled(text: bytes, place: bytes, urls: list[bytes]) -> bytes:
    """JSON with each picture in its place: the encoder, which looks at each letter, would take a tenth of a request's time."""
    first, *rest = text.split(place)
    return b"".join([first, *chain.from_iterable(zip(urls, rest, strict=True))])
