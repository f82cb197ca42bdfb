"""Several processes share the work of every command; what is in the files is what one process writes."""

import json
import os
import signal
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from davsp import HarmfulnessVector, VisualSafetyPrompt, embedded
from davsp.benchmarks.custom import save_queries
from davsp.defenses import NoDefense
from davsp.embedded.ecso_templates import TEMPLATES
from davsp.errors import DavspError
from davsp.experiments.paper import baselines, run
from davsp.experiments.paper.methods import METHODS
from davsp.runtime import parallel
from davsp.runtime.files import read_tensors
from forks import forked, shared_by_all, together
from test_guard import AS_TEXT, save_guard
from tiny import queries

BIG = 9 * 2**20  # bytes; more than a store takes at once


def pieces(folder: Path | None = None) -> tuple[list[int], list[int]]:
    """Which pieces of work this process did, and in which order it had them all; with a folder, piece 0 takes as long as all others."""
    done: list[int] = []

    def do(number: int) -> bytes:
        ends = time.monotonic() + 60
        while folder and number == 0 and len(list(folder.iterdir())) < 5:
            assert time.monotonic() < ends, "all wait for the slowest piece"
            time.sleep(0.01)
        if folder:
            (folder / str(number)).touch()
        done.append(number)
        return bytes([number]) * (BIG if number == 1 else 1)

    known = [(number, data) for number, data in parallel.work(6, do)]
    assert all(data == bytes([number]) * len(data) for number, data in known)
    return done, [number for number, _ in known]


def test_the_slowest_piece_holds_nobody_and_the_order_stays(tmp_path: Path):
    (first, known), (second, none) = together(partial(pieces, tmp_path))
    assert known == list(range(6)) and none == []
    assert sorted(first + second) == known and min(len(first), len(second)) == 1
    assert pieces() == (list(range(6)), list(range(6)))


def counted() -> str:
    try:
        list(parallel.work(3 + parallel.rank(), str))
    except DavspError as error:
        return str(error)
    return ""


def test_processes_that_see_other_files_are_told():
    assert all(
        "the processes see other pieces of work left; give a folder that all machines share" in s
        for s in together(counted)
    )


def first_alone() -> tuple[int, int, list[int]]:
    seen = (7, 7)
    if parallel.rank() == 0:
        with parallel.alone():
            seen = parallel.rank(), parallel.processes()
            assert parallel.gathered(5) == [5]
    parallel.wait()
    return *seen, parallel.gathered(parallel.rank())


def test_the_first_may_work_alone():
    assert together(first_alone) == [(0, 1, [0, 1]), (7, 7, [0, 1])]


@pytest.fixture(scope="module")
def data(lvlm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save_queries(folder / "malicious", queries("malicious", 35))
    save_queries(folder / "benign", queries("benign", 3))
    save_queries(folder / "others", queries("malicious", 4, seed=1))
    save_queries(folder / "few", [*queries("malicious", 5), *queries("benign", 2)])
    VisualSafetyPrompt.create(56, 9, "random", text="please be safe").save_pretrained(folder / "prompt")
    return folder


def test_vector(tiny_folder: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for count in ("1", "2"):
        command = [
            "vector", "--model", tiny_folder, "--device", "cpu", "--malicious", data / "malicious", "--benign", data / "benign",
            "--held-malicious", data / "malicious", "--held-benign", data / "benign", "--out", tmp_path / count,
        ]  # fmt: skip
        assert forked(*command, "--num-processes", count) == 0
        assert capfd.readouterr().out.count("written to") == 1
    for name in ("vector.safetensors", "vector.json", "layers.png"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert len(HarmfulnessVector.load(tmp_path / "2").malicious) == 35


def test_attack(tiny_folder: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for count in ("1", "2"):
        command = [
            "attack", "--model", tiny_folder, "--device", "cpu", "--queries", data / "few", "--prompt", data / "prompt",
            "--attack", "comply,suffix,redraw", "--eps", "8", "--steps", "2", "--batch-size", "2", "--words", "2", "--word-steps", "1",
            "--word-candidates", "3", "--target", "a car", "--max-new-tokens", "4", "--max-unscored", "1", "--out", tmp_path / count,
        ]  # fmt: skip
        with shared_by_all(tmp_path / "shared") if count == "2" else nullcontext():
            assert forked(*command, "--num-processes", count) == 0
        assert capfd.readouterr().out.count("attack.html are in") == 1
    found = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert found == sorted(path.relative_to(tmp_path / "2") for path in (tmp_path / "2").rglob("*") if path.is_file())
    assert sum(path.suffix == ".png" for path in found) == 10
    for path in found:
        if path.suffix in (".png", ".md") or path.name in ("found.jsonl", "attack.json", "verdicts.jsonl"):
            assert (tmp_path / "1" / path).read_bytes() == (tmp_path / "2" / path).read_bytes(), path


def test_two_processes_train_the_universal_change_of_one(
    tiny_folder: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """But for rounding, which may turn the step of a pixel whose gradient is next to nothing."""
    changes = []
    for count in ("1", "2"):
        command = [
            "attack", "--model", tiny_folder, "--device", "cpu", "--queries", data / "few", "--defense", f"davsp={data / 'prompt'}",
            "--attack", "universal", "--universal-queries", data / "others", "--universal-steps", "4", "--batch-size", "3", "--eps", "8",
            "--target", "a car", "--max-new-tokens", "4", "--max-unscored", "1", "--out", tmp_path / count,
        ]  # fmt: skip
        assert forked(*command, "--num-processes", count) == 0
        assert capfd.readouterr().out.count("attack.html are in") == 1
        changes.append(read_tensors(tmp_path / count / "davsp" / "universal-8" / "change.safetensors")["delta"])
    assert float((changes[0] - changes[1]).abs().gt(1e-6).float().mean()) < 1e-3
    assert 0 < float(changes[0].abs().max()) <= 8 / 255 + 1e-6


@pytest.mark.parametrize("rank", [0, 1])
def test_eval_goes_on_after_a_process_was_killed(
    tiny_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    rank: int,
) -> None:
    command = [
        "eval",
        "--model",
        tiny_folder,
        "--device",
        "cpu",
        "--queries",
        data / "malicious",
        "--max-new-tokens",
        "4",
    ]
    command += ["--batch-size", "4", "--max-unscored", "1", "--num-processes", "2"]
    respond, done = NoDefense.respond, list[int]()

    def killed(self, *args, **options):
        done.append(1)
        if len(done) == 3:
            if parallel.rank() == rank:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # so that both get some; it is ended with the other
        return respond(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(NoDefense, "respond", killed)
        assert forked(*command, "--out", tmp_path / "killed") == 2
    assert f"process {rank} of 2 (numbered from 0) was ended by SIGKILL" in capfd.readouterr().err
    kept = (tmp_path / "killed" / "responses.jsonl").read_text().count("\n")
    assert kept % 4 == 0 and kept < 35
    assert forked(*command, "--out", tmp_path / "killed") == 0
    assert forked(*command, "--out", tmp_path / "whole") == 0
    texts = [[(r["defense"], r["query_id"], r["text"]) for r in lines(tmp_path / name)] for name in ("killed", "whole")]
    assert texts[0] == texts[1] and len(texts[0]) == 35


def test_pat(tiny_folder: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same tokens and figures by the candidates that two processes share, and again from a step that one has left."""
    command = [
        "baseline", "pat", "--model", tiny_folder, "--device", "cpu", "--malicious", data / "malicious", "--benign", data / "benign",
        "--text", "be safe", "--refusal", "sorry no", "--steps", "3", "--candidates", "12", "--batch-size", "4", "--set", "length=4",
        "--set", "attack_length=3", "--set", "start=please", "--set", "top_k=8", "--set", "behaviours=3", "--set", "target=yes",
    ]  # fmt: skip
    for count in ("1", "2"):
        with shared_by_all(tmp_path / "shared") if count == "2" else nullcontext():
            assert forked(*command, "--out", tmp_path / count, "--num-processes", count) == 0
        assert capfd.readouterr().out.count("saved to") == 1
    for name in ("pat.json", "training/pat-search.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    kept = tmp_path / "2" / "training" / "pat-search.json"
    state = json.loads(kept.read_text())
    kept.write_text(json.dumps(state | {"history": state["history"][:1]}))
    assert forked(*command, "--out", tmp_path / "2", "--num-processes", "2") == 0
    assert json.loads(kept.read_text()) == state


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()]


def test_guards_that_run_here(tiny_folder: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In davsp eval the first of two judges and the second, and in davsp judge."""
    guard = save_guard(tmp_path / "guard", AS_TEXT, {})
    judged = ["--judge-model", guard, "--max-unscored", "1"]
    for count in ("1", "2"):
        out, processes = tmp_path / count, ["--num-processes", count]
        command = [
            "eval",
            "--model",
            tiny_folder,
            "--device",
            "cpu",
            "--queries",
            data / "malicious",
            "--defense",
            "none",
        ]
        both = ["--judge", "llama-guard-3", "--judge", "llama-guard-4", *judged]
        assert forked(*command, *both, "--max-new-tokens", "4", "--out", out, *processes) == 0, capfd.readouterr().err
        again = ["judge", out, "--judge", "harmbench", "--queries", data / "malicious", "--device", "cpu"]
        assert forked(*again, *judged, *processes) == 0, capfd.readouterr().err
    names = sorted(path.name for path in (tmp_path / "1").glob("verdicts*.jsonl"))
    assert len(names) == 3
    for name in names:
        lines = [(tmp_path / count / name).read_text() for count in ("1", "2")]
        assert lines[0] == lines[1] and lines[0].count("\n") == 35 and "judge" in json.loads(lines[0].splitlines()[0])


def reproduced(out: Path) -> list[str]:
    """A searched text, a border and a table; the names of what was made."""
    torch.set_num_threads(1)
    sizes = {"vector": 6, "sweep": 4, "train": 8, "harm": 1, "utility": 1, "mme": 1, "llava_bench": 1}
    console = Console(quiet=True)
    kit = run.make_kit(
        embedded.load(device_map="cpu"), embedded.protocol(0, **sizes), out, text=embedded.SAFETY_TEXT,
        settings=embedded.SETTINGS.model_copy(update={"steps": 2, "batch_size": 4}), templates=TEMPLATES, console=console,
    )  # fmt: skip
    baselines.TOKENS |= {"steps": 1, "candidates": 2, "behaviours": 2}
    METHODS["pat"](kit)
    METHODS["davsp"](kit)
    return list(run.reproduce(["intervention"], kit).tables)


def test_reproduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "TOKENS", dict(baselines.TOKENS))
    assert together(partial(reproduced, tmp_path / "1"), 1) == [
        ["intervention"]
    ]  # what has run torch at length forks badly
    assert together(partial(reproduced, tmp_path / "2")) == [["intervention"], []]
    assert together(partial(reproduced, tmp_path / "2")) == [["intervention"], []]  # all of it is kept
    for name in ("intervention.md", "claims.md", "prompts/pat/pat.json", "queries.json", "vector/vector.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    deltas = [VisualSafetyPrompt.from_pretrained(tmp_path / count / "prompts" / "davsp").delta for count in ("1", "2")]
    assert (deltas[0] - deltas[1]).abs().max() <= 1 / 255 + 1e-6
    lines = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / count / "responses.jsonl").read_text().splitlines()]
        for count in ("1", "2")
    ]
    assert lines[0] == lines[1]
