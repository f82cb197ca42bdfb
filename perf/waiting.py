"""How long processes of `davsp eval` wait for each other, by two builds in turn.

    python perf/waiting.py --before ../before/src --out results/perf/waiting.json

Two processes share the embedded test of davsp-mini under No Defense. One answer in eight has 48 tokens, drawn by seed; the others end
where the model ends them. A process waits while it answers nothing between the first batch's start and the last one's end, whatever
it does meanwhile. The figure is the waiting of both as a share of their time, so a busy machine slows both sides. Rounds alternate
which build is first. Answers must be the same.
"""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from davsp import LVLM, Query, Response, embedded, evaluate
from davsp.defenses import NoDefense
from davsp.runtime.files import manifest, write_json

LONG, NEW_TOKENS, PROCESSES = 8, 48, 2


class Timed(NoDefense):
    """No Defense; batches with a long answer go on to `NEW_TOKENS`. Notes when each batch began and ended."""

    def __init__(self, long: set[str]) -> None:
        super().__init__()
        self.long, self.spans = long, list[tuple[float, float]]()

    def respond(self, lvlm: LVLM, queries: Sequence[Query], *args: Any, **options: Any) -> list[Response]:
        began, ends = time.time(), lvlm.model.generation_config.eos_token_id
        try:
            if any(query.id in self.long for query in queries):
                lvlm.model.generation_config.eos_token_id = len(lvlm.tokenizer)  # which is never said
            return super().respond(lvlm, queries, *args, **options)
        finally:
            lvlm.model.generation_config.eos_token_id = ends
            self.spans.append((began, time.time()))


def child(out: Path, count: int, batch_size: int, seed: int) -> None:
    """One of the processes, in the build that PYTHONPATH names; its spans and answers as JSON."""
    from davsp.runtime import parallel

    lvlm = embedded.load(device_map="cpu")
    queries = random.Random(seed).sample(embedded.protocol(seed).test, count)
    defense = Timed({query.id for query in random.Random(f"{seed} long").sample(queries, count // LONG)})
    defense.respond(lvlm, queries[:batch_size], None, batch_size, lambda _: None, NEW_TOKENS)  # warm
    defense.spans.clear()
    parallel.gathered(None)
    found = evaluate(lvlm, {"none": defense}, queries, out / "run", batch_size=batch_size, max_new_tokens=NEW_TOKENS)
    answers = {response.query_id: response.text for response in found.responses["none"]}
    (out / f"{parallel.rank()}.json").write_text(json.dumps({"spans": defense.spans, "answers": answers}))


def shared(source: Path, count: int, batch_size: int, seed: int) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds answered and waited of all processes of a build, and the answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "PYTHONPATH": str(source.resolve()),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        common |= {"WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES)}
        call = [sys.executable, __file__, "child", folder, str(count), str(batch_size), str(seed)]
        children = [
            subprocess.Popen(call, env=os.environ | common | {"RANK": str(i), "LOCAL_RANK": str(i)})
            for i in range(PROCESSES)
        ]
        if any(process.wait() for process in children):
            raise SystemExit(f"a process of {source} failed")
        found = [json.loads((Path(folder) / f"{i}.json").read_text()) for i in range(PROCESSES)]
    spans = [span for one in found for span in one["spans"]]
    answered = sum(end - began for began, end in spans)
    whole = PROCESSES * (max(end for _, end in spans) - min(began for began, _ in spans))
    return {"answered": answered, "waited": whole - answered, "share": 1 - answered / whole}, found[0]["answers"]


def main(
    before: Annotated[Path, typer.Option(help="The src folder of the build to compare with.")],
    out: Annotated[Path, typer.Option()] = Path("out/waiting.json"),
    rounds: Annotated[int, typer.Option()] = 3,
    count: Annotated[int, typer.Option(help="Queries.")] = 128,
    batch_size: Annotated[int, typer.Option()] = 1,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Measure both builds in turn and write what came of it."""
    builds = {"before": before, "now": Path(__file__).parents[1] / "src"}
    rows, same, load = list[dict[str, Any]](), True, [os.getloadavg()[0]]
    for number in range(rounds):
        answers = {}
        for name in list(builds)[:: 1 if number % 2 == 0 else -1]:
            figures, answers[name] = shared(builds[name], count, batch_size, seed)
            rows.append({"round": number, "build": name, **figures})
            print(rows[-1])
        same &= answers["before"] == answers["now"]
        load.append(os.getloadavg()[0])
    gone = [1 - now["share"] / then["share"] for then, now in zip(*(_of(rows, name) for name in builds), strict=True)]
    summary = {
        "waiting_share": {name: median(row["share"] for row in _of(rows, name)) for name in builds},
        "waiting_gone": {"median": median(gone), "low": min(gone), "high": max(gone)},
        "same_answers": same, "load": {"low": min(load), "high": max(load)},
    }  # fmt: skip
    print(summary)
    settings = {"rounds": rounds, "queries": count, "batch_size": batch_size, "seed": seed, "processes": PROCESSES}
    write_json(out, manifest(settings=settings, summary=summary, rows=rows))


def _of(rows: Sequence[dict[str, Any]], build: str) -> list[dict[str, Any]]:
    return sorted((row for row in rows if row["build"] == build), key=lambda row: row["round"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        typer.run(main)
