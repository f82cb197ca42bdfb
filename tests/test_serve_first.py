"""gate:first on a server: the score of its first token, the threshold made through it, and the proxy that uses both."""

import asyncio
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from command import run
from davsp import LVLM, DavspError, VisualSafetyPrompt
from davsp.benchmarks.custom import save_queries
from davsp.cli import serve
from davsp.defenses import Gate, NoDefense, VisualPrompt, load_defense
from davsp.defenses.gate.served import calibrate_served, log_odds
from davsp.lvlm import Token
from davsp.lvlm.remote import RemoteLVLM
from davsp.prompts.beside import texts
from davsp.prompts.gate import Served, Threshold
from davsp.serve.gate import HEAD
from davsp.serve.model import model_app
from davsp.serve.probe import probe
from davsp.serve.settings import ServeSettings
from proxy import GOOD, TEXT, Client, Events, Upstream, border, client, data_url, image_part, listening, text_part, user
from test_serve_end_to_end import started
from test_serve_gate import ASK, IMAGE, TOOLS, canvas, metric, pictures
from tiny import queries

SORRY = "I'm sorry."
GOOD_ONES, BAD_ONES = queries("benign", 14), queries("malicious", 8)


def served(at: float = 0.0, **more: Any) -> Served:
    prompt = border().prompt
    first = Threshold(threshold=at, benign=9, malicious=9, refused_benign=0, refused_malicious=9, auroc=1.0)
    facts = {"pixels": prompt.pixels_sha256(), "texts": texts(prompt), "model": "m", "refusal_text": SORRY, "top": 5}  # type: ignore[arg-type]
    return Served(**facts | {"rate": 0.1, "first": first} | more)


def token(**chances: float) -> Token:
    """The likeliest tokens by their chances."""
    top = [(text, math.log(chance)) for text, chance in sorted(chances.items(), key=lambda pair: -pair[1])]
    return Token(*top[0], tuple(top))


def says(*top: tuple[str, float], **more: Any) -> dict[str, Any]:
    """The upstream's reply of one token, with the chances at its place."""
    told = [{"token": text, "logprob": math.log(chance), "bytes": list(text.encode())} for text, chance in top]
    content = [told[0] | {"top_logprobs": told}] if told else None
    message = {"role": "assistant", "content": top[0][0] if top else "a"} | more
    choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": content and {"content": content}}
    return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}}


REFUSES, COMPLIES = says((" I", 0.9), ("A", 0.05)), says(("A", 0.9), ("I", 0.05))


def first(*answers: Any, at: float = 0.0, **settings: Any) -> Client:
    """A proxy before an upstream that gives one answer after the other."""
    caller = client(Gate(border(), "first", served=served(at)), **settings)
    caller.upstream.answer = lambda number, body: answers[number]
    return caller


# -- the score ---------------------------------------------------------------------------------------------------------


def test_the_score_is_the_log_odds_of_tokens_that_the_refusal_begins_with():
    for text in ("I", " I", "▁I", "ĠI", "I'm", "I'm sorry. Ask", "\nI"):
        assert log_odds(token(**{text: 0.8, "A": 0.1}), SORRY) == pytest.approx(math.log(0.8 / 0.2))
    assert log_odds(token(I=0.5, **{" I": 0.2}, A=0.1), SORRY) == pytest.approx(math.log(0.7 / 0.3))
    for text in ("It", "i", " ", "", "sorry"):
        assert log_odds(token(**{text: 0.8, "A": 0.1}), SORRY) == pytest.approx(
            math.log(0.1 / 0.9)
        )  # as the next could be
    assert log_odds(Token("I", math.log(0.6), (("A", math.log(0.1)),)), SORRY) == pytest.approx(math.log(0.6 / 0.4))
    assert -21 < log_odds(token(A=1.0), SORRY) < -20 and 20 < log_odds(token(I=1.0), SORRY) < 21


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=12), st.integers(1, 12), st.data())
def test_what_is_not_listed_counts_as_much_as_it_can(weights: list[float], top: int, data: st.DataObject):
    """With fewer tokens listed the score is never lower, so never more likely to pass."""
    total = sum(weights)
    place = data.draw(st.integers(0, len(weights) - 1))
    chances = {"I" if i == place else f"a{i}": w / total for i, w in enumerate(weights)}
    whole = sorted(((t, math.log(c)) for t, c in chances.items()), key=lambda pair: -pair[1])
    cut = Token(*whole[0], tuple(whole[:top]))
    assert log_odds(cut, SORRY) >= log_odds(Token(*whole[0], tuple(whole)), SORRY) - 1e-9


# -- the proxy ---------------------------------------------------------------------------------------------------------


def test_what_passes_is_answered_with_its_picture_as_it_came():
    caller = first(COMPLIES, GOOD)
    response = caller.post(
        ASK, temperature=0.7, max_completion_tokens=200, logprobs=False, n=2, tools=TOOLS, stop=["I"]
    )
    look, sent = caller.upstream.bodies
    assert response.headers[HEAD] == "passed" and metric(caller, 'davsp_gate_total{road="passed"}')
    assert response.json() == GOOD | {"usage": {"prompt_tokens": 13, "completion_tokens": 3, "total_tokens": 16}}
    assert {name: value for name, value in look.items() if name not in ("messages", "tools")} == {
        "model": "m", "max_completion_tokens": 1, "temperature": 0, "top_p": 1, "repetition_penalty": 1, "tool_choice": "none",
        "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip
    assert pictures(look) == [canvas(IMAGE)] and look["messages"][0]["content"][1] == text_part(f"{TEXT} what is this")
    assert pictures(sent) == [IMAGE.tobytes()] and (sent["logprobs"], sent["n"], sent["max_completion_tokens"]) == (
        False,
        2,
        200,
    )
    assert "top_logprobs" not in sent


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_the_words_of_the_calibration_and_asks_no_more(stream: bool):
    caller = first(REFUSES)
    response = caller.post(user("hello"), ASK, stream=stream, stream_options={"include_usage": True}, max_tokens=300)
    assert response.headers[HEAD] == "refused" and len(caller.upstream.bodies) == 1
    assert caller.upstream.bodies[0]["messages"][0] == user(f"{TEXT} hello")
    if not stream:
        choice = response.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"], response.json()["usage"]["total_tokens"]) == (
            SORRY,
            "stop",
            11,
        )
        return
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == SORRY
    assert chunks[-1]["usage"]["total_tokens"] == 11


def test_a_stream_starts_once_the_gate_has_passed():
    stream = Events(b'data: {"choices":[]}\n\n')
    response = first(COMPLIES, stream.response()).post(ASK, stream=True)
    assert response.headers[HEAD] == "passed" and response.text == 'data: {"choices":[]}\n\n'


def test_the_threshold_decides():
    middle = math.log(0.9 / 0.1)
    assert first(REFUSES, GOOD, at=middle + 0.01).post(ASK).headers[HEAD] == "passed"
    assert first(REFUSES, GOOD, at=middle - 0.01).post(ASK).headers[HEAD] == "refused"
    unlisted = says(("A", 0.5), ("B", 0.1))  # I may have up to 0.1
    assert first(unlisted, GOOD, at=math.log(0.1 / 0.9) - 0.01).post(ASK).headers[HEAD] == "refused"
    assert first(unlisted, GOOD, at=math.log(0.1 / 0.9) + 0.01).post(ASK).headers[HEAD] == "passed"


@pytest.mark.parametrize(
    ("look", "status", "why"),
    [
        (says(), 502, "no log-probabilities"), (GOOD, 502, "no log-probabilities"), (httpx2.Response(400, json={"error": {"message": "no logprobs"}}), 400, "no logprobs"),
        (says(("A", 0.9), reasoning_content="hm"), 502, "a thought stands before"), (says(("<think>", 0.9)), 502, "a thought stands before"),
        (httpx2.ReadTimeout(""), 504, "in time"), ({"choices": []}, 502, "no answer"), (Events(b"data: {}\n\n").response(), 502, "no single message"),
    ],
)  # fmt: skip
def test_without_log_probabilities_nothing_goes_on(look: Any, status: int, why: str):
    caller = first(look, GOOD)
    response = caller.post(ASK)
    assert response.status_code == status and why in response.text and HEAD not in response.headers
    assert len(caller.upstream.bodies) == 1 and pictures(caller.upstream.bodies[0]) == [canvas(IMAGE)]


def test_what_the_threshold_was_not_made_for_is_not_asked():
    caller = first(COMPLIES, GOOD)
    other = caller.raw(json.dumps({"model": "other" + caller.proxy.suffix, "messages": [ASK]}).encode())
    assert other.status_code == 404 and "calibrated on 'm'" in other.text
    body = json.dumps({"model": caller.model, "input": "what is this"}).encode()
    response = caller.raw(body, path="/v1/responses")
    assert response.status_code == 501 and "/v1/chat/completions" in response.text and not caller.upstream.bodies


# -- the start ---------------------------------------------------------------------------------------------------------


def probed(answer: Any) -> list[str]:
    upstream, settings = Upstream(), ServeSettings.of(upstream="http://upstream.test/v1")
    upstream.answer = lambda number, body: answer if "logprobs" in body else GOOD
    return asyncio.run(probe(settings, "m", upstream, served()))


def test_the_start_asks_for_log_probabilities():
    assert probed(REFUSES)[0] == "the upstream's m tells the log-probabilities of 2 tokens at the answer's first place."
    for answer, seen in (
        (GOOD, "a reply without them"),
        (httpx2.Response(400, json={}), "400"),
        (httpx2.Response(404, json={}), "404"),
    ):
        with pytest.raises(
            DavspError, match=rf"when asked for 5 top_logprobs \(it answered {seen}\).*take gate\+NAME=FOLDER"
        ):
            probed(answer)
    assert "could not be probed: it answered 503" in probed(httpx2.Response(503, json={}))[0]


# -- from the calibration to the client --------------------------------------------------------------------------------


def test_the_file_beside_the_prompt(tmp_path: Path):
    prompt: Any = border().prompt
    plain = Gate(border(), "answer").sha256()
    prompt.served = served(1.5)
    prompt.save_pretrained(tmp_path)
    loaded = VisualSafetyPrompt.from_pretrained(tmp_path)
    assert loaded.served is not None and loaded.gate is None and loaded.served.first.threshold == 1.5
    gate = load_defense(f"gate:first+davsp={tmp_path}")
    assert isinstance(gate, Gate) and gate.served == loaded.served
    assert "calls the model m" in (tmp_path / "README.md").read_text()
    assert load_defense(f"gate+davsp={tmp_path}").sha256() == plain  # the other kinds do not hang on it
    with pytest.raises(DavspError, match="no threshold yet"):
        load_defense(f"gate:states+davsp={tmp_path}")
    facts = json.loads((tmp_path / "gate_served.json").read_text())
    facts["first"]["threshold"] = 9
    (tmp_path / "gate_served.json").write_text(json.dumps(facts))
    with pytest.raises(DavspError, match=r"gate_served\.json was changed since"):
        VisualSafetyPrompt.from_pretrained(tmp_path)
    VisualSafetyPrompt.create(56, 8).save_pretrained(tmp_path)
    assert not (tmp_path / "gate_served.json").exists()


def test_what_does_not_go_together(lvlm: LVLM):
    remote, gate = RemoteLVLM("m", "http://127.0.0.1:9/v1", canvas=56), Gate(border(), "first", served=served())
    gate.check(remote)
    for one, model, why in (
        (gate, lvlm, "calibrated on a server, not on a model loaded here"), (gate, RemoteLVLM("n", "http://127.0.0.1:9/v1", canvas=56), "on a server's m, not on n"),
    ):  # fmt: skip
        with pytest.raises(DavspError, match=why):
            one.check(model)
    with pytest.raises(DavspError, match=r"there are 14 benign queries .* at least 598"):
        calibrate_served(remote, border(), (BAD_ONES, GOOD_ONES), "sorry no")


@pytest.fixture(scope="module")
def model(lvlm: LVLM) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        with listening(model_app(lvlm, "m", ServeSettings.of(upstream=""))) as url:
            yield url


def test_the_whole_road(model: str, lvlm: LVLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """davsp gate through the server → davsp serve → the openai client; davsp eval's answers on the same server and on the model."""
    prompt = tmp_path / "prompt"
    border().prompt.save_pretrained(prompt)
    held = []
    for name, part in (("held-malicious", BAD_ONES), ("held-benign", GOOD_ONES)):
        save_queries(tmp_path / name, part)
        held += [f"--{name}", tmp_path / name]
    server = ["--engine", "openai", "--base-url", model, "--api-model", "m", "--canvas", "56"]
    command = ["gate", prompt, *server, "--refusal", "what no", "--confidence", "0", "--false-refusals"]
    assert run(*command, "0.005", *held) == 2 and "at least 199" in capsys.readouterr().err
    assert run(*command, "0.4", *held[:2]) == 2 and "--held-benign" in capsys.readouterr().err
    assert (
        run(*command, "0.4", *held, "--vector", prompt) == 2
        and "go with a model loaded here" in capsys.readouterr().err
    )
    assert run(*command, "0.4", *held, "--top-logprobs", "4") == 0 and "40.00%" in capsys.readouterr().out
    assert run("info", prompt) == 0 and "gate_served.json: a threshold for at most 40.00%" in capsys.readouterr().out

    gate = load_defense(f"gate:first+davsp={prompt}")
    assert isinstance(gate, Gate) and gate.served is not None and gate.served.top == 4
    inner = VisualPrompt(VisualSafetyPrompt.from_pretrained(prompt))
    some = [replace(q, id=f"test-{q.id}") for q in (*BAD_ONES, *GOOD_ONES)]
    scores = []
    for query in inner.prepare(some):
        (answer,) = lvlm.likely(lvlm.preprocess([query.picture()]), [query.question], 1, 4)  # type: ignore[list-item]
        scores.append(log_odds(answer.tokens[0], "what no"))
    at = gate.served.first.threshold
    assert at in [pytest.approx(s, abs=1e-4) for s in scores[8:]]
    clear = [i for i, s in enumerate(scores) if abs(s - at) > 1e-3]
    expected = [
        "what no" if s > at else r.text
        for s, r in zip(scores, NoDefense().respond(lvlm, some, max_new_tokens=4), strict=True)
    ]
    roads = {s > at for s in scores}
    assert roads == {True, False}

    remote = RemoteLVLM("m", model, canvas=56)
    responses = gate.respond(remote, some, max_new_tokens=4)
    assert [responses[i].text for i in clear] == [expected[i] for i in clear]
    assert [responses[i].calls for i in clear] == [1 if scores[i] > at else 2 for i in clear]

    proxy = started("serve", "--upstream", model, "--canvas", "56", "--defense", f"gate:first+davsp={prompt}")
    assert "tells the log-probabilities of 4 tokens" in capsys.readouterr().err
    with listening(proxy) as url, openai.OpenAI(base_url=url, api_key="any") as openai_client:
        (name,) = (one.id for one in openai_client.models.list())
        for i in clear:
            parts = image_part(data_url(some[i].picture())), text_part(some[i].question)  # type: ignore[arg-type]
            whole = openai_client.chat.completions.with_raw_response.create(
                model=name, messages=[user(*parts)], max_tokens=4, temperature=0
            )
            assert whole.headers[HEAD] == ("refused" if scores[i] > at else "passed")
            assert whole.parse().choices[0].message.content == expected[i]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    prompt: Any = border().prompt
    prompt.served = served()
    prompt.save_pretrained(tmp_path)
    apps: list[Any] = []
    monkeypatch.setattr(serve, "_run", lambda *args: apps.append(args))
    command = [
        "serve",
        "--upstream",
        "http://127.0.0.1:9/v1",
        "--canvas",
        "56",
        "--no-probe",
        "--defense",
        f"gate:first+davsp={tmp_path}",
    ]
    assert run(*command) == 0 and len(apps) == 1
    assert run(*command, "--model", "n") == 2 and "on a server's m, not on n" in capsys.readouterr().err
