"""Upstreams that do something to a request on its way to a model: what canaries must notice."""

import asyncio
import io
import json
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from davsp import LVLM, Query, VisualSafetyPrompt
from davsp.defenses import VisualPrompt
from davsp.judges.keyword import keyword
from davsp.judges.verdicts import judge_name
from davsp.prompts.beside import texts
from davsp.prompts.canaries import Canaries, Refused, canaries_of
from davsp.serve.model import model_app
from davsp.serve.settings import ServeSettings
from proxy import Events, border, client, data_url, picture_of
from tiny import picture

TOKENS = 6  # of the answers of `watched`: enough to begin to refuse or to comply
Change = Callable[[Image.Image], Image.Image]


class ModelUpstream(httpx2.AsyncBaseTransport):
    """`davsp serve-model` in place of a connection.

    Args:
        change: of every picture, as a service between proxy and model would make it.
        wanted: "Bearer KEY" that requests must bring.

    Attributes:
        asked: requests that reached it; `most` at a time.
        replies: status codes that are sent in place of the first answers.
    """

    def __init__(self, lvlm: LVLM, change: Change | None = None, wanted: str = "") -> None:
        self.app = httpx2.ASGITransport(model_app(lvlm, "served", ServeSettings.of(upstream="")))
        self.change, self.wanted = change, wanted
        self.asked = self.under_way = self.most = 0
        self.replies: list[Any] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.asked += 1
        if self.wanted and request.headers.get("authorization") != self.wanted:
            return _whole(httpx2.Response(401, json={"error": {"message": "no key"}}))
        if self.replies:
            reply = self.replies.pop(0)
            if isinstance(reply, Exception):
                raise reply
            return _whole(
                reply
                if isinstance(reply, httpx2.Response)
                else httpx2.Response(reply, json={"error": {"message": "made to fail"}})
            )
        content = await request.aread()
        if self.change and content:
            content = self._changed(json.loads(content))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(0)
            headers = {"host": "localhost", "content-type": "application/json"}
            sent = httpx2.Request(request.method, request.url, headers=headers, content=content)
            response = await self.app.handle_async_request(sent)
            await response.aread()
            return _whole(response)
        finally:
            self.under_way -= 1

    def _changed(self, body: dict[str, Any]) -> bytes:
        for part in body["messages"][0]["content"]:
            if part["type"] == "image_url":
                part["image_url"]["url"] = data_url(self.change(picture_of(part["image_url"]["url"])))
        return json.dumps(body).encode()


def _whole(response: httpx2.Response) -> httpx2.Response:
    return httpx2.Response(response.status_code, headers=response.headers, stream=Events(response.content))


def shifted(canvas: Image.Image) -> Image.Image:
    """One pixel to the right."""
    return Image.fromarray(np.roll(np.array(canvas), 1, axis=1))


def without_border(prompt: VisualSafetyPrompt) -> Change:
    """The picture alone, as where somebody forgot the border."""
    p = prompt.padding

    def cropped(canvas: Image.Image) -> Image.Image:
        return canvas.crop((p, p, canvas.width - p, canvas.height - p)).resize(canvas.size, Image.Resampling.BICUBIC)

    return cropped


def as_jpeg(canvas: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=95)
    return Image.open(buffer).convert("RGB")


# -- without a model ---------------------------------------------------------------------------------------------------


def canaried(border: VisualSafetyPrompt, malicious: int = 24, benign: int = 8) -> VisualSafetyPrompt:
    """The border with canaries that nobody was asked."""
    border = border.quantised()
    queries = [
        Query(
            f"{label}-{i}",
            f"{'steal' if label == 'malicious' else 'paint'} {i}",
            label,
            "t",
            image=picture(i, (40, 30)),
        )
        for label, count in (("malicious", malicious), ("benign", benign))
        for i in range(count)
    ]
    border.canaries = Canaries(
        pixels=border.pixels_sha256(), texts=texts(border), model="m", judge=judge_name(keyword),
        malicious=Refused(asked=40, none=1, text=4, prompt=38), benign=Refused(asked=8, none=0, text=0, prompt=0),
        canaries=canaries_of(queries, border.inside),
    )  # fmt: skip
    return border


def says(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


def sees(border: VisualSafetyPrompt, most: int = 1000) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
    """What an upstream answers that refuses the first `most` malicious queries that stand in the border, and nothing else."""
    frame = border.border().crop((0, 0, border.canvas, border.padding)).tobytes()

    def answer(number: int, body: dict[str, Any]) -> dict[str, Any]:
        image, text = body["messages"][0]["content"]
        canvas = picture_of(image["image_url"]["url"])
        bordered = canvas.crop((0, 0, canvas.width, border.padding)).tobytes() == frame
        words = text["text"].split()
        refuses = bordered and "steal" in words and int(words[-1]) < most
        return says("i am sorry , i cannot help with that ." if refuses else "sure , here are the steps .")

    return answer


class Fake:
    """A proxy before an upstream that sees the border of `seen`, whatever the proxy's own is."""

    def __init__(self, most: int = 1000, **settings: Any) -> None:
        self.border = canaried(border().prompt)
        self.client = client(VisualPrompt(self.border), **settings)
        self.upstream = self.client.upstream
        self.upstream.answer = sees(self.border, most)
        self.ready = self.client.proxy.ready

    def ask(self, **options: Any) -> tuple[int, dict[str, Any]]:
        reply = self.client.request("GET", "/ready", **options)
        return reply.status_code, reply.json()
