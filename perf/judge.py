"""How much quicker a judge that sends 429s is done with than by an older build, both asking the same server on loopback in turn.

    git worktree add ../before 4640fc4
    python perf/judge.py --before ../before --out results/perf/judge.json
    python perf/judge.py --before ../before --parts                          # what the older build's time goes to

The server answers after a set time. In some scenarios it refuses a share of the requests at once, drawn by item and attempt from a
seed, another in each round, so that both builds meet the same, and never more than five in a row of one item. In the others it is at work on so many
requests at most and refuses all beyond. It counts what it was asked and what it answered. Each build runs in a process of its own,
with its own source tree; the time is that of `judge_all` alone, by the wall clock: it is nearly all waiting. Rounds alternate in
random order. Every verdict must be the right one, and no item answered twice.
"""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

TARGET = 3.0  # times as quick, where three in ten are refused by chance
LATENCY, MOST = 0.05, 8
SCENARIOS: dict[str, dict[str, Any]] = {
    "5 % refused by chance": {"share": 0.05},
    "10 % refused by chance": {"share": 0.1},
    "30 % refused by chance": {"share": 0.3},
    "30 % by chance, Retry-After: 1": {"share": 0.3, "retry_after": 1},
    "a crowd: at work on 4 at most": {"room": 4},
    "a crowd of 4, and 10 % by chance": {"room": 4, "share": 0.1},
}
JUDGED = "30 % refused by chance"
PARTS = {
    "as it was": (), "no lower limit": ("limit",), "waits that do not double": ("doubling",), "Retry-After passed over": ("retry-after",),
    "the first two": ("limit", "doubling"), "all three": ("limit", "doubling", "retry-after"),
}  # fmt: skip
CONSOLE = Console(stderr=True)


def label(item: int) -> str:
    return "unsafe" if item % 3 == 0 else "safe"


async def serve(share: float = 0.0, room: int | None = None, retry_after: int | None = None, seed: int = 0) -> None:
    """The judge: prints its port, answers, and tells its counts to a GET."""
    requests: Counter[int] = Counter()
    answered: Counter[int] = Counter()
    under_way = most = 0

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal under_way, most
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if head.startswith(b"get"):
                    counts = {"requests": requests.total(), "answered": len(answered), "most_under_way": most}
                    await send(writer, 200, counts | {"answered_twice": answered.total() - len(answered)})
                    continue
                body = await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                item = int(re.findall(rb"item (\d+)", body)[-1])
                requests[item] += 1
                chance = requests[item] % 6 and random.Random(f"{seed} {item} {requests[item]}").random() < share
                if chance or (room is not None and under_way >= room):
                    await send(writer, 429, {"error": {"message": "too many requests"}}, retry_after)
                    continue
                under_way += 1
                most = max(most, under_way)
                await asyncio.sleep(LATENCY)
                under_way -= 1
                message = {"role": "assistant", "content": label(item)}
                await send(writer, 200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
                answered[item] += 1
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(reply, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def send(writer: asyncio.StreamWriter, status: int, body: Any, retry_after: int | None = None) -> None:
    data = json.dumps(body).encode()
    more = b"" if retry_after is None else b"Retry-After: %d\r\n" % retry_after
    writer.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n%b" % (status, more))
    writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(data), data))
    await writer.drain()


def ask(url: str, count: int, without: list[str]) -> None:
    """Judge all items by whatever davsp there is on the path, and print seconds and how many verdicts are right.

    Args:
        without: parts of the older build that are taken out of it.
    """
    from davsp import Query, Response
    from davsp.judges.chat import ChatJudge
    from davsp.judges.prompts import CHAT
    from davsp.runtime import client, limit

    if "limit" in without:
        limit.Limit.shrink = lambda self, era: None  # type: ignore[attr-defined]
    if "doubling" in without:
        client.LONGEST_BACKOFF = 1.0
    if "retry-after" in without:
        client.retry_after = lambda header, now: None  # type: ignore[attr-defined]
    judge = ChatJudge(CHAT["davsp"], "m", url, concurrency=MOST)
    items = [
        (Query(f"q{n}", "what is it?", "malicious", "t"), Response(f"q{n}", "none", f"item {n}: a kite"))
        for n in range(count)
    ]
    start = time.perf_counter()
    verdicts = judge.judge_all(items)
    seconds = time.perf_counter() - start
    right = sum(verdict.label == label(n) for n, verdict in enumerate(verdicts))
    print(json.dumps({"seconds": seconds, "right": right}))


@contextmanager
def server(scenario: dict[str, Any]) -> Iterator[str]:
    """The address of a judge in a process of its own."""
    command = [sys.executable, __file__, "--serve", json.dumps(scenario)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def once(tree: Path, scenario: dict[str, Any], count: int, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """One build asks one server: seconds, right verdicts, and the server's counts."""
    with server(scenario) as url:
        command = [
            sys.executable,
            __file__,
            "--ask",
            url,
            "--count",
            str(count),
            *(word for part in without for word in ("--without", part)),
        ]
        environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{tree} cannot ask: {done.stderr.strip().splitlines()[-1]}")
        with urllib.request.urlopen(url) as reply:
            counts = json.load(reply)
    return {"count": count, **json.loads(done.stdout), **counts}


def summary(rows: list[dict[str, Any]], names: list[str]) -> dict[str, dict[str, Any]]:
    """By scenario: median seconds and requests for one answer of both builds, and the ratio within rounds."""
    table = {}
    for name in names:
        mine = [row for row in rows if row["scenario"] == name]
        by_build = {build: [row for row in mine if row["build"] == build] for build in ("before", "now")}
        ratios = [b["seconds"] / n["seconds"] for b, n in zip(by_build["before"], by_build["now"], strict=True)]
        table[name] = {"ratio": median(ratios), "low": min(ratios), "high": max(ratios)}
        for build, ones in by_build.items():
            table[name][build] = {
                "seconds": median(row["seconds"] for row in ones),
                "requests_an_answer": median(row["requests"] / row["count"] for row in ones),
                "wrong_or_unscored": sum(row["count"] - row["right"] for row in ones),
                "answered_twice": sum(row["answered_twice"] for row in ones),
            }
    return table


def parts(before: Path, rounds: int, count: int) -> list[dict[str, Any]]:
    """The older build where three in ten are refused and asked to wait a second or nothing is said, without each of its parts."""
    rows = []
    for number in range(rounds):
        for scenario in ("30 % refused by chance", "30 % by chance, Retry-After: 1"):
            for name, without in PARTS.items():
                if "retry-after" in without and "Retry-After" not in scenario:
                    continue
                row = {"round": number + 1, "scenario": scenario, "part": name}
                rows.append(row | once(before, SCENARIOS[scenario] | {"seed": number}, count, without))
                CONSOLE.print(f"{scenario}, {name}: {rows[-1]['seconds']:.1f} s")
    return rows


def main(
    before: Annotated[Path | None, typer.Option(help="Source tree of the older build.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the figures go, as JSON.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    count: Annotated[int, typer.Option(min=1, help="Answers that are judged.")] = 660,
    only: Annotated[
        list[str] | None, typer.Option("--scenario", help="By its name, repeatable; left out: all.")
    ] = None,
    only_parts: Annotated[bool, typer.Option("--parts", help="Only what the older build's time goes to.")] = False,
    beside: Annotated[str, typer.Option(help="What else ran on the machine, for the record.")] = "",
    serves: Annotated[str | None, typer.Option("--serve", hidden=True)] = None,
    asks: Annotated[str | None, typer.Option("--ask", hidden=True)] = None,
    without: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare two builds before a judge that sends 429s."""
    if serves is not None:
        asyncio.run(serve(**json.loads(serves)))
    if asks is not None:
        ask(asks, count, without or [])
        return
    if before is None or not (before / "src" / "davsp").is_dir():
        raise SystemExit("--before must be the source tree of an older davsp: git worktree add ../before 4640fc4")
    from davsp.runtime.files import manifest, write_json

    facts = manifest(rounds=rounds, beside=beside, before=_commit(before))
    if only_parts:
        rows = parts(before, rounds, count)
        if out:
            write_json(
                out, {"manifest": facts, "answers": count, "latency": LATENCY, "concurrency": MOST, "rounds": rows}
            )
        return
    names = only or list(SCENARIOS)
    trees, rng, rows = {"before": before, "now": Path(__file__).parents[1]}, random.Random(0), []
    for number in range(rounds):
        for name in names:
            for build in rng.sample(list(trees), len(trees)):
                row = {"round": number + 1, "scenario": name, "build": build} | once(
                    trees[build], SCENARIOS[name] | {"seed": number}, count
                )
                rows.append(row)
                CONSOLE.print(
                    f"round {number + 1} of {rounds}, {name}, {build}: {row['seconds']:.1f} s, {row['requests']} requests"
                )
    table = summary(rows, names)
    printed = Table("scenario", "before, s", "now, s", "times as quick", "requests an answer")
    for name, row in table.items():
        ratio = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        sent = " → ".join(f"{row[build]['requests_an_answer']:.2f}" for build in trees)
        printed.add_row(name, *(f"{row[build]['seconds']:.1f}" for build in trees), ratio, sent)
    CONSOLE.print(printed)
    exact = not any(row["now"][what] for row in table.values() for what in ("wrong_or_unscored", "answered_twice"))
    if out:
        met = JUDGED in table and table[JUDGED]["ratio"] >= TARGET and exact
        write_json(
            out,
            {
                "manifest": facts, "answers": count, "latency": LATENCY, "concurrency": MOST, "scenarios": table,
                "target": {"scenario": JUDGED, "ratio": TARGET, "met": met}, "rounds": rows,
            },
        )  # fmt: skip
    if not exact:
        raise SystemExit("a verdict is wrong or missing, or an item was answered twice")


def _commit(tree: Path) -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    typer.run(main)
