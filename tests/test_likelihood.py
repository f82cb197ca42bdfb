"""The tokens of an answer and their log-probabilities: here, in OpenAI's form, and read back from a server."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
import torch

from davsp import LVLM
from davsp.lvlm.remote import RemoteLVLM, read_answer
from davsp.serve.model import model_app
from davsp.serve.settings import ServeSettings
from proxy import data_url, image_part, listening, text_part, user
from tiny import picture

PICTURES = [picture(1, (56, 56)), picture(2, (56, 56))]
QUESTIONS = ["what is this", "how do you make a cake in the image"]


@pytest.fixture(scope="module")
def server(lvlm: LVLM) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        with listening(model_app(lvlm, "m", ServeSettings.of(upstream=""))) as url:
            yield url


def asked(i: int = 0, **more: Any) -> dict[str, Any]:
    parts = image_part(data_url(PICTURES[i])), text_part(QUESTIONS[i])
    return {"model": "m", "messages": [user(*parts)], "max_tokens": 6, "temperature": 0, "logprobs": True} | more


def test_they_are_those_of_a_plain_forward_pass(lvlm: LVLM):
    canvas = lvlm.preprocess(PICTURES)
    answers = lvlm.likely(canvas, QUESTIONS, 6, 4)
    assert [answer._replace(tokens=()) for answer in answers] == lvlm.ask(canvas, QUESTIONS, 6)
    for i, answer in enumerate(answers):
        tokens = lvlm.encode([QUESTIONS[i]], lvlm.sizes(canvas[i : i + 1]))
        said = lvlm.tokenizer.convert_tokens_to_ids([token.top[0][0].strip() for token in answer.tokens])
        assert len(said) == 6 and lvlm.tokenizer.decode(said, skip_special_tokens=True) == answer.text
        inputs = lvlm.inputs(tokens, canvas[i : i + 1])
        ids = torch.cat([inputs.pop("input_ids"), torch.tensor([said])], 1)
        with torch.no_grad():
            logprobs = lvlm.model(input_ids=ids, **inputs).logits[0].log_softmax(-1)[-len(said) - 1 :]
        for token, one, row in zip(answer.tokens, said, logprobs, strict=False):
            assert token.logprob == pytest.approx(float(row[one]), abs=1e-4) and len(token.top) == 4
            assert [value for _, value in token.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
            assert token.top[0][1] == token.logprob and token.text in (token.top[0][0], "")
        assert "".join(token.text for token in answer.tokens).strip() == answer.text


def test_a_server_tells_them_in_openais_form(lvlm: LVLM, server: str):
    (want,) = lvlm.likely(lvlm.preprocess(PICTURES[:1]), QUESTIONS[:1], 6, 3)
    with openai.OpenAI(base_url=server, api_key="any") as client:
        whole = client.chat.completions.create(**asked(top_logprobs=3))
        told = whole.choices[0].logprobs.content
        assert [one.token for one in told] == [token.text for token in want.tokens] and want.text == whole.choices[
            0
        ].message.content
        for one, token in zip(told, want.tokens, strict=True):
            assert one.logprob == pytest.approx(token.logprob) and bytes(one.bytes).decode() == token.text
            assert [(t.token, pytest.approx(t.logprob)) for t in one.top_logprobs] == list(token.top)
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked(top_logprobs=3), stream=True)]
        assert "".join(chunk.delta.content or "" for chunk in chunks).strip() == want.text
        assert [one for chunk in chunks if chunk.logprobs for one in chunk.logprobs.content] == told
        assert client.chat.completions.create(**asked()).choices[0].logprobs.content[0].top_logprobs == []
        assert client.chat.completions.create(**asked(logprobs=False)).choices[0].logprobs is None
        for wrong in (
            {"top_logprobs": 21},
            {"logprobs": None, "top_logprobs": 2},
            {"logprobs": 3},
            {"top_logprobs": True},
        ):
            with pytest.raises(openai.BadRequestError, match="logprobs must be"):
                client.chat.completions.create(**asked(**wrong))


def test_they_are_read_back(lvlm: LVLM, server: str):
    remote = RemoteLVLM("m", server, canvas=56)
    here = lvlm.likely(lvlm.preprocess(PICTURES), QUESTIONS, 6, 5)
    for mine, theirs in zip(here, remote.likely(remote.preprocess(PICTURES), QUESTIONS, 6, 5), strict=True):
        assert theirs.text == mine.text and [t.text for t in theirs.tokens] == [t.text for t in mine.tokens]
        values = [value for token in theirs.tokens for _, value in token.top]
        assert values == pytest.approx([value for token in mine.tokens for _, value in token.top], abs=1e-4)
    assert remote.ask(None, QUESTIONS[:1], 6)[0].tokens == ()


@pytest.mark.parametrize(
    "logprobs",
    [
        None, {}, {"content": None}, {"content": [{"token": "a"}]}, {"content": [{"token": "a", "logprob": -1.0}]}, {"content": [{"token": 3, "logprob": -1, "top_logprobs": []}]},
        {"content": [{"token": "a", "logprob": 0.5, "top_logprobs": []}]}, {"content": [{"token": "a", "logprob": float("nan"), "top_logprobs": []}]}, {"tokens": ["a"]}, [], "x",
    ],
)  # fmt: skip
def test_what_is_not_of_openais_form_is_not_there(logprobs: Any):
    reply = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop", "logprobs": logprobs}]}
    answer = read_answer(json.loads(json.dumps(reply)))
    assert answer.text == "a" and answer.tokens == ()


def test_responses_know_no_such_field(server: str):
    with httpx2.Client(timeout=60) as http:
        reply = http.post(f"{server}/responses", json={"model": "m", "input": "what is this", "top_logprobs": 2})
    assert reply.status_code == 400 and "top_logprobs" in reply.text
