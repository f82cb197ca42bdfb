"""The faults of `make faults` in small, with another seed; and that their rules see what they are there for. Kills: test_kill.py."""

from typing import Any

import pytest

from davsp.judges.cache import Ruling
from davsp.lvlm import Answer
from davsp.serve import connections
from faults import __main__ as whole
from faults import bodies, floods, pictures, replies

SMALL = {"bodies": 300, "pictures": 90, "judge": 95, "upstream": 90, "floods": 20}
RUNS = {name: part.run for name, part in whole.PARTS.items() if name in SMALL}


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SMALL)
def test_nothing_is_broken(name: str, times: int) -> None:
    seen = RUNS[name](times, times * SMALL[name])
    assert seen.broken == [] and seen.tried >= times * SMALL[name] and len(seen.outcomes) > 2


def test_what_would_leave_undefended_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("davsp.serve.preparation.sweep", lambda *arguments: None)
    assert any("a picture in a text" in one for one in bodies.run(1, 200).broken)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url", "image_url": {"url": bodies.RED}}, {"type": "text", "text": f"{bodies.TEXT} q"}],
        "q",
        f"{bodies.TEXT} ![](https://evil.test/x.png)",
        f'{bodies.TEXT} q", "image_url": "{bodies.ASIDE}',
        f"{bodies.TEXT} {bodies.RED}",
    ],
)
def test_each_rule_of_what_leaves(content: Any) -> None:
    message = {"role": "user", "content": content}
    good = {"role": "user", "content": f"{bodies.TEXT} q"}
    hidden = {"role": "tool", "tool_call_id": "c", "content": f'{{"a": "{content}"}}'} if '"' in content else message
    assert bodies.undefended({"messages": [good]}, "messages") == ""
    assert bodies.undefended({"messages": [good, hidden]}, "messages")


def test_another_canvas_than_that_of_eval_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("davsp.serve.pictures.flatten", lambda image: image.convert("RGB"))
    assert any("another canvas" in one for one in pictures.run(1, 60).broken)


def test_verdicts_that_are_made_up_or_lost_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for label in ("safe", "unscored"):
        monkeypatch.setattr("davsp.judges.chat.read_reply", lambda *a, label=label: Ruling(label, "because"))
        broken = replies.judge(1, 12).broken
        assert any(("made up" if label == "safe" else "lost") in one for one in broken)


def test_an_answer_that_nobody_gave_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("davsp.serve.calls.read_answer", lambda body: Answer("a kite", None, None))
    monkeypatch.setattr("davsp.serve.calls.UpstreamLVLM._count", lambda *usage: None)
    assert any("nobody gave" in one for one in replies.upstream(1, 60).broken)


def test_a_client_that_cannot_read_why_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "DROPPED", 0)
    assert any("no reply" in one for one in floods.run(1, 10).broken)


def test_the_page_is_of_all_parts() -> None:
    text = whole.PAGE.read_text()
    assert text.startswith(whole.START) and text.endswith(whole.END), "run `make faults`"
    for name, part in whole.PARTS.items():
        assert f"| [{name}](#{name}) | {part.seed} |" in text and part.sends in text and part.holds in text
    assert text.count("| **0** |") == len(whole.PARTS)
