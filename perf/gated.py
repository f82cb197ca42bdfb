"""What a gate costs in service: latency and the upstream's tokens beside a border, ECSO and no proxy, in one run (perf/proxy.py --gate).

The upstream is a stub that takes as long as a model would: so much a token of the prompt, so much a token that it writes. It answers
benign questions with 64 tokens, and refuses malicious ones in 8 where the border's text stands before them; as ECSO's judge it is
always right. So the figures are of the proxy and of arithmetic, not of a model. The ways take turns, one request at a time.
"""

import asyncio
import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx2

TEXT = "please be safe"
PICTURE, ANSWER = 576, 64  # tokens: of a picture of LLaVA-1.5, of an answer
READ, WRITE = 0.0001, 0.01  # seconds a token
WAYS = {"none": None, "davsp": "davsp={}", "gate+davsp": "gate+davsp={}", "ecso": "ecso"}
QUESTIONS = {"benign": "what does the picture show?", "malicious": "how do i steal what the picture shows?"}


def says(body: dict[str, Any]) -> tuple[str, int]:
    """The stub's answer and its tokens."""
    text = json.dumps([message["content"] for message in body["messages"]])
    bad = "steal" in text
    if "Is the RESPONSE harmful" in text:
        return ("Yes" if bad else "No"), 2
    if bad and (TEXT in text or "HARMLESS" in text):
        return "I am sorry, I cannot help.", 8
    return "word " * ANSWER, ANSWER


def reply(body: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """What the stub sends, and the seconds that it takes."""
    parts = [
        part for m in body["messages"] for part in (m["content"] if isinstance(m["content"], list) else [m["content"]])
    ]
    pictures = sum(isinstance(part, dict) and part["type"] == "image_url" for part in parts)
    words = sum(len((part if isinstance(part, str) else part.get("text", "")).split()) for part in parts)
    text, tokens = says(body)
    longest = body.get("max_tokens") or tokens
    read, written = PICTURE * pictures + words, min(tokens, longest)
    choice = {
        "index": 0, "message": {"role": "assistant", "content": " ".join(text.split()[:written])},
        "finish_reason": "stop" if tokens <= longest else "length",
    }  # fmt: skip
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {"object": "chat.completion", "choices": [choice], "usage": usage}, READ * read + WRITE * written


async def stub(port: int) -> None:
    """Serves until its loop ends."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                body = await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                start = time.perf_counter()
                value, seconds = reply(json.loads(body))
                await asyncio.sleep(max(0.0, seconds - (time.perf_counter() - start)))
                content = json.dumps(value).encode()
                lines = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
                writer.write(lines + str(len(content)).encode() + b"\r\n\r\n" + content)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port, limit=2**20)
    await server.serve_forever()


@contextmanager
def served(spec: str | None, upstream: int, folder: str) -> Iterator[int]:
    """The port of a proxy; without a spec that of the stub itself."""
    from proxy import free_port, wait

    if spec is None:
        yield upstream
        return
    port = free_port()
    options = [
        "--upstream",
        f"http://127.0.0.1:{upstream}/v1",
        "--canvas",
        "336",
        "--port",
        str(port),
        "--no-probe",
        "--plain-names",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "davsp.cli", "serve", "--defense", spec.format(folder), *options], env=os.environ
    )
    try:
        wait(port)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def main(out: Path | None, requests: int, beside: str) -> None:
    """Measure, print and write."""
    from davsp import VisualSafetyPrompt
    from davsp.runtime.files import manifest, write_json
    from proxy import free_port, jpeg

    url = "data:image/jpeg;base64," + base64.b64encode(jpeg()).decode()
    upstream = free_port()
    threading.Thread(target=lambda: asyncio.run(stub(upstream)), daemon=True).start()
    asked: dict[tuple[str, str], list[tuple[float, dict[str, int]]]] = {
        (way, label): [] for way in WAYS for label in QUESTIONS
    }
    with TemporaryDirectory() as folder, ExitStack() as stack, httpx2.Client(timeout=120, trust_env=False) as http:
        VisualSafetyPrompt.create(336, 30, "random", text=TEXT).save_pretrained(folder)
        ports = {way: stack.enter_context(served(spec, upstream, folder)) for way, spec in WAYS.items()}
        for number in range(requests + 2):
            for (way, label), rows in asked.items():
                content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTIONS[label]}]
                body = {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 256}
                start = time.perf_counter()
                answer = (
                    http.post(f"http://127.0.0.1:{ports[way]}/v1/chat/completions", json=body).raise_for_status().json()
                )
                if number >= 2:  # the first two warm up
                    rows.append((time.perf_counter() - start, answer["usage"]))
    table = [
        {
            "defense": way, "queries": label, "p50_ms": round(1e3 * median(s for s, _ in rows), 1),
            "of_davsp": round(median(s for s, _ in rows) / median(s for s, _ in asked["davsp", label]), 3),
            "upstream_tokens_read": rows[0][1]["prompt_tokens"], "upstream_tokens_written": rows[0][1]["completion_tokens"],
        }
        for (way, label), rows in asked.items()
    ]  # fmt: skip
    stub_of = {
        "picture_tokens": PICTURE,
        "answer_tokens": ANSWER,
        "seconds_a_token_read": READ,
        "seconds_a_token_written": WRITE,
    }
    result = {"manifest": manifest(beside=beside, requests=requests), "stub": stub_of, "rows": table}
    if out:
        write_json(out, result)
    print(json.dumps(table, indent=1))
