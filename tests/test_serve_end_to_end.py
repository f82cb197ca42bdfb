"""The commands themselves: the `openai` client → davsp serve → davsp serve-model, and the answers of `davsp eval`."""

import asyncio
import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from typing import Any

import openai
import pytest

from command import run
from davsp import LVLM, Query, VisualSafetyPrompt, embedded
from davsp.defenses import ECSO, Defense, Gate, NoDefense, VisualPrompt
from davsp.embedded.data import Protocol
from davsp.embedded.ecso_templates import TEMPLATES
from davsp.serve.app import HASH, Proxy
from davsp.serve.gate import HEAD
from davsp.serve.probe import probe
from davsp.serve.settings import ServeSettings
from proxy import data_url, image_part, listening, text_part, user

TOKENS = 12


@pytest.fixture(scope="module")
def prompt(mini: LVLM) -> VisualSafetyPrompt:
    return VisualSafetyPrompt.create(mini.canvas, embedded.PADDING, "random", text=embedded.SAFETY_TEXT).quantised()


@pytest.fixture(scope="module")
def eval_queries(protocol: Protocol) -> list[Query]:
    return [*protocol.test[::80], Query("w", "what colour is the car ?", "benign", "utility")]


@pytest.fixture(scope="module")
def want(mini: LVLM, prompt: VisualSafetyPrompt, eval_queries: list[Query]) -> list[str]:
    """The defended answers, as `davsp eval` has them."""
    return offline(mini, VisualPrompt(prompt), eval_queries)


def message(query: Query) -> dict[str, Any]:
    image = query.picture()
    return user(query.question) if image is None else user(image_part(data_url(image)), text_part(query.question))


def started(*arguments: str) -> Any:
    """The app that `davsp ARGUMENTS` would run."""
    apps: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("davsp.cli.serve._run", lambda app, host, port: apps.append(app))
        assert run(*arguments) == 0
    return apps[0]


@pytest.fixture(scope="module")
def served(prompt: VisualSafetyPrompt, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """Addresses of model and proxy, and what the proxy said."""
    folder = tmp_path_factory.mktemp("served")
    prompt.save_pretrained(folder / "prompt")
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as log:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("PROXY_TOKEN", "secret-1")
        with listening(started("serve-model")) as model:
            options = ("--prompt", str(folder / "prompt"), "--canvas", str(prompt.canvas), "--token-env", "PROXY_TOKEN")
            proxy = started("serve", "--upstream", model, *options)
            with listening(proxy) as url:
                yield model, url, log.getvalue()


def offline(mini: LVLM, defense: Defense, eval_queries: list[Query]) -> list[str]:
    return [response.text for response in defense.respond(mini, eval_queries, max_new_tokens=TOKENS)]


def options(model: str, query: Query) -> dict[str, Any]:
    return {"model": model, "messages": [message(query)], "max_tokens": TOKENS, "temperature": 0}


def test_openai_client_gets_the_answers_of_eval(served, mini, prompt, eval_queries, want):
    _, url, log = served
    assert len(set(want)) > 2 and want != offline(mini, NoDefense(), eval_queries)
    with openai.OpenAI(base_url=url, api_key="secret-1") as client:
        (model,) = (completions.id for completions in client.models.list())
        assert model == f"davsp-mini+davsp-{VisualPrompt(prompt).sha256()[:12]}"
        completions = [
            client.chat.completions.with_raw_response.create(**options(model, query)) for query in eval_queries
        ]
        assert [one.parse().choices[0].message.content for one in completions] == want
        assert {one.headers[HASH] for one in completions} == {VisualPrompt(prompt).sha256()}
        stream = client.chat.completions.create(**options(model, eval_queries[0]), stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == want[0]
        with pytest.raises(openai.NotFoundError, match=r"under this defense it is .davsp-mini\+davsp-"):
            client.chat.completions.create(**options("davsp-mini", eval_queries[0]))
        with pytest.raises(openai.BadRequestError, match="takes one picture"):  # the upstream's own words
            client.chat.completions.create(model=model, messages=[user(*message(eval_queries[0])["content"] * 2)])
    with (
        openai.OpenAI(base_url=url, api_key="secret-2", max_retries=0) as wrong,
        pytest.raises(openai.AuthenticationError),
    ):
        wrong.models.list()
    assert (
        f"canvas of {mini.canvas}x{mini.canvas} pixels as it is sent, to the pixel" in log
        and model.split("+")[1] in log
    )
    assert not any(query.question in log for query in eval_queries)


def test_async_client(served, prompt, eval_queries, want):
    _, url, _ = served
    model = f"davsp-mini+davsp-{VisualPrompt(prompt).sha256()[:12]}"

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="secret-1") as client:
            completions = await asyncio.gather(
                *(client.chat.completions.create(**options(model, q)) for q in eval_queries[-3:])
            )
            stream = await client.chat.completions.create(
                **options(model, eval_queries[0]), stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].usage.prompt_tokens > 144
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            return [*(one.choices[0].message.content for one in completions), text]

    assert asyncio.run(ask()) == [*want[-3:], want[0]]


def test_ecso_and_adaptive_give_the_answers_of_eval(served, mini, prompt, eval_queries):
    davsp, calls, some = VisualPrompt(prompt), set(), eval_queries[::2]
    doubtful = replace(TEMPLATES, harm="{query}")  # answered by neither yes nor no, which counts as harmful
    for defense in (
        ECSO(davsp, templates=TEMPLATES),
        ECSO(davsp, templates=doubtful),
        ECSO(instead=davsp, templates=doubtful),
    ):
        proxy = Proxy(defense, ServeSettings.of(upstream=served[0], canvas=mini.canvas))
        with listening(proxy.app) as url, openai.OpenAI(base_url=url, api_key="any") as client:
            completions = [client.chat.completions.create(**options("davsp-mini" + proxy.suffix, q)) for q in some]
        responses = defense.respond(mini, some, max_new_tokens=TOKENS)
        assert [one.choices[0].message.content for one in completions] == [response.text for response in responses]
        calls |= {response.calls for response in responses}
        assert [one.usage.prompt_tokens for one in completions] == [response.prompt_tokens for response in responses]
    assert {2, 3, 4} <= calls  # let pass, answered again, answered from a caption


def test_the_gate_gives_the_answers_of_eval(served, mini, prompt, eval_queries):
    gate, some = Gate(VisualPrompt(prompt)), eval_queries[::2]
    proxy = Proxy(gate, ServeSettings.of(upstream=served[0], canvas=mini.canvas))
    asked = [options("davsp-mini" + proxy.suffix, query) | {"max_tokens": 20} for query in some]
    with listening(proxy.app) as url, openai.OpenAI(base_url=url, api_key="any") as client:
        replies = [client.chat.completions.with_raw_response.create(**one) for one in asked]
    responses = gate.respond(mini, some, max_new_tokens=20)
    assert [reply.parse().choices[0].message.content for reply in replies] == [r.text for r in responses]
    assert [reply.parse().usage.prompt_tokens for reply in replies] == [r.prompt_tokens for r in responses]
    roads = [reply.headers[HEAD] for reply in replies]
    assert roads == ["refused" if r.calls == 1 else "passed" for r in responses] and set(roads) == {"refused", "passed"}


def test_probe_finds_a_model_that_resamples(served):
    with pytest.raises(Exception, match="resamples a canvas of 112x112"):
        asyncio.run(probe(ServeSettings.of(upstream=served[0], canvas=112), None))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give either --prompt or --defense"),
        (["--prompt", "PROMPT", "--defense", "ecso"], "give either --prompt or --defense"),
        (["--defense", "none"], "undefended"),
        (["--defense", "davsp"], "is not known"),
        (["--prompt", "PROMPT"], "--canvas"),
        (["--prompt", "PROMPT", "--canvas", "336"], "use a prompt made for this model"),
        (["--defense", "ecso-adaptive+PROMPT", "--canvas", "336"], "use a prompt made for this model"),
        (["--defense", "ecso", "--host", "0.0.0.0"], "--token-env"),
        (["--defense", "ecso", "--allow-host", "*.org"], "--allow-host"),
        (["--defense", "ecso", "--image-free", "drop"], "--image-free"),
        (["--defense", "ecso", "--upstream", "ftp://x"], "is no address"),
        (["--defense", "ecso", "--upstream", "http://u:p@x/v1"], "holds a password"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("davsp.cli.serve._run", lambda *_: pytest.fail("it runs"))
    VisualSafetyPrompt.create(56, 8, "random").save_pretrained(tmp_path)
    given = [argument.replace("PROMPT", str(tmp_path)) for argument in arguments]
    assert run("serve", "--upstream", "http://127.0.0.1:9/v1", "--no-probe", *given) == 2
    log = capsys.readouterr().err
    assert says in log and "Traceback" not in log
