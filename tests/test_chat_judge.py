"""Chat judges against a real server on loopback that fails in every way we know of: nothing made up, nothing lost."""

import asyncio
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from davsp import DavspError, Query, Response, Verdict
from davsp.errors import Interrupted
from davsp.judges.base import check_unscored
from davsp.judges.cache import VerdictCache
from davsp.judges.chat import ChatJudge
from davsp.judges.guard import HARMBENCH, LLAMA_GUARD_3
from davsp.judges.prompts import CHAT, DAVSP
from davsp.judges.verdicts import judge_name, verdicts_of
from davsp.runtime.replies import retry_after
from judge_server import Judge, faulty, items, judge_server, truth

SECRET = "sk-a-secret-of-this-test"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with judge_server() as running:
        yield running


def judge(server: Judge, cache: Path | None = None, **options: object) -> ChatJudge:
    quick = {"backoff": 0.01, "timeout": 20.0, "concurrency": 16, "attempts": 8}
    return ChatJudge(DAVSP, "m", server.url, cache=VerdictCache(cache) if cache else None, **(quick | options))  # type: ignore[arg-type]


def labels(verdicts: list[Verdict]) -> list[str]:
    return [v.label for v in verdicts]


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_verdicts_from_a_failing_server(server: Judge, tmp_path: Path, count: int) -> None:
    """30 % of the replies are faults, one answer in a hundred never gets a label; stopped in the middle and started again."""
    pairs = items(count)
    never = set(range(50, count, 100))
    spoil = faulty(0.3, slow=lambda n: n % 500 == 7)
    server.fault = lambda n, attempt: "not unsafe" if n in never else spoil(n, attempt)
    server.kill_at = kill_at = count * 35 // 100
    cache = tmp_path / "cache.sqlite"
    options = {"timeout": 3.0, "concurrency": 32}

    with pytest.raises(Interrupted, match="same command again"):
        judge(server, cache, **options).judge_all(pairs)
    first = server.requests.copy()
    assert kill_at <= server.answered.total() < kill_at + 100
    again = judge(server, cache, **options)
    stored = {n for n, (query, response) in enumerate(pairs) if again.cache.get(again._key(query, response.text))}
    verdicts = again.judge_all(pairs)

    assert [v.query_id for v in verdicts] == [q.id for q, _ in pairs]
    for n, verdict in enumerate(verdicts):
        assert verdict.label == ("unscored" if n in never else truth(n)), (n, verdict)
    assert set(server.answered) == set(range(count)) - never
    assert server.answered.total() * 0.98 < len(
        server.answered
    )  # on a busy machine a reply may come after the timeout, and is lost
    assert len(stored) > 0.9 * kill_at
    for n in stored:
        assert server.requests[n] == first[n], f"{n} had been judged and was asked for again"
    assert server.requests.total() - server.answered.total() > 0.25 * server.requests.total() > 0.25 * first.total()

    before = server.requests.total()
    assert judge(server, cache, attempts=2).judge_all(pairs) == verdicts
    assert server.requests.total() - before == 2 * len(never)  # what is unscored is not done, and asked for anew


def test_kill_9_repeats_only_what_was_under_way(server: Judge, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from judge_server import items; from davsp.judges.cache import VerdictCache\n"
        "from davsp.judges.chat import ChatJudge; from davsp.judges.prompts import DAVSP\n"
        "judge = ChatJudge(DAVSP, 'm', sys.argv[1], cache=VerdictCache(sys.argv[2]), concurrency=4)\n"
        "judge.judge_all(items(150))"
    )
    cache = tmp_path / "cache.sqlite"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", script, server.url, str(cache)], env=environment)
    server.kill_at, server.kill = 60, lambda: os.kill(child.pid, signal.SIGKILL)
    assert child.wait(timeout=120) == -signal.SIGKILL
    assert 60 <= server.answered.total() < 150
    verdicts = judge(server, cache).judge_all(items(150))
    assert labels(verdicts) == [truth(n) for n in range(150)]
    assert server.answered.total() <= 150 + 4 and max(server.answered.values()) <= 2


def test_equal_answers_are_asked_for_once(server: Judge, tmp_path: Path) -> None:
    """DAVSP's judge does not see the question; Llama Guard does."""
    pairs = [
        (Query(f"q{i}", f"question {i}", "malicious", "t"), Response(f"q{i}", d, "item 3: a kite"))
        for i in range(4)
        for d in ("none", "davsp")
    ]
    verdicts = judge(server, tmp_path / "c").judge_all(pairs)
    assert [(v.query_id, v.defense) for v in verdicts] == [(q.id, r.defense) for q, r in pairs]
    assert server.requests[3] == 1 and set(labels(verdicts)) == {"unsafe"}
    guard = ChatJudge(LLAMA_GUARD_3, "m", server.url, cache=VerdictCache(tmp_path / "c"))
    assert set(labels(guard.judge_all(pairs))) == {"unsafe"}
    assert server.requests[3] == 1 + 4


def test_everything_in_the_key_matters(server: Judge, tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "c")
    one = items(1)

    def asks(**change: object) -> int:
        before = server.requests.total()
        options = {"prompt": DAVSP, "model": "m", "base_url": server.url} | change
        ChatJudge(cache=cache, **options).judge_all(one)  # type: ignore[arg-type]
        return server.requests.total() - before

    assert asks() == 1 and asks() == 0 and asks(base_url=server.url + "/") == 0
    assert asks(model="n") == 1
    assert asks(prompt=CHAT["davsp-mmsafety"]) == 1
    assert asks(temperature=0.5) == 1
    assert asks(base_url=server.url.replace("127.0.0.1", "localhost")) == 1
    assert asks() == 0


def test_answers_without_words_are_not_asked_for(server: Judge) -> None:
    empty = [(Query("q", "?", "malicious", "t"), Response("q", "none", text)) for text in ("", " \n", "...")]
    verdicts = judge(server).judge_all(empty)
    assert labels(verdicts) == ["unscored"] * 3 and not server.requests
    assert judge(server).judge_all([]) == []


def test_what_a_verdict_holds(server: Judge) -> None:
    server.say = lambda n: ' "Unsafe." '
    (verdict,) = judge(server).judge_all(items(1, start=3))
    assert verdict == Verdict(
        "q3", "none", "davsp/1:m", "unsafe", "the judge says so", ' "Unsafe." ', DAVSP.hash(items(1)[0][0])
    )
    body = server.bodies[0]
    assert body["temperature"] == 0 and body["model"] == "m" and body["max_tokens"] == 16
    assert [m["role"] for m in body["messages"]] == ["system", "user"] and server.paths == ["/v1/chat/completions"]


def test_a_completion_model_gets_plain_text(server: Judge) -> None:
    server.say = lambda n: "yes" if n % 2 else "no"
    guard = ChatJudge(HARMBENCH, "h", server.url)
    assert labels(guard.judge_all(items(2))) == ["safe", "unsafe"]
    assert server.paths[0] == "/v1/completions"
    prompts = [body["prompt"] for body in server.bodies]  # in whichever order they came
    assert sum("Behavior:\nwhat is on shelf 0?\n\nGeneration:\nitem 0: a kite" in one for one in prompts) == 1


@pytest.mark.parametrize("name", ["1", "date"])
def test_retry_after_is_honoured(server: Judge, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "date":  # the server's clock is a second ahead, so that the date lies in the future
        monkeypatch.setattr("judge_server.formatdate", lambda usegmt: _in_two_seconds())
    server.fault = lambda n, attempt: f"429 {name}" if attempt == 1 else ""
    assert labels(judge(server).judge_all(items(1))) == [truth(0)]
    (_, first), (_, second) = server.times
    assert second - first >= 1.0


def _in_two_seconds() -> str:
    from email.utils import format_datetime

    return format_datetime(datetime.fromtimestamp(datetime.now(UTC).timestamp() + 2.0, UTC), usegmt=True)


def test_a_wait_too_long_ends_the_asking(server: Judge) -> None:
    server.fault = lambda n, attempt: "429 4000"
    (verdict,) = judge(server).judge_all(items(1))
    assert verdict.label == "unscored" and "429" in verdict.reason and server.requests[0] == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        (" 2.5", 2.5),
        ("-3", 0.0),
        ("nan", None),
        ("soon", None),
        ("1e999", math.inf),
        ("9" * 400, math.inf),
        ("-1e308", 0.0),
        ("", None),
        ("Mon, 99 Foo 99999 99:99:99 +99999999999", None),
        ("Mon, 01 Jan 2024 00:00:00 +99999999999999999", None),
        ("Mon, 02 Nov 2300 10:00:00 GMT", 274 * 365.2425 * 86400),
        ("Mon, 02 Nov 2026 10:00:30 GMT", 30.0),
        ("Mon, 02 Nov 2026 09:00:00 GMT", 0.0),
        ("Mon, 02 Nov 2026 12:00:10 +0200", 10.0),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    found = retry_after(header, datetime(2026, 11, 2, 10, tzinfo=UTC))
    assert found == (seconds if seconds is None else pytest.approx(seconds, rel=1e-4))


def test_no_more_requests_at_once_than_asked_for(server: Judge) -> None:
    judge(server, concurrency=5).judge_all(items(60))
    assert server.most_under_way <= 5


def test_429s_by_chance_do_not_slow_the_rest(server: Judge) -> None:
    """Every third request is refused; the wait of one is no wait of the others, and what waited goes first."""
    server.fault = lambda n, attempt: "429" if (n + attempt) % 3 == 0 else ""
    chat = judge(server, concurrency=8)
    assert labels(chat.judge_all(items(200))) == [truth(n) for n in range(200)]
    assert chat.client.limit.bound >= 4 and set(server.answered.values()) == {1}


def test_a_crowded_server_is_asked_for_less(server: Judge) -> None:
    """It is at work on three requests at most and refuses all others at once: no answer is lost, and few are asked for again."""
    working = threading.Semaphore(3)

    def fault(item: int, attempt: int) -> str:
        if not working.acquire(blocking=False):
            return "429"
        time.sleep(0.02)
        working.release()
        return ""

    server.fault = fault
    chat = judge(server, concurrency=16, backoff=0.2, attempts=20)
    assert labels(chat.judge_all(items(200))) == [truth(n) for n in range(200)]
    assert chat.client.limit.crowded and chat.client.limit.bound < 12  # about 4 on a machine with nothing else to do
    assert set(server.answered.values()) == {1}
    assert server.requests.total() < 500  # with 16 under way some 850, simulated


@pytest.mark.parametrize(("fault", "words"), [("401", "refuses the key"), ("404", "ends in /v1")])
def test_a_server_that_cannot_be_used_stops_the_run(server: Judge, fault: str, words: str) -> None:
    server.fault = lambda n, attempt: fault
    with pytest.raises(DavspError, match=words):
        judge(server).judge_all(items(200))
    assert server.requests.total() < 100


def test_no_server_at_all() -> None:
    """It ends at once: with thousands of answers each would be asked about six times, to no end."""
    dead = ChatJudge(DAVSP, "m", "http://127.0.0.1:9/v1", attempts=2, backoff=0.01)
    with pytest.raises(
        DavspError, match=r"judge's server http://127.0.0.1:9/v1 cannot be reached \(2 times .*ConnectError"
    ):
        dead.judge_all(items(3))


def test_an_answer_that_is_never_replied_to_does_not_stop_a_second_run(server: Judge) -> None:
    """What is asked for again may be just the answers at which the judge fails; its server is there all the same."""
    for fault in ("cut", "slow"):
        server.fault = lambda n, attempt, fault=fault: fault  # type: ignore[misc]
        verdicts = judge(server, attempts=2, timeout=0.2).judge_all(items(1))
        assert labels(verdicts) == ["unscored"] and "no reply" in verdicts[0].reason


def test_a_server_that_goes_away_leaves_the_rest_unscored(server: Judge) -> None:
    server.fault = lambda n, attempt: "cut" if n else ""
    verdicts = judge(server, attempts=2, concurrency=1).judge_all(items(3))
    assert (
        labels(verdicts)[1:] == ["unscored"] * 2
        and verdicts[0].label != "unscored"
        and "no reply" in verdicts[1].reason
    )
    with pytest.raises(DavspError, match=r"2 of 3 answers under 'none' are unscored.*no reply"):
        check_unscored(verdicts)


def test_the_key_goes_into_one_header_and_nowhere_else(
    server: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", SECRET + "\n")
    server.fault = lambda n, attempt: {0: "", 1: "422"}.get(n, "401")  # these quote the key that they were sent
    chat = judge(server, tmp_path / "c", api_key_env="MY_KEY")
    verdicts = chat.judge_all(items(2))
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert labels(verdicts) == ["unsafe", "unscored"] and "Bearer ***" in verdicts[1].raw
    assert server.requests[1] == 1  # a request that is wrong stays wrong
    with pytest.raises(DavspError, match="see the key in MY_KEY") as refused:
        chat.judge_all(items(3))
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for text in (written.decode(errors="replace"), caplog.text, str(verdicts), str(refused.value), repr(vars(chat))):
        assert SECRET not in text
    judge(server).judge_all(items(1))
    assert "Authorization" not in server.headers[-1]


@pytest.mark.parametrize("value", [None, "", " ", "sk-…"])
def test_no_key_where_one_was_named(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(DavspError, match="environment variable MY_KEY"):
        ChatJudge(DAVSP, "m", api_key_env="MY_KEY")


@pytest.mark.parametrize("variable", [SECRET, "AKIA0123456789", "0a1b2c3d"])
def test_a_key_in_place_of_its_variable_is_not_repeated(variable: str) -> None:
    with pytest.raises(DavspError, match="no environment variable of the name that was given") as error:
        ChatJudge(DAVSP, "m", api_key_env=variable)
    assert variable not in str(error.value)


@pytest.mark.parametrize("url", ["", "judge:8000", "ftp://a/v1", "http://me:secret@a/v1", "http://a/v1?key=secret"])
def test_addresses(url: str) -> None:
    with pytest.raises(DavspError, match="address") as error:
        ChatJudge(DAVSP, "m", url)
    assert "secret" not in str(error.value)


def test_text_that_is_no_utf_8(server: Judge) -> None:
    server.say = lambda n: "\ud83d safe"
    half = [(Query("q", "?", "malicious", "t"), Response("q", "none", "item 1: half a kite \ud83e"))]
    (verdict,) = judge(server, attempts=1).judge_all(half)
    assert verdict.label == "unscored" and verdict.raw == "? safe"


def test_evaluate_hands_over_all_answers_at_once(server: Judge) -> None:
    pairs = items(30)
    benign = Query("b", "what?", "benign", "t")
    chat = judge(server, concurrency=4)
    verdicts = verdicts_of([benign, *(q for q, _ in pairs)], [Response("b", "none", "x"), *(r for _, r in pairs)], chat)
    assert verdicts == chat.judge_all(pairs) and len(verdicts) == 30
    assert judge_name(chat) == "davsp/1:m" == verdicts[0].judge


def test_in_a_notebook(server: Judge) -> None:
    async def cell() -> list[str]:
        return labels(judge(server).judge_all(items(5)))

    assert asyncio.run(cell()) == [truth(n) for n in range(5)]


def test_check_unscored() -> None:
    def some(unscored: int) -> list[Verdict]:
        return [Verdict(f"{i}", "davsp", "j", "unscored" if i < unscored else "safe") for i in range(100)]

    check_unscored(some(2))
    check_unscored(some(50), limit=0.5)
    with pytest.raises(DavspError, match=r"3 of 100 .* 'davsp' .* \(3\.0 %, --max-unscored is 2 %"):
        check_unscored(some(3))
    with pytest.raises(DavspError, match="1 of 100"):
        check_unscored(some(1), limit=0.0)
    with pytest.raises(DavspError, match="no verdicts"):
        check_unscored([])
