"""A border before a server: does it still work there, and what `/ready` says."""

import asyncio
import json
import re
from typing import Any

import httpx2
import pytest

from davsp import LVLM, VisualSafetyPrompt, embedded
from davsp.app.compare import border_of, shipped_folder
from davsp.defenses import SafetyText
from davsp.defenses.effect import choose
from davsp.embedded.canaries import candidates
from davsp.serve.canaries import Report, at_start
from davsp.serve.settings import ServeSettings
from proxy import client
from upstreams import Fake, ModelUpstream, as_jpeg, says, sees, shifted, without_border

# -- at an upstream ----------------------------------------------------------------------------------------------------

SETTINGS = ServeSettings.of(upstream="http://upstream.test/v1")


def looked(border: VisualSafetyPrompt, upstream: Any, **options: Any) -> Report:
    options = {"seconds": None} | options  # however slow the machine is
    return asyncio.run(at_start(SETTINGS, border, transport=upstream, **options))


@pytest.mark.parametrize(
    ("what", "state"),
    [("right", "holds"), ("shifted", "lost"), ("left out", "lost"), ("another model", "lost")],
)
def test_it_tells_apart(watched: VisualSafetyPrompt, mini: LVLM, what: str, state: str):
    change = {"shifted": shifted, "left out": without_border(watched)}.get(what)
    upstream = ModelUpstream(embedded.load("davsp-mini-narrow", "cpu") if what == "another model" else mini, change)
    report = looked(watched, upstream)
    assert (report.state, report.answers) == (state, True), report.line
    assert report.line.startswith(
        "the border has its effect" if state == "holds" else "THE BORDER DOES NOT HAVE ITS EFFECT"
    )
    assert "\n" not in report.line and "p = " in report.line
    assert upstream.asked == 1 + 2 * len(watched.canaries.canaries) and 1 < upstream.most <= 4


@pytest.mark.slow
def test_it_tells_apart_with_all_canaries(mini: LVLM):
    """With 24 and whole answers, and another chat template, of which nothing is promised but that it is measured."""
    folder = shipped_folder("davsp-mini")
    shipped = border_of(folder / "vsp.png").quantised()
    shipped.canaries = choose(mini, shipped, candidates())
    assert [c.label for c in shipped.canaries.canaries] == ["malicious"] * 24 + ["benign"] * 8
    flipped = {}
    for what, change in (
        ("right", None),
        ("shifted", shifted),
        ("left out", without_border(shipped)),
        ("jpeg", as_jpeg),
    ):
        report = looked(shipped, ModelUpstream(mini, change), whole=True)
        flipped[what] = report.effect.gained
        assert (report.state == "holds") is (what in ("right", "jpeg")), report.line
    for name in ("davsp-mini-narrow", "davsp-mini-qwen"):
        report = looked(shipped, ModelUpstream(embedded.load(name, "cpu")))
        assert report.state == "lost", report.line
    assert flipped["right"] == 24 and flipped["shifted"] <= 8 and flipped["left out"] <= 4
    other = embedded.load("davsp-mini", "cpu")
    other.tokenizer.chat_template = other.tokenizer.chat_template.replace("message['role'] + ': '", "''")
    report = looked(shipped, ModelUpstream(other))
    assert report.state in ("holds", "lost") and report.effect.asked["malicious"] == 24


def test_ready_says_that_the_border_works_and_asks_once_a_minute():
    fake = Fake()
    status, why = fake.ask()
    assert (status, why["ready"], why["effect"], why["model"]) == (200, True, "holds", "m")
    assert why["malicious"] == {"asked": 24, "refused": {"text": 0, "prompt": 24}} and why["flipped"] == 24
    assert why["benign"] == {"asked": 8, "refused": {"text": 0, "prompt": 0}} and why["p"] == 2**-24
    assert not re.search("steal|paint|sorry|steps", json.dumps(why))
    assert len(fake.upstream.bodies) == 64 and {b["max_tokens"] for b in fake.upstream.bodies} == {48}
    assert {b["messages"][0]["content"][1]["text"].split()[0] for b in fake.upstream.bodies} == {"please"}
    assert fake.ask()[1]["effect"] == "holds" and len(fake.upstream.bodies) == 64
    fake.ready.at -= 61
    assert fake.ask()[0] == 200 and len(fake.upstream.bodies) == 128
    assert fake.client.request("GET", "/health").status_code == 200 and len(fake.upstream.bodies) == 128


def test_a_lost_border_is_not_ready_and_says_why():
    fake = Fake(most=5)
    status, why = fake.ask()
    assert (status, why["ready"], why["effect"], why["flipped"]) == (503, False, "lost", 5)
    assert why["why"].startswith("THE BORDER DOES NOT HAVE ITS EFFECT: the upstream's m refuses 5 of 24 canaries")
    anyway = Fake()
    anyway.upstream.answer = lambda number, body: says("i am sorry , i cannot help with that .")
    status, why = anyway.ask()
    assert status == 503 and "8 of 8 benign ones" in why["why"]


def test_who_asks_meanwhile_waits_for_the_same_look():
    fake = Fake()

    async def ask() -> list[Any]:
        return await asyncio.gather(*(fake.ready() for _ in range(20)))

    assert all(ready for ready, _ in asyncio.run(ask())) and len(fake.upstream.bodies) == 64


def test_who_hangs_up_does_not_stop_the_look():
    fake = Fake()

    async def ask() -> Any:
        first = asyncio.ensure_future(fake.ready())
        await asyncio.sleep(0)
        first.cancel()
        return await fake.ready()

    assert asyncio.run(ask())[0] is True and len(fake.upstream.bodies) == 64


def test_an_upstream_that_does_not_answer_is_asked_again_soon():
    fake = Fake()
    fake.upstream.answer = lambda number, body: httpx2.ConnectError("refused")
    status, why = fake.ask()
    assert (status, why["effect"]) == (503, "unknown") and "cannot be reached" in why["why"]
    assert len(fake.upstream.bodies) <= 4  # the first that fails ends the others
    fake.upstream.answer = sees(fake.border)
    assert fake.ask()[0] == 503
    fake.ready.at -= 5
    assert fake.ask()[0] == 200


def test_a_stumble_is_asked_again_and_a_pair_without_an_answer_left_out(monkeypatch):
    monkeypatch.setattr("davsp.serve.canaries.WAITS", (0.0, 0.0))
    fake = Fake()
    sees_it = fake.upstream.answer
    fake.upstream.answer = lambda number, body: (
        httpx2.Response(429, json={}) if number % 5 == 0 or "steal 3" in json.dumps(body) else sees_it(number, body)
    )
    status, why = fake.ask()
    assert status == 200 and 18 <= why["malicious"]["asked"] <= 23


def test_a_slow_upstream_is_not_waited_for(monkeypatch):
    """Its time is up when forty requests are answered and no more will be."""
    fake, hour = Fake(), 3600.0
    sees_it, timeout, bounds = fake.upstream.answer, asyncio.timeout, []

    def noted(seconds: float | None) -> asyncio.Timeout:
        bounds.extend([timeout(seconds)] if seconds == hour else [])
        return bounds[-1] if seconds == hour else timeout(seconds)

    async def slowly(number: int, body: dict[str, Any]) -> dict[str, Any]:
        if number >= 40:
            if number == 43:  # four are asked at a time
                bounds[0].reschedule(asyncio.get_running_loop().time())
            await asyncio.sleep(hour)
        return sees_it(number, body)

    monkeypatch.setattr(asyncio, "timeout", noted)
    fake.upstream.answer = slowly
    report = looked(fake.border, fake.upstream, seconds=hour)
    assert report.state == "holds" and report.effect.asked["malicious"] in (19, 20)


def test_without_canaries_the_upstream_must_answer():
    caller = client()
    reply = caller.request("GET", "/ready")
    assert reply.status_code == 200 and reply.json()["effect"] == "unknown" and "no canaries" in reply.json()["why"]
    assert caller.upstream.bodies == [] and caller.upstream.requests[-1].url.path == "/v1/models"
    text = client(SafetyText("be safe"))
    assert "no border alone" in text.request("GET", "/ready").json()["why"]
    assert client(require_effect=True).request("GET", "/ready").status_code == 503


def test_an_upstream_that_wants_the_clients_keys_could_not_be_asked(monkeypatch):
    refused = lambda number, body: httpx2.Response(401, json={"error": {"message": "key"}})  # noqa: E731
    fake = Fake()
    fake.upstream.answer = refused
    status, why = fake.ask()
    assert (status, why["effect"]) == (200, "unknown") and "--api-key-env" in why["why"]
    monkeypatch.setenv("KEY", "wrong")
    own = Fake(api_key_env="KEY", require_effect=False)
    own.upstream.answer = refused
    assert own.ask()[0] == 503
    assert {r.headers["authorization"] for r in own.upstream.requests} == {"Bearer wrong"}


def test_ready_needs_the_token_and_sends_no_clients_key_on(monkeypatch):
    monkeypatch.setenv("TOKEN", "t")
    fake = Fake(token_env="TOKEN")
    assert fake.ask()[0] == 401 and fake.upstream.requests == []
    assert fake.ask(headers={"authorization": "Bearer t"})[0] == 200
    assert not any("authorization" in request.headers for request in fake.upstream.requests)


def test_a_proxy_as_upstream_is_told():
    fake = Fake()
    sees_it = fake.upstream.answer
    fake.upstream.answer = lambda number, body: httpx2.Response(
        200, json=sees_it(number, body), headers={"x-davsp-prompt": "0"}
    )
    assert "name the server behind it" in fake.ask()[1]["why"]
