"""`davsp eval` killed at random moments and started again: run as a program by test_kill.py.

    python tests/killed.py FOLDER ROUNDS SEED

Everything slow is loaded once; every run is a fork that ends with the real command's files. A kill is SIGKILL to itself, at the
n-th time that the program opens, flushes or renames a file, or by a timer of the parent, at any other moment. Where it
falls on a flush, a random part of what was not flushed yet is lost, as with a power cut. What a fork asked the model for
is noted in a file beside.
"""

import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from davsp import LVLM, Query, cli
from davsp.benchmarks.custom import save_queries
from davsp.cli import engine
from davsp.judges import cache, chat, keyword_lists  # noqa: F401  # so that no fork imports them anew
from davsp.report import html, terminal  # noqa: F401
from davsp.runtime import files as davsp_files
from tiny import queries, save_tiny

BATCH = 3


def main(folder: Path, rounds: int, seed: int) -> None:
    torch.set_num_threads(1)
    lvlm = LVLM.from_pretrained(save_tiny(folder / "tiny"), device_map="cpu")
    for module, name, value in (
        (engine, "load_lvlm", lambda *_: lvlm),  # loaded once
        (davsp_files, "_commit", dict),  # git is slow, and somebody may commit in between
    ):
        patch.object(module, name, value).start()  # tells if there is no such name
    bad, good = queries("malicious", 6), queries("benign", 4)
    save_queries(folder / "data", [*bad, *good, Query("w", "what is this", "benign", "test", reference="red")])
    rng = random.Random(seed)
    whole, seconds, writes = reference(folder)
    report: dict[str, Any] = {
        "seconds": seconds,
        "writes": writes,
        "kills": 0,
        "asked": len(asked(folder / "whole.log")),
    }
    for number in range(rounds):
        out, log = folder / f"run{number}", folder / f"run{number}.log"
        while True:  # killed once, sometimes a second time while it goes on
            at = rng.randint(1, writes) if rng.random() < 0.6 else 0
            code = fork(folder, out, log, at, 0 if at else rng.uniform(0, seconds), rng.randrange(2**31))
            report["kills"] += code == -signal.SIGKILL
            if rng.random() < 0.8:
                break
        code = fork(folder, out, log, 0, 0, 0)
        if code:
            raise SystemExit(f"round {number}: the run that was started again ended with {code}")
        now = files(out)
        if now != whole:
            other = [name for name in {**whole, **now} if now.get(name) != whole.get(name)]
            raise SystemExit(f"round {number}: {', '.join(other)} are not as in an uninterrupted run")
        kills = log.read_text().count("start") - 1
        again = len(asked(log)) - report["asked"]
        if not 0 <= again <= BATCH * kills:
            raise SystemExit(f"round {number}: {again} answers given again after {kills} kills")
        shutil.rmtree(out)
    times = os.times()
    report["cpu"] = times.user + times.children_user + times.system + times.children_system
    print(json.dumps(report))


def reference(folder: Path) -> tuple[dict[str, Any], float, int]:
    """The files of an uninterrupted run, the seconds it takes, and how often it touches files."""
    fork(folder, folder / "warm", folder / "warm.log", 0, 0, 0)
    start = time.perf_counter()
    if fork(folder, folder / "whole", folder / "whole.log", 0, 0, 0):
        raise SystemExit("the uninterrupted run failed")
    seconds = time.perf_counter() - start
    return files(folder / "whole"), seconds, int((folder / "whole.log").read_text().split()[-1])


def fork(folder: Path, out: Path, log: Path, at: int, after: float, seed: int) -> int:
    """Exit code of one run in a fork; it kills itself at file event `at`, or is killed `after` seconds, if these aren't 0."""
    child = os.fork()
    if child == 0:
        run(folder, out, log, at, random.Random(seed))
    if after:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(folder: Path, out: Path, log: Path, at: int, rng: random.Random) -> None:
    faulthandler.dump_traceback_later(120, exit=True)  # one that hangs tells where
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    notes = log.open("a", buffering=1)
    notes.write("start\n")
    seen, fsync, completions = 0, os.fsync, LVLM.completions

    def event() -> bool:
        nonlocal seen
        seen += 1
        return seen == at

    def lossy(descriptor: int) -> None:
        if event():
            size = os.fstat(descriptor).st_size
            os.ftruncate(descriptor, rng.randint(flushed.get(descriptor_path(descriptor), 0), size))
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
        flushed[descriptor_path(descriptor)] = os.fstat(descriptor).st_size

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        mine = any(isinstance(one, (str, Path)) and str(out) in str(one) for one in arguments)
        if name in ("open", "os.rename", "os.mkdir") and mine and event():
            os.kill(os.getpid(), signal.SIGKILL)

    def noted(self: LVLM, canvas: Any, questions: list[str], *args: Any, **options: Any) -> list[tuple[str, str]]:
        answers = completions(self, canvas, questions, *args, **options)
        notes.write("".join(f"asked {question}\n" for question in questions))
        return answers

    flushed: dict[str, int] = {str(p): p.stat().st_size for p in out.glob("*")}
    os.fsync, LVLM.completions = lossy, noted  # type: ignore[assignment, method-assign]
    sys.addaudithook(audit)
    sys.argv = ["davsp", "eval", "--queries", str(folder / "data"), "--out", str(out), "--batch-size", str(BATCH)]
    sys.argv += ["--defense", "none", "--defense", "safety-text=please be safe", "--max-new-tokens", "4"]
    sys.argv += ["--judge", "keyword", "--judge", "keyword-gcg", "--max-unscored", "1"]
    try:
        cli.main()
    except SystemExit as end:
        notes.write(f"events {seen}\n")
        os._exit(end.code if isinstance(end.code, int) else bool(end.code))
    os._exit(99)


def descriptor_path(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def asked(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("asked")]


def files(out: Path) -> dict[str, Any]:
    """All files of a run as far as they do not tell of time or folder."""
    found: dict[str, Any] = {}
    for path in sorted(out.iterdir()):
        if path.name.startswith("."):
            found[path.name] = "left behind"
            continue
        text = path.read_text().replace(str(out), "OUT").replace(out.name, "OUT")
        if path.suffix == ".jsonl":
            found[path.name] = [json.loads(line) | {"seconds": 0} for line in text.splitlines()]
        elif path.name == "manifest.json":
            found[path.name] = json.loads(text) | {"time": ""}
        elif path.suffix == ".html":
            found[path.name] = [
                line for line in text.splitlines() if "&#34;time&#34;" not in line and 'class="time"' not in line
            ]
        else:
            found[path.name] = json.loads(text)
            found[path.name].pop("answers", None)  # a hash of responses.jsonl, seconds and all
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
