"""How many requests may be under way: refusals by chance leave the bound, a crowd lowers it, and one at a time is the least."""

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable

import pytest

from davsp.runtime.limit import Limit


def run(
    limit: Limit,
    refuses: Callable[[int, random.Random, float], bool],
    answers: int = 660,
    latency: float = 0.05,
    seed: int = 0,
) -> tuple[float, float]:
    """Ask a server that answers after `latency` and refuses after a millisecond, in time that is only counted.

    Args:
        refuses: (requests that it is at work on, chance, time) -> whether it sends a 429.

    Returns:
        Seconds, and requests for one answer.
    """
    rng, time, at_work, sent, number = random.Random(seed), 0.0, 0, 0, 0
    waiting, events, waited = deque(range(answers)), list[tuple[float, int, str, int, int]](), set[int]()
    while answers:
        while waiting and limit.under_way < int(limit.bound):
            one = waiting.popleft()
            limit.under_way, sent, number = limit.under_way + 1, sent + 1, number + 1
            refused = refuses(at_work, rng, time)
            at_work += not refused
            after = 0.001 if refused else latency * rng.uniform(0.8, 1.2)
            heapq.heappush(events, (time + after, number, "429" if refused else "answer", one, limit.era))
        time, _, kind, one, era = heapq.heappop(events)
        if kind == "again":
            waiting.appendleft(one)
            continue
        limit.under_way -= kind != "free"
        if kind == "free":
            limit.under_way -= 1
            waiting.appendleft(one)
            continue
        at_work, answers = at_work - (kind == "answer"), answers - (kind == "answer")
        kept = limit.least
        limit.reply(kind == "429", era, one in waited)
        waited.discard(one)
        if kind == "429":
            number += 1
            limit.under_way += kept
            waited |= {one} if kept else set()
            heapq.heappush(events, (time + rng.uniform(0.5, 1), number, "free" if kept else "again", one, 0))
    return time, sent / 660


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("most", [8, 16])
def test_429s_by_chance_leave_the_bound(share: float, most: int) -> None:
    """A bound that halves on each falls to between 1 and 6 there, and takes 7, 11 and 37 s with `most` 8."""
    for seed in range(5):
        limit = Limit(most)
        seconds, requests = run(limit, lambda at_work, rng, time: rng.random() < share, seed=seed)
        assert seconds < 2.5 * 660 * 0.05 / most / (1 - share) + 1.5, (seed, seconds)
        assert limit.bound >= most / 4 and requests < 1.15 / (1 - share)


def test_half_of_all_refused_by_chance_is_seen_through() -> None:
    """First it is taken for a crowd; once one at a time was refused as often, it is so no more."""
    for seed in range(5):
        limit = Limit(8)
        seconds, _ = run(limit, lambda at_work, rng, time: rng.random() < 0.5, seed=seed)
        assert seconds < 60 and not limit.crowded, (seed, seconds)


@pytest.mark.parametrize("room", [1, 2, 4, 7])
def test_a_crowd_lowers_the_bound(room: int) -> None:
    """A server that is at work on so many at most, and refuses all others at once."""
    for seed in range(5):
        limit = Limit(16)
        seconds, requests = run(limit, lambda at_work, rng, time: at_work >= room, seed=seed)
        assert limit.crowded and room - 1 <= limit.bound <= room + 1.5
        assert requests < 1.3 and seconds < 1.35 * 660 * 0.05 / room, (seed, seconds, requests)


def test_a_crowd_with_429s_by_chance_on_top() -> None:
    limit = Limit(8)
    seconds, requests = run(limit, lambda at_work, rng, time: at_work >= 4 or rng.random() < 0.1)
    assert 3 <= limit.bound < 6 and requests < 1.35 and seconds < 15


def test_where_even_one_at_a_time_is_refused_it_keeps_its_place() -> None:
    """Ten requests a second, no Retry-After: were the place free, every answer would be asked about and refused in turn."""
    last = [0.0]

    def refuses(at_work: int, rng: random.Random, time: float) -> bool:
        if time - last[0] < 0.1:
            return True
        last[0] = time
        return False

    limit = Limit(8)
    _, requests = run(limit, refuses, answers=200)
    assert requests * 660 / 200 < 2.5


def test_nothing_but_429s_ends_at_one() -> None:
    limit = Limit(16)
    for _ in range(200):
        limit.reply(True, limit.era)
    assert limit.bound == 1 and limit.least
    limit.gave_up()
    assert not limit.least  # else a server that is down would be waited for once an answer
    limit.reply(False, limit.era)
    assert limit.least
    for _ in range(100_000):
        limit.reply(False, limit.era)
    assert limit.bound == 16 and not limit.crowded


def test_replies_to_what_was_sent_under_another_bound_do_not_count() -> None:
    limit = Limit(16)
    for _ in range(12):  # one burst
        limit.reply(True, 0)
    assert limit.bound == 8
    for _ in range(100):
        limit.reply(True, 0)
    assert limit.bound == 8


def test_places() -> None:
    """No more than the bound; what is asked again goes first; who gives up waiting takes no place with it."""

    async def use() -> list[str]:
        limit, order, gate = Limit(2), list[str](), asyncio.Event()

        async def hold(name: str, first: bool = False) -> None:
            async with limit.place(first):
                assert limit.under_way <= 2
                order.append(name)
                await gate.wait()

        async def start(*names: str) -> list[asyncio.Task[None]]:
            tasks = [asyncio.create_task(hold(name, first=name == "again")) for name in names]
            for _ in range(5):
                await asyncio.sleep(0)
            return tasks

        tasks = await start(*"abcd", "e", "again")
        tasks[3].cancel()
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert limit.under_way == 0
        gate.clear()
        tasks = await start(*"fgh")
        for task in tasks[:2]:
            task.cancel()
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert limit.under_way == 0
        return order

    assert asyncio.run(use()) == ["a", "b", "again", "c", "e", "f", "g", "h"]
