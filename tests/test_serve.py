"""The proxy: every picture and question is defended or refused, the rest passes, and nothing of it is told to anyone else."""

import pytest

from davsp import DavspError, Query
from davsp.cli import serve
from davsp.defenses import Chain, SafetyText, adashield_s
from davsp.embedded import SAFETY_TEXT
from proxy import GOOD, RED, TEXT, border, client, data_url, error, image_part, picture_of, text_part, user
from tiny import picture

# -- what is defended --------------------------------------------------------------------------------------------------


def test_picture_and_question_are_those_of_eval():
    caller, defense = client(), border()
    image = picture(1, (90, 40))
    assert caller.post(user(image_part(data_url(image)), text_part("what is this"))).json() == GOOD
    (want,) = defense.prepare([Query("", "what is this", "benign", "", image=image)])
    pixels, text = caller.sent()[0]["content"]
    assert picture_of(pixels["image_url"]["url"]).tobytes() == want.image.tobytes() and text["text"] == want.question
    assert caller.upstream.bodies[0]["model"] == "m"


def test_every_picture_of_every_message_in_its_place():
    caller, images = client(), [picture(seed, (30 + seed, 40)) for seed in range(4)]
    urls = [data_url(image) for image in images]
    before = [
        {"role": "system", "content": "be brief"},
        user(text_part("first"), image_part(urls[0], detail="high"), text_part("and"), image_part(urls[1])),
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": [text_part("a tool's"), image_part(urls[2])]},
        {"role": "assistant", "content": [text_part("done"), {"type": "refusal", "refusal": "no"}]},
        user(image_part(urls[3])),
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert caller.post(*before, tools=tools, tool_choice="auto", top_k=3, seed=None).status_code == 200
    sent, defense = caller.upstream.bodies[0], border()
    assert {k: sent[k] for k in ("tools", "tool_choice", "top_k", "seed")} == {
        "tools": tools, "tool_choice": "auto", "top_k": 3, "seed": None,
    }  # fmt: skip
    messages = sent["messages"]
    assert (messages[0], messages[2], messages[4]) == (before[0], before[2], before[4])
    at = [messages[1]["content"][1], messages[1]["content"][3], messages[3]["content"][1], messages[5]["content"][0]]
    for part, image in zip(at, images, strict=True):
        assert picture_of(part["image_url"]["url"]).tobytes() == defense.paint(image).tobytes()
    assert at[0]["image_url"]["detail"] == "high"
    assert [messages[1]["content"][0]["text"], messages[1]["content"][2]["text"]] == [f"{TEXT} first", "and"]
    assert messages[3]["content"][0]["text"] == "a tool's" and messages[5]["content"][1] == text_part(f"{TEXT} ")


@pytest.mark.parametrize(
    ("defense", "parts", "texts"),
    [
        (border(), ["one"], [f"{TEXT} one"]),
        (SafetyText("S", placement="suffix"), ["one", "two"], ["one", "two S"]),
        (adashield_s(text="S"), ["one", "two"], ["one", "twoSone\ntwo"]),
        (Chain([SafetyText("A"), border()]), ["one", "two"], [f"{TEXT} A one", "two"]),
        (SafetyText("S"), ["", ""], ["S ", ""]),
        (SafetyText("a b"), ["a"], ["a b a"]),
    ],
)
def test_texts_of_a_message_joined_are_the_defended_question(defense, parts, texts):
    caller = client(defense)
    assert caller.post(user(*map(text_part, parts))).status_code == 200
    assert [part["text"] for part in caller.sent()[0]["content"]] == texts
    (want,) = defense.prepare([Query("", "\n".join(parts), "benign", "")])
    assert "\n".join(texts) == want.question


def test_a_request_without_pictures():
    caller = client()
    odd = "ünï \u2028 \\ud83d 😀"
    assert caller.post(user("hello"), {"role": "assistant", "content": "hi"}, user(odd)).status_code == 200
    assert [m["content"] for m in caller.sent()] == [f"{TEXT} hello", "hi", f"{TEXT} {odd}"]
    passing = client(image_free="pass")
    passing.post(user("hello"))
    assert passing.sent() == [user("hello")]
    passing.post(user(image_part(RED)), user("hello"))
    assert passing.sent()[1] == user(f"{TEXT} hello") and len(passing.sent()[0]["content"]) == 2


def test_a_text_is_in_the_words_of_the_model_that_is_served():
    assert serve._defense(None, "safety-text", None, "davsp-mini").text == SAFETY_TEXT
    assert serve._defense(None, "adashield-s", None, "davsp-mini").text == SAFETY_TEXT
    assert (
        serve._defense(None, "adashield-s", None, "llava").text == serve._defense(None, "adashield-s", None, None).text
    )
    with pytest.raises(DavspError, match="safety-text needs a text"):
        serve._defense(None, "safety-text", None, "llava")


def test_a_text_defense_sends_pictures_of_their_own_size_without_loss():
    caller, image = client(SafetyText("S")), picture(3, (33, 21))
    caller.post(user(image_part(data_url(image, "WEBP", lossless=True))))
    assert picture_of(caller.sent()[0]["content"][0]["image_url"]["url"]).tobytes() == image.tobytes()


class Broken(SafetyText):
    def prepare(self, queries):
        raise DavspError("the pool is empty")


class Blind(SafetyText):
    def prepare(self, queries):
        return [Query("", q.question, "benign", "") for q in queries]


class Fussy(SafetyText):
    def prepare(self, queries):
        return [Query("", f"{q.image.size}", "benign", "", image=q.image) for q in queries]


class Bug(SafetyText):
    def prepare(self, queries):
        raise ValueError(queries[0].question)


@pytest.mark.parametrize(
    ("defense", "status", "says"),
    [
        (Broken, 500, "pool is empty"),
        (Blind, 500, "left a picture out"),
        (Fussy, 400, "one picture"),
        (Bug, 500, "failed"),
    ],
)
def test_a_defense_that_cannot_be_applied_sends_nothing(defense, status, says, caplog):
    caller = client(defense("S"))
    response = caller.post(user(text_part("my secret"), image_part(RED), image_part(data_url(picture(1, (5, 5))))))
    assert response.status_code == status and says in error(response)["message"] and not caller.upstream.requests
    assert "secret" not in caplog.text and (defense is not Bug or "ValueError at" in caplog.text)
