"""A request's bytes: pictures are cut out, the rest is counted, and what is read is what JSON says."""

import base64
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from davsp.serve.bodies import CUTS, DEEPEST, MARK, parse
from davsp.serve.messages import check
from davsp.serve.pictures import from_data_url
from davsp.serve.refusals import Refusal
from davsp.serve.settings import ServeSettings
from davsp.serve.sweep import sweep
from proxy import user

LIMITS = ServeSettings(upstream="http://u/v1", max_text=2000, max_values=300)
PICTURE = "data:image/png;base64," + base64.b64encode(bytes(range(256))).decode()


def restored(value: Any, pictures: dict[str, Any]) -> Any:
    """The JSON with each mark replaced by the data URL that it stands for, whatever its head was."""
    if isinstance(value, str):
        return f"…{bytes(pictures[value]).decode()}" if value in pictures else value
    if isinstance(value, list):
        return [restored(one, pictures) for one in value]
    if isinstance(value, dict):
        return {restored(name, pictures): restored(one, pictures) for name, one in value.items()}
    return value


def effort(do: Callable[[], Any]) -> float:
    """CPU seconds of this thread, the least of three."""
    spent = []
    for _ in range(3):
        start = time.thread_time()
        do()
        spent.append(time.thread_time() - start)
    return min(spent)


def without_heads(value: Any) -> Any:
    text = json.dumps(value)
    return json.loads(text.replace('"data:image/png;base64,', '"…').replace('"data:image/x+y;base64,', '"…'))


TEXTS = st.one_of(
    st.text(max_size=8),
    st.text('"\\/u:,[]{} d', max_size=12),
    st.sampled_from(
        ["data:image/png;base64,QUJD", "data:image/x+y;base64,", 'a"data:image/png;base64,QQ', "data:image/png;base64,a\\", "data:image"]
    ),
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-99, 99), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(VALUES, st.sampled_from([None, 1]), st.booleans(), st.booleans())
def test_what_is_read_is_what_json_says(value, indent, ascii_only, slashes):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    if slashes:  # as PHP writes it
        text = text.replace("/", "\\/")
    body = parse(text.encode(), LIMITS)
    assert without_heads(restored(body.value, body.pictures)) == without_heads(value)


@settings(max_examples=300, deadline=None)
@given(st.text('"\\[]{},:ad1 \n', max_size=30))
def test_what_is_no_json_stays_none(text):
    text = text.replace("d", '"data:image/png;base64,QUJD"')
    try:
        value = json.loads(text)
    except ValueError:
        with pytest.raises(Refusal, match="invalid_request"):
            parse(text.encode(), LIMITS)
    else:
        body = parse(text.encode(), LIMITS)
        assert without_heads(restored(body.value, body.pictures)) == without_heads(value)


def test_a_picture_costs_no_text_and_is_its_own_bytes():
    big = "data:image/jpeg;base64," + "QUJD" * 10_000
    body = parse(json.dumps({"a": [big, PICTURE], "b": "x" * 1900}).encode(), LIMITS)
    first, second = body.value["a"]
    assert from_data_url(first, 10**6, body.pictures) == b"ABC" * 10_000
    assert from_data_url(second, 10**6, body.pictures) == bytes(range(256))
    with pytest.raises(Refusal, match="image_too_large"):
        from_data_url(first, 1000, body.pictures)


@pytest.mark.parametrize("letter", ["+", "/"])
def test_letters_that_an_encoder_escapes(letter):
    text = json.dumps(PICTURE).replace(letter, f"\\u{ord(letter):04x}" if letter == "+" else "\\/")
    body = parse(text.encode(), LIMITS)
    assert from_data_url(body.value, 10**6, body.pictures) == bytes(range(256))


@pytest.mark.parametrize(
    ("text", "status", "says"),
    [
        (b'["' + b"x" * 2001 + b'"]', 413, "besides its pictures"),
        (b"[" + b"{}," * 300 + b"{}]", 400, "more than 300 values"),
        (b"[" + b'"",' * 660 + b'""]', 400, "more than 300 values"),
        (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), 400, f"more than {DEEPEST} deep"),
        (b'{"a":' * 250 + b"1" + b"}" * 250, 400, f"more than {DEEPEST} deep"),
        (b'["data:image/png;base64,' + b'",' * 800 + b'"]', 400, "values"),
        ('["ä"]'.encode("utf-16"), 400, "UTF-8"),
        ('["ä"]'.encode("latin-1"), 400, "UTF-8"),
        (b"", 400, "not JSON"),
        (b'"data:image/png;base64,', 400, "not JSON"),
    ],
)
def test_what_is_refused_before_it_is_parsed(text, status, says, monkeypatch):
    if "JSON" not in says and "UTF" not in says:
        monkeypatch.setattr(json, "loads", None)  # it must not come to that
    with pytest.raises(Refusal) as refusal:
        parse(bytearray(text), LIMITS)
    assert refusal.value.status == status and says in refusal.value.message


def test_marks_inside_texts_do_not_count():
    text = json.dumps([", " * 310, '{"a": [' * 40, "\\" * 33, '\\"' * 40])
    assert parse(text.encode(), LIMITS).value == json.loads(text)


def test_a_byte_order_mark_is_read_over():
    assert parse(b'\xef\xbb\xbf{"a": 1}', LIMITS).value == {"a": 1}


def test_a_mark_is_refused_wherever_the_picture_would_be():
    for messages, more in (
        ([user(PICTURE)], {}),
        ([user("hi")], {"metadata": {"a": PICTURE}}),
        ([user("hi")], {"metadata": {PICTURE: "a"}}),
        ([user("hi"), {"role": "assistant", "content": None, "name": PICTURE}], {}),
    ):
        body = parse(json.dumps({"messages": messages} | more).encode(), LIMITS)
        assert body.pictures
        with pytest.raises(Refusal, match="data_url"):
            sweep(body.value)


def test_marks_are_not_those_of_another_request():
    first, second = (parse(json.dumps(PICTURE).encode(), LIMITS) for _ in range(2))
    assert first.value.startswith(MARK) and first.value != second.value and first.value not in second.pictures


def test_pictures_beyond_any_limit_stay_in_the_text():
    url = "data:image/png;base64," + "QUJD" * 4
    body = parse(
        json.dumps([url] * (CUTS + 3)).encode(),
        LIMITS.model_copy(update={"max_text": 10**6, "max_values": 999}),
    )
    assert len(body.pictures) == CUTS and body.value[-1] == url


def test_a_text_that_begins_with_the_head_of_a_picture_is_no_picture():
    texts = ["data:image/png;base64,", "data:image/png;base64,... is a data URL"]
    assert parse(json.dumps(texts).encode(), LIMITS) == (texts, {})


def test_json_inside_texts_counts():
    inner = {"messages": [user(json.dumps([{}] * 90)) for _ in range(3)]}
    sweep(inner, (), 300)
    with pytest.raises(Refusal, match="too_many_values"):
        sweep(inner, (), 250)


@pytest.mark.parametrize(
    "text",
    [r'"\ud83d"', r'"\uD83D"', r'"\ude00 a"', r'"\ud83d\ud83d"', r'"\ude00\ud83d"', r'"\ud83d😀"', r'"\\\ud83d"', r'"\ud83d\\ude00"', r'"\ud83d\ud83d\ude00\ude00"', r'{"\udfff": 1}'],
)  # fmt: skip
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(text):
    """JSON may hold one, UTF-8 can't: no tokenizer takes it, and no reply that quotes it can be written."""
    with pytest.raises(Refusal, match="no_character") as refusal:
        parse(f'{{"a": [{text}]}}'.encode(), LIMITS)
    assert refusal.value.status == 400 and "surrogate" in refusal.value.message


@pytest.mark.parametrize(
    "text", [r'"\ud83d\ude00"', r'"\\ud83d"', r'"\u00e9 \uD83D\uDE00\ud83d\ude00"', '"😀"', r'"\\\\ude00"']
)
def test_whole_pairs_and_their_look_alikes_pass(text):
    assert parse(text.encode(), LIMITS).value == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        "data:image/" * 380_000,
        "data:image/" * 10 + "," + " " * 4_000_000,
        ("data:image/" * 10 + "," + " " * 2000) * 1900,
        ("![](" + " " * 1000) * 4000,
    ],
    ids=["heads", "blanks", "both", "markdown"],
)
def test_the_last_look_takes_time_by_length_alone(text):
    """What was tried twice here took seconds, and the interpreter with it."""
    odd, plain = ({"messages": [user(one), user("a")]} for one in (text, "a " * (len(text) // 2)))
    assert effort(lambda: sweep(odd)) < 12 * effort(lambda: sweep(plain))


@pytest.mark.parametrize(
    "text",
    [
        "DATA:Image/png;base64,\n " + "A" * 16,
        "data:image/png;data:image/png;base64," + "A" * 16,
        "data:image/a data:video/b, " + "A" * 16,
        "data:image/svg+xml;utf8,<SVG",
        "![]( \n HTTPS://a.test",
        "![](Data:x",
    ],
)
def test_pictures_in_texts_in_every_spelling(text):
    with pytest.raises(Refusal):
        sweep({"messages": [user(text)]})
    for at in range(1, len(text)):  # and over two messages
        with pytest.raises(Refusal):
            sweep({"messages": [user(text[:at]), user(text[at:])]})


def test_what_is_quoted_in_a_refusal_is_short():
    with pytest.raises(Refusal) as refusal:
        check({"messages": [user({"type": "text", "text": "a", "x" * 10**6: 1})]})
    assert len(refusal.value.message) < 1100


def test_more_ends_than_beginnings_are_no_json():
    limits = ServeSettings(upstream="http://u/v1")

    def refused() -> None:
        with pytest.raises(Refusal, match="invalid_request"):
            parse(b"]" * 4_000_000, limits)

    assert effort(refused) < 10 * effort(lambda: parse(b'"' + b"a" * 4_000_000 + b'"', limits))


def test_a_picture_of_escapes_alone_stays_in_the_text():
    """The parser would hold the interpreter for as long as they take; as an encoder writes them they are one in 64."""
    few, many = ("\\/" + "AAA" * 5) * 100, "\\/" * 100
    assert len(parse(f'"data:image/png;base64,{few}"'.encode(), LIMITS).pictures) == 1
    body = parse(f'"data:image/png;base64,{many}"'.encode(), LIMITS)
    assert body == ("data:image/png;base64," + "/" * 100, {})
