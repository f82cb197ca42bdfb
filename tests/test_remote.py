"""The engine on a server: the same answers as here, the very pixels, and no answer that was not given."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command import run
from davsp import LVLM, DavspError, HarmfulnessVector, Query, VisualSafetyPrompt, embedded
from davsp.benchmarks.custom import save_queries
from davsp.defenses import Defense, NoDefense, SafetyText, VisualPrompt
from davsp.embedded.data import Protocol
from davsp.evaluation import evaluate
from davsp.lvlm import AnsweringLVLM, fingerprint, loaded, model_facts
from davsp.lvlm.remote import RemoteLVLM
from davsp.lvlm.templates import read_extra
from model_server import ModelServer, model_server
from tiny import queries


@pytest.fixture
def server(lvlm: LVLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with model_server(lvlm) as server:
        yield server


def remote(server: ModelServer, **options: Any) -> RemoteLVLM:
    return RemoteLVLM("org/m", server.url, **{"attempts": 3, "backoff": 0.01, "concurrency": 4} | options)


def test_davsp_mini_served_answers_as_here(
    mini: LVLM, protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Undefended pictures of any size, a border's canvas, a text alone, questions in words."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    asked = [
        *protocol.test[::47],
        Query("w", "what colour is the car ?", "benign", "utility", reference="red"),
    ]
    border = VisualSafetyPrompt.create(mini.canvas, embedded.PADDING, "random", text=embedded.SAFETY_TEXT)
    defenses: dict[str, Defense] = {
        "none": NoDefense(), "safety-text": SafetyText(embedded.SAFETY_TEXT), "davsp": VisualPrompt(border),
    }  # fmt: skip
    here = evaluate(mini, defenses, asked, max_new_tokens=16)
    with model_server(mini) as server:
        there = evaluate(remote(server, canvas=mini.canvas), defenses, asked, tmp_path, max_new_tokens=16)
    for name in defenses:
        assert [r.text for r in there.responses[name]] == [r.text for r in here.responses[name]]
    assert len({r.text for r in here.responses["none"]}) > 5 and "" not in {r.text for r in here.responses["none"]}
    canvas = border.image(asked[0].picture()).tobytes()  # type: ignore[arg-type]
    assert canvas in {p.tobytes() for p in server.pictures if p is not None}
    assert {b["model"] for b in server.bodies} == {"org/m"} and None in server.pictures
    assert {(b["temperature"], b["max_tokens"]) for b in server.bodies} == {(0.0, 16)}
    assert 1 < server.most_under_way <= 4


def test_a_failing_server_is_asked_again(server: ModelServer) -> None:
    asked = queries("benign", 4)
    here = [r.text for r in NoDefense().respond(server.lvlm, asked, max_new_tokens=4)]
    faults: dict[int, Any] = {0: 500, 1: 429, 2: {}, 5: {"message": {"content": None}, "finish_reason": "stop"}}
    server.change = lambda number, choice: faults.get(number, choice)
    # all four may fall on one question, whose next request comes before the others' first where the machine is busy
    there = NoDefense().respond(remote(server, attempts=5), asked, max_new_tokens=4)
    assert [r.text for r in there] == here and len(server.bodies) == 8


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        (500, "failed (500): made to fail"),
        (400, "failed (400): made to fail"),
        ({"message": {"content": "a"}, "finish_reason": "content_filter"}, "content filter"),
        ({"message": {"content": "a"}, "finish_reason": "tool_calls"}, "ended by 'tool_calls'"),
        ({"message": {"content": None}, "finish_reason": "stop"}, "no text"),
        ({"text": "a"}, "holds no answer"),
    ],
)
def test_what_is_no_answer_stops_the_run(server: ModelServer, tmp_path: Path, choice: Any, says: str) -> None:
    """Nothing is written for the batch, and a run that is started again asks for it."""
    asked = queries("malicious", 4)
    server.change = lambda number, good: choice if number > 1 else good
    with pytest.raises(DavspError) as stop:
        evaluate(remote(server, concurrency=1), {"none": NoDefense()}, asked, tmp_path, batch_size=2, max_new_tokens=4)
    assert says in str(stop.value) and "run again to go on" in str(stop.value)
    before = len(server.bodies)
    server.change = lambda number, good: good
    whole = evaluate(remote(server), {"none": NoDefense()}, asked, tmp_path, batch_size=2, max_new_tokens=4)
    assert len(whole.responses["none"]) == 4 and len(server.bodies) == before + 2


def test_an_answer_cut_at_its_length_and_an_empty_one_are_answers(server: ModelServer) -> None:
    ends = [
        {"message": {"content": "a red"}, "finish_reason": "length"},
        {"message": {"content": ""}, "finish_reason": "stop"},
    ]
    server.change = lambda number, choice: ends[number]
    assert remote(server, concurrency=1).generate(None, ["what is this", "what is that"]) == ["a red", ""]


@pytest.mark.parametrize(
    ("usage", "counted"),
    [({"prompt_tokens": 31, "total_tokens": 40}, 31), (None, None), ({}, None), ({"prompt_tokens": "31"}, None)],
)
def test_tokens_are_as_the_server_counts_them(server: ModelServer, usage: Any, counted: int | None) -> None:
    """It does not tell which are a picture's."""
    server.usage = usage
    (response,) = NoDefense().respond(remote(server), queries("benign", 1), max_new_tokens=2)
    assert (response.calls, response.prompt_tokens, response.image_tokens) == (1, counted, None)


def test_half_a_surrogate_pair_can_be_written(server: ModelServer, tmp_path: Path) -> None:
    """JSON may hold one, UTF-8 can't."""
    server.change = lambda number, choice: {"message": {"content": "a \ud83d b"}, "finish_reason": "stop"}
    evaluation = evaluate(remote(server), {"none": NoDefense()}, queries("benign", 1), tmp_path, max_new_tokens=4)
    assert [r.text for r in evaluation.responses["none"]] == ["a ? b"]


def test_what_a_server_cannot_do_is_said(server: ModelServer, vector: HarmfulnessVector) -> None:
    border = VisualPrompt(VisualSafetyPrompt.create(56, 8, "random"))
    asked = queries("benign", 1)
    with pytest.raises(DavspError, match="--canvas"):
        border.respond(remote(server), asked)
    with pytest.raises(DavspError, match=r"is 56x56 pixels, but org/m takes 336x336"):
        border.respond(remote(server, canvas=336), asked)
    with pytest.raises(DavspError, match="no hidden states"):
        NoDefense().respond(remote(server), asked, vector)
    with pytest.raises(DavspError, match="no hidden states"):
        remote(server).step(None, ["what"], 1)


def test_it_answers_and_is_no_more(lvlm: LVLM, server: ModelServer) -> None:
    served = remote(server)
    assert isinstance(served, AnsweringLVLM) and not isinstance(served, LVLM)
    assert isinstance(lvlm, AnsweringLVLM) and loaded(lvlm) is lvlm
    with pytest.raises(DavspError, match="no hidden states; leave out the vector"):
        loaded(served)
    with pytest.raises(DavspError, match=r"^give another$"):
        loaded(served, "give another")


def test_key_and_fingerprint(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_KEY", "sk-secret")
    remote(server, api_key_env="MODEL_KEY").generate(None, ["what is this"], 2)
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    remote(server).generate(None, ["what is this"], 2)
    assert "Authorization" not in server.headers[1]
    monkeypatch.delenv("MODEL_KEY")
    with pytest.raises(DavspError, match="put the model's key there"):
        remote(server, api_key_env="MODEL_KEY")
    assert fingerprint(remote(server)) == fingerprint(remote(server)) != fingerprint(remote(server, canvas=56))
    other = RemoteLVLM("org/m", "http://127.0.0.1:9/v1")
    assert fingerprint(other) != fingerprint(remote(server))


def test_questions_are_spread_over_servers_and_none_is_dropped(
    lvlm: LVLM, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = queries("benign", 7)
    here = [r.text for r in NoDefense().respond(lvlm, asked, max_new_tokens=4)]
    with model_server(lvlm) as second:
        both = RemoteLVLM("org/m", [server.url, second.url], attempts=2, backoff=0.01, concurrency=2)
        assert [r.text for r in NoDefense().respond(both, asked, max_new_tokens=4)] == here
        assert (len(server.bodies), len(second.bodies)) == (4, 3)
        turned = RemoteLVLM("org/m", [second.url, server.url])
        assert fingerprint(turned) == fingerprint(both) != fingerprint(remote(server))
        assert both.server == ", ".join(sorted([server.url, second.url]))
        second.change = lambda number, choice: 500
        with pytest.raises(DavspError, match=r"gave no answer to .*failed \(500\): made to fail"):
            both.generate(None, ["what is this"] * 4, 4)
        assert RemoteLVLM("org/m", [second.url, server.url]).generate(None, [], 4) == []
    with pytest.raises(DavspError, match="cannot be reached"):
        both.generate(None, ["what is this"] * 4, 4)
    with pytest.raises(DavspError, match="is named twice"):
        RemoteLVLM("org/m", [server.url, server.url])


def test_fields_of_ones_own_go_with_every_request_and_make_another_model(server: ModelServer) -> None:
    plain, more = remote(server), remote(server, extra_body={"top_k": 1, "vllm_xargs": {"a": [2]}})
    assert more.generate(None, ["what is this"], 4) == plain.generate(None, ["what is this"], 4)
    extra = {name: server.bodies[0][name] for name in server.bodies[0] if name not in server.bodies[1]}
    assert extra == {"top_k": 1, "vllm_xargs": {"a": [2]}}
    assert fingerprint(more) != fingerprint(plain) and model_facts(more)["extra_body"] == extra
    assert "extra_body" not in model_facts(plain)
    for name in ("temperature", "messages", "chat_template_kwargs", "max_completion_tokens"):
        with pytest.raises(DavspError, match=f"--extra-body {name} is a field that davsp sets itself"):
            remote(server, extra_body={name: 1})


def test_what_extra_body_says() -> None:
    given = ["top_k=1", "mode=fast", 'a={"b": [true]}', '{"c": null, "d": "e"}']
    assert read_extra(given) == {"top_k": 1, "mode": "fast", "a": {"b": [True]}, "c": None, "d": "e"}
    for wrong in (["top_k"], ["=1"], ["[1]"], ["{x}"]):
        with pytest.raises(DavspError, match="is not KEY=VALUE"):
            read_extra(wrong)
    with pytest.raises(DavspError, match="gives top_k twice"):
        read_extra(["top_k=1", '{"top_k": 2}'])


def test_eval_by_the_command_line(
    lvlm: LVLM, server: ModelServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_queries(tmp_path / "data", queries("malicious", 4))
    command = [
        "eval",
        "--engine",
        "openai",
        "--api-model",
        "org/m",
        "--queries",
        tmp_path / "data",
        "--defense",
        "none",
    ]
    command += ["--max-unscored", "1", "--max-new-tokens", "4", "--out", tmp_path / "run"]
    with model_server(lvlm) as second:
        urls = ["--base-url", server.url, "--base-url", second.url]
        assert run(*command, *urls, "--extra-body", "top_k=1") == 0
        assert {body["top_k"] for body in [*server.bodies, *second.bodies]} == {1} and second.bodies
        assert json.loads((tmp_path / "run" / "manifest.json").read_text())["extra_body"] == {"top_k": 1}
        capsys.readouterr()
        assert run(*command, *urls) == 2
        assert "holds answers of another run (another model" in capsys.readouterr().err
        gate = ["gate", tmp_path / "none", "--engine", "openai", "--api-model", "org/m", "--canvas", "56", *urls]
        assert run(*gate) == 2 and "a gate is calibrated on one server" in capsys.readouterr().err
    assert run("eval", "--extra-body", "a=1") == 2
    assert "--extra-body goes with --engine openai" in capsys.readouterr().err
