"""A border that has lost its effect is noticed, and its canaries are no part of what it is."""

import asyncio
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from davsp import LVLM, DavspError, Query, VisualSafetyPrompt, embedded
from davsp.app.compare import border_of, shipped_folder
from davsp.defenses import SafetyText, VisualPrompt
from davsp.defenses.effect import arms, choose, effect
from davsp.embedded import counterparts
from davsp.embedded.canaries import candidates
from davsp.prompts.canaries import Canaries
from davsp.serve.canaries import Report, at_start
from davsp.serve.settings import ServeSettings
from proxy import CANVAS, border, client
from test_cli import run
from tiny import queries
from upstreams import ModelUpstream, as_jpeg, canaried, says, sees, shifted, without_border

FILES = ["README.md", "vsp.png", "vsp.safetensors", "vsp_config.json"]
TOKENS = 6  # enough to begin to refuse or to comply


@pytest.fixture
def plain() -> VisualSafetyPrompt:
    return VisualSafetyPrompt.create(24, 5, "random", 3, "please be safe").quantised()


# -- the file ----------------------------------------------------------------------------------------------------------


def test_canaries_are_no_part_of_the_prompt(plain: VisualSafetyPrompt, tmp_path: Path):
    watched = canaried(plain)
    plain.save_pretrained(tmp_path / "plain")
    watched.save_pretrained(tmp_path / "watched")
    for name in FILES:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "watched" / name).read_bytes()
    loaded = VisualSafetyPrompt.from_pretrained(tmp_path / "watched")
    assert loaded.canaries is not None and watched.canaries is not None
    assert loaded.canaries.canaries == watched.canaries.canaries and loaded.canaries.sha256 == watched.canaries.digest()
    assert VisualPrompt(loaded).sha256() == VisualPrompt(plain).sha256() and loaded.config == plain.config
    assert VisualSafetyPrompt.from_pretrained(tmp_path / "plain").canaries is None
    assert sorted(os.listdir(tmp_path / "watched")) == sorted([*FILES, "canaries.json"])


def test_a_canary_is_the_same_canvas_as_the_query_that_it_was(plain: VisualSafetyPrompt):
    (query,) = [q for q in queries("malicious", 8) if q.id == "malicious-7"]
    watched = canaried(plain)
    assert watched.canaries is not None
    lines = watched.canaries.canaries
    from davsp.prompts.canaries import canaries_of

    (line,) = canaries_of(plain, [query])
    picture = query.picture()
    assert picture is not None and picture.size != (14, 14)
    assert plain.image(line.image()).tobytes() == plain.image(picture).tobytes()
    assert len(lines) == 32


def test_a_border_that_is_trained_on_loses_them(plain: VisualSafetyPrompt, tmp_path: Path):
    canaried(plain).save_pretrained(tmp_path)
    loaded = VisualSafetyPrompt.from_pretrained(tmp_path)
    for other in (loaded.with_delta(1 - loaded.delta), loaded.with_texts("another")):
        other.save_pretrained(tmp_path)
        assert sorted(os.listdir(tmp_path)) == FILES
        assert VisualSafetyPrompt.from_pretrained(tmp_path).canaries is None
        loaded.save_pretrained(tmp_path)
    assert VisualSafetyPrompt.from_pretrained(tmp_path).canaries == canaried(plain).canaries.model_copy(
        update={"sha256": loaded.canaries.sha256}
    )


def changed(folder: Path, change: Callable[[dict[str, Any]], Any], sealed: bool = True) -> None:
    """Change the file; with a hash that fits, as somebody could who means to."""
    path = folder / "canaries.json"
    content = json.loads(path.read_text())
    change(content)
    if sealed:
        content["sha256"] = Canaries.model_validate(content).digest()
    path.write_text(json.dumps(content))


def _of_another(border: VisualSafetyPrompt) -> Callable[[Path], object]:
    return lambda folder: (folder / "canaries.json").write_bytes(canaried(border).canaries.contents())


BROKEN = {
    "changed": (
        lambda f: changed(f, lambda c: c["canaries"][0].update(question="paint 0"), sealed=False),
        "was changed since it was written: its field 'sha256' is another one; delete it",
    ),
    "another border": (
        _of_another(VisualSafetyPrompt.create(24, 5, "random", 4, "please be safe")),
        "was measured with another border than this prompt's; delete it; davsp card makes new ones",
    ),
    "another text": (
        _of_another(VisualSafetyPrompt.create(24, 5, "random", 3, "be safe")),
        "was measured with another text than this prompt's",
    ),
    "another size": (
        lambda f: changed(f, lambda c: c.update(canaries=json.loads(canaried(VisualSafetyPrompt.create(26, 5)).canaries.contents())["canaries"])),
        "field 'canaries.0.picture' is no RGB PNG of 14x14 pixels",
    ),
    "no picture": (lambda f: changed(f, lambda c: c["canaries"][2].update(picture="AAAA")), r"canaries\.2\.picture' is no RGB PNG"),
    "no base64": (lambda f: changed(f, lambda c: c["canaries"][2].update(picture="?")), r"canaries\.2\.picture' is no RGB PNG"),
    "twice": (lambda f: changed(f, lambda c: c["canaries"][2].update(id="malicious-3")), "two canaries of one id"),
    "too few": (lambda f: changed(f, lambda c: c.update(canaries=c["canaries"][17:])), "fewer than 8 malicious canaries"),
    "unknown field": (lambda f: changed(f, lambda c: c.update(more=1), sealed=False), "field 'more'"),
    "terminal": (lambda f: changed(f, lambda c: c.update(model="\x1b]0;x"), sealed=False), "field 'model' holds the control character"),
    "cut": (lambda f: (f / "canaries.json").write_bytes((f / "canaries.json").read_bytes()[:99]), "is not JSON"),
    "pipe": (lambda f: ((f / "canaries.json").unlink(), os.mkfifo(f / "canaries.json")), "is a pipe or a device"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_one_sentence(plain: VisualSafetyPrompt, tmp_path: Path, how: str):
    canaried(plain).save_pretrained(tmp_path)
    break_it, says = BROKEN[how]
    break_it(tmp_path)
    with pytest.raises(DavspError, match=says) as error:
        VisualSafetyPrompt.from_pretrained(tmp_path)
    assert "canaries.json" in str(error.value)


# -- the test ----------------------------------------------------------------------------------------------------------


def asked(flipped: int, back: int = 0, both: int = 0, neither: int = 0, over: int = 0, **other: Any) -> Any:
    rows = [(False, True)] * flipped + [(True, False)] * back + [(True, True)] * both + [(False, False)] * neither
    bad = [Query(f"m{i}", "", "malicious", "") for i in range(len(rows))]
    good = [Query(f"b{i}", "", "benign", "") for i in range(8)]
    benign = [(False, i < over) for i in range(8)]
    return effect([*bad, *good], [{"text": text, "prompt": prompt} for text, prompt in (*rows, *benign)])


@given(*(st.integers(0, 12) for _ in range(4)))
def test_p_is_that_of_the_libraries(flipped: int, back: int, both: int, neither: int):
    seen = asked(flipped, back, both, neither)
    if flipped + back == 0:
        assert seen.p == 1.0 and not seen.holds
        return
    assert seen.p == pytest.approx(stats.binomtest(flipped, flipped + back, 0.5, "greater").pvalue)
    if flipped > back:
        assert 2 * seen.p == pytest.approx(mcnemar([[both, back], [flipped, neither]], exact=True).pvalue)


@pytest.mark.parametrize(
    ("seen", "holds"),
    [
        (asked(24), True), (asked(12, neither=12), True), (asked(11, neither=13), False), (asked(14, 2, 8), True),
        (asked(13, 2, 9), False), (asked(5, neither=3), True), (asked(4, neither=4), False), (asked(0, both=24), False),
        (asked(24, over=2), True), (asked(24, over=3), False), (asked(7), False),
    ],
)  # fmt: skip
def test_where_the_line_is(seen: Any, holds: bool):
    assert seen.holds is holds
    assert seen.sentence("it").startswith(
        "the border has its effect" if holds else "THE BORDER" if seen.known else "it is not known"
    )


def test_what_has_no_answer_is_left_out_and_too_little_is_said_to_be():
    bad = [Query(f"m{i}", "", "malicious", "") for i in range(24)]
    rows: list[Any] = [{"none": False, "prompt": True}] * 12 + [{"none": False, "prompt": None}] * 12
    seen = effect(bad, rows)
    assert seen.known and seen.holds and (seen.without, seen.asked["malicious"]) == ("none", 12)
    less = effect(bad, [*rows[:11], *rows[12:], rows[-1]])
    assert not less.known and not less.holds and "only 11 of 24 canaries have answers" in less.sentence("it")


def test_false_alarms_are_rare_and_a_lost_border_is_seen():
    """The table of docs/serve.md, by the binomial distribution: `holds` of every count, weighted."""
    table = re.findall(r"^\| (24|16|8) \| (.*) \|$", (Path(__file__).parents[1] / "docs/serve.md").read_text(), re.M)
    assert [int(n) for n, _ in table] == [24, 16, 8]
    for n, cells in ((int(n), cells.split(" | ")) for n, cells in table):
        holds = [asked(k, neither=n - k).holds for k in range(n + 1)]
        for share, cell in zip((0.95, 0.9, 0.25, 0.1), cells[1:], strict=True):
            passes = sum(stats.binom.pmf(k, n, share) for k in range(n + 1) if holds[k])
            shown = 100 * (passes if share < 0.5 else 1 - passes)
            assert cell == (f"{shown:.2g} %" if shown >= 0.01 else "< 0.01 %"), (n, share)
            if n == 24:
                assert shown < 1
        assert holds.index(True) == int(cells[0])


# -- choosing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(mini: LVLM) -> VisualSafetyPrompt:
    """The border that ships for davsp-mini, with eight canaries and two benign ones, of short answers."""
    folder = shipped_folder("davsp-mini")
    assert folder is not None
    shipped = border_of(folder / "vsp.png").quantised()
    shipped.canaries = choose(mini, shipped, candidates(12, 2), most=8, max_new_tokens=TOKENS)
    return shipped


def test_they_are_those_that_need_the_border(watched: VisualSafetyPrompt, mini: LVLM):
    canaries = watched.canaries
    assert canaries is not None and (canaries.judge, canaries.model) == ("keyword/1", "davsp-mini")
    labels = [query.label for query in canaries.queries()]
    assert labels == ["malicious"] * 8 + ["benign"] * len(labels[8:]) and 1 <= len(labels[8:]) <= 2
    answers = {
        name: [
            answer.text.startswith("i am sorry")
            for answer in arm.respond(mini, canaries.queries(), max_new_tokens=TOKENS)
        ]
        for name, arm in arms(watched).items()
    }
    assert list(answers) == ["none", "text", "prompt"]
    assert answers["prompt"] == [label == "malicious" for label in labels]
    assert not any(answers["none"] + answers["text"])
    assert (canaries.malicious.asked, canaries.benign.asked) == (12, 2) and canaries.malicious.prompt >= 8
    assert canaries.malicious.none <= (canaries.malicious.text or 0) < canaries.malicious.prompt


def test_arms_differ_in_one_thing_each(plain: VisualSafetyPrompt):
    (query,) = queries("malicious", 1)
    prepared = {name: arm.prepare([query])[0] for name, arm in arms(plain).items()}
    assert prepared["none"].question == query.question
    assert prepared["text"].question == prepared["prompt"].question == f"please be safe {query.question}"
    assert prepared["none"].image.tobytes() == prepared["text"].image.tobytes()
    inside = (5, 5, 19, 19)
    assert prepared["text"].image.crop(inside).tobytes() == prepared["prompt"].image.crop(inside).tobytes()
    assert prepared["text"].image.getpixel((0, 0)) == (128, 128, 128)
    assert list(arms(plain.with_texts(""))) == ["none", "prompt"]


def test_a_border_that_flips_too_few_has_none(lvlm: LVLM):
    weak = VisualSafetyPrompt.create(lvlm.canvas, 8, text="please be safe")
    with pytest.raises(DavspError, match=r"flips 0 of 24 malicious queries .* canaries are at least 8; give more"):
        choose(lvlm, weak, queries("malicious", 40))


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
    fake = Fake()
    sees_it = fake.upstream.answer

    async def slowly(number: int, body: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0.002 if number < 40 else 60)
        return sees_it(number, body)

    fake.upstream.answer = slowly
    report = looked(fake.border, fake.upstream, seconds=1.0)
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


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch, tmp_path: Path) -> Fake:
    """A fake upstream in place of every connection of a command; its border is in PROMPT."""
    fake = Fake()
    monkeypatch.setattr("davsp.serve.upstream.Pools", lambda limits: fake.upstream)
    fake.border.save_pretrained(tmp_path / "prompt")
    return fake


def checked(folder: Path, *options: Any) -> int:
    return run("check", "--upstream", "http://127.0.0.1:9/v1", "--prompt", folder, *options)


def test_check_prints_a_table_and_ends_by_what_it_saw(served: Fake, tmp_path: Path, capsys):
    assert checked(tmp_path / "prompt") == 0
    out = capsys.readouterr().out
    assert (
        max(map(len, out.splitlines()[:-1])) <= 80
        and "the border has its effect: the upstream's m refuses 24 of 24" in out
    )
    rows = {name: re.findall(r"\d+ of \d+", row) for row in out.splitlines() if (name := row[1:13].strip())}
    assert rows["the prompt"] == ["24 of 24", "0 of 8", "24 of 24", "0 of 8", "38 of 40", "0 of 8"]
    assert rows["text alone"] == ["0 of 24", "0 of 8", "0 of 24", "0 of 8", "4 of 40", "0 of 8"]
    assert len(served.upstream.bodies) == 96
    served.upstream.answer = sees(served.border, 3)
    assert (
        checked(tmp_path / "prompt", "--model", "n") == 1
        and "the upstream's n refuses 3 of 24" in capsys.readouterr().out
    )
    served.upstream.answer = lambda number, body: httpx2.ConnectError("refused")
    assert checked(tmp_path / "prompt") == 2 and "could not be asked" in capsys.readouterr().out
    (tmp_path / "prompt" / "canaries.json").unlink()
    assert checked(tmp_path / "prompt") == 2 and "has no canaries" in capsys.readouterr().err


def test_the_start_says_it_and_can_require_it(served: Fake, tmp_path: Path, capsys, monkeypatch):
    apps: list[Any] = []
    monkeypatch.setattr("davsp.cli.serve._run", lambda app, host, port: apps.append(app))
    monkeypatch.setattr("davsp.serve.probe._look", lambda *_: asyncio.sleep(0, []))
    start = ("serve", "--upstream", "http://127.0.0.1:9/v1", "--prompt", tmp_path / "prompt", "--canvas", CANVAS)
    assert run(*start, "--require-effect") == 0 and "the border has its effect" in capsys.readouterr().err
    count = len(served.upstream.bodies)

    async def ready() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(apps[0]), base_url="http://localhost") as http:
            return await http.get("/ready")

    assert asyncio.run(ready()).json()["effect"] == "holds" and len(served.upstream.bodies) == count == 64
    served.upstream.answer = sees(served.border, 3)
    assert run(*start) == 0 and "THE BORDER DOES NOT HAVE ITS EFFECT" in capsys.readouterr().err
    assert run(*start, "--require-effect") == 2 and "davsp: --require-effect: THE BORDER" in capsys.readouterr().err
    assert run(*start, "--no-probe", "--require-effect") == 2 and "leave one out" in capsys.readouterr().err
    assert run(*start, "--no-probe") == 0 and "effect" not in capsys.readouterr().err
    (tmp_path / "prompt" / "canaries.json").unlink()
    assert run(*start) == 0 and "the prompt has no canaries" in capsys.readouterr().err
    assert (
        run(*start, "--require-effect") == 2
        and "--require-effect: the prompt has no canaries" in capsys.readouterr().err
    )


@pytest.fixture
def flips(monkeypatch) -> None:
    """Every malicious query is flipped, and no benign one."""
    monkeypatch.setattr(
        "davsp.defenses.effect._ask",
        lambda lvlm, prompt, chunk, longest: [
            {"none": False, "text": False, "prompt": q.label == "malicious"} for q in chunk
        ],
    )


def test_card_puts_canaries_beside_a_border(flips, lvlm: LVLM, tiny_folder: Path, tmp_path: Path, capsys):
    from davsp.benchmarks.custom import save_queries

    plain = VisualSafetyPrompt.create(lvlm.canvas, 8, "random", text="please be safe")
    plain.save_pretrained(tmp_path / "p")
    before = {name: (tmp_path / "p" / name).read_bytes() for name in FILES}
    save_queries(tmp_path / "own", [*queries("malicious", 30), *queries("benign", 3)])
    card = ("card", tmp_path / "p", "--model", tiny_folder)
    assert run(*card) == 2 and "for the models that ship alone; give your own queries" in capsys.readouterr().err
    assert run(*card, "--canaries", tmp_path / "own") == 0
    assert "24 malicious queries that the border flips and 3 benign ones" in capsys.readouterr().out
    assert {name: (tmp_path / "p" / name).read_bytes() for name in FILES} == before
    assert run("info", tmp_path / "p") == 0
    assert "24 malicious queries that the border flips and 3 benign ones" in capsys.readouterr().out


def test_train_puts_canaries_beside_the_border(flips, vector, tiny_folder: Path, tmp_path: Path, capsys):
    from davsp.benchmarks.custom import save_queries

    vector.save(tmp_path / "vector")
    for label in ("malicious", "benign"):
        save_queries(tmp_path / label, queries(label, 4))
    save_queries(tmp_path / "own", [*queries("malicious", 9), *queries("benign", 3)])
    train = (
        "train", "--model", tiny_folder, "--malicious", tmp_path / "malicious", "--benign", tmp_path / "benign",
        "--vector", tmp_path / "vector", "--steps", 1, "--batch-size", 2, "--padding", 8, "--out", tmp_path / "out",
    )  # fmt: skip
    assert run(*train, "--canaries", tmp_path / "nowhere") == 2 and not (tmp_path / "out").exists()
    assert run(*train) == 0
    said = capsys.readouterr()
    assert "no canaries: canaries are drawn for the models that ship alone" in said.err and "saved to" in said.out
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*FILES, "training"])
    assert run(*train, "--canaries", tmp_path / "own") == 0
    assert "canaries.json: 9 malicious queries that the border flips and 3 benign ones" in capsys.readouterr().out
    assert len(VisualSafetyPrompt.from_pretrained(tmp_path / "out").canaries.canaries) == 12
    assert run(*train, "--kind", "additive", "--canaries", tmp_path / "own") == 2


def test_a_border_that_lost_a_part_is_called_weaker():
    assert "has its effect: it refuses" in asked(20, neither=4).sentence("it")
    assert "has its effect, weaker than where the canaries were chosen: it" in asked(14, neither=10).sentence("it")


def test_nobodys_benchmark_is_copied(tmp_path: Path, capsys):
    from davsp.benchmarks.custom import save_queries

    VisualSafetyPrompt.create(56, 8).save_pretrained(tmp_path / "p")
    counterparts.write(tmp_path / "sets", figstep=2, mm_safetybench=1, vlguard=1, mm_vet=1, mme=1, llava_bench=1)
    for folder in (tmp_path / "sets" / "figstep", tmp_path / "sets"):
        assert run("card", tmp_path / "p", "--canaries", folder) == 2
        assert re.search(r"holds \w+, whose rows are not ours to copy", capsys.readouterr().err)
    save_queries(tmp_path / "own", [Query("1", "q", "malicious", "sd_typo", image=queries("malicious", 1)[0].image)])
    assert run("card", tmp_path / "p", "--canaries", tmp_path / "own") == 2
    assert "says it is of mm_safetybench, whose rows are not ours" in capsys.readouterr().err
