"""Gates, changes of a canvas and davsp's own tables: two processes write what one writes."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from davsp import LVLM, HarmfulnessVector, VisualSafetyPrompt, embedded
from davsp.benchmarks.custom import save_queries
from davsp.defenses import NoDefense
from davsp.defenses.gate import calibrate
from davsp.embedded.data import calibration
from davsp.embedded.ecso_templates import TEMPLATES
from davsp.embedded.twins import sounding, twins
from davsp.experiments.corruptions.run import Corrupted
from davsp.experiments.deep import splits, unseen
from davsp.experiments.deep.begun import begun
from davsp.experiments.deep.borders import BORDERS
from davsp.experiments.deep.depth import depth
from davsp.experiments.gate import figures, kinds, run
from davsp.experiments.gate.looks import see
from davsp.experiments.gate.twins import Twins
from davsp.runtime import parallel
from forks import forked, shared_by_all, together
from tiny import queries

SIZES = {"harm": 2, "utility": 1, "mme": 1, "llava_bench": 1, "vector": 8, "sweep": 4, "train": 8}
SETTINGS = embedded.SETTINGS.model_copy(update={"steps": 1, "batch_size": 4})


@pytest.fixture(scope="module")
def data(lvlm: LVLM, vector: HarmfulnessVector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, label, count in (("malicious", "malicious", 6), ("benign", "benign", 6)):
        save_queries(folder / name, queries(label, count))
    for name, label, count in (("held-malicious", "malicious", 37), ("held-benign", "benign", 35)):
        save_queries(folder / name, [replace(q, id=f"held-{q.id}") for q in queries(label, count)])
    save_queries(folder / "test", [*queries("malicious", 7), *queries("benign", 4)])
    VisualSafetyPrompt.create(56, 9, "random", text="please be safe").save_pretrained(folder / "prompt")
    vector.save(folder / "vector")
    return folder


def test_gate(tiny_folder: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Through a border and through a text, in batches that two processes share."""
    sets = [
        part for name in ("malicious", "benign", "held-malicious", "held-benign") for part in (f"--{name}", data / name)
    ]
    for count in ("1", "2"):
        shutil.copytree(data / "prompt", tmp_path / count / "border")
        command = [
            "--model",
            tiny_folder,
            "--device",
            "cpu",
            "--vector",
            data / "vector",
            "--refusal",
            "sorry no",
            *sets,
        ]
        command += ["--false-refusals", "0.2", "--confidence", "0", "--num-processes", count]
        with shared_by_all(tmp_path / "shared") if count == "2" else nullcontext():
            assert forked("gate", tmp_path / count / "border", *command) == 0
            assert forked("gate", tmp_path / count / "look", "--look", "text", "--text", "be safe", *command) == 0
        said = capfd.readouterr()
        assert said.out.count("saved to") == 2 and "Error" not in said.err
    for name in ("border/gate.json", "look/gate.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    assert json.loads((tmp_path / "2" / "look" / "gate.json").read_text())["first"]["malicious"] == 37


@pytest.mark.parametrize("rank", [0, 1])
def test_corruptions(
    tiny_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    rank: int,
) -> None:
    """A process is killed: a sentence, and the same command goes on to what one process writes."""
    command = [
        "corruptions", "--model", tiny_folder, "--device", "cpu", "--queries", data / "test", "--prompt", data / "prompt",
        "--vector", data / "vector", "--change", "shift-1,jpeg-75", "--batch-size", "2", "--max-new-tokens", "4",
    ]  # fmt: skip
    prepare, done = Corrupted.prepare, list[int]()

    def killed(self: Corrupted, asked: Any) -> Any:
        done.append(1)
        if len(done) == 2:
            if parallel.rank() == rank:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # so that both get some; it is ended with the other
        return prepare(self, asked)

    with monkeypatch.context() as patch:
        patch.setattr(Corrupted, "prepare", killed)
        assert forked(*command, "--out", tmp_path / "2" / "tiny", "--num-processes", "2") == 2
    assert f"process {rank} of 2 (numbered from 0) was ended by SIGKILL" in capfd.readouterr().err
    for count in ("2", "1"):
        assert forked(*command, "--out", tmp_path / count / "tiny", "--num-processes", count) == 0
        assert capfd.readouterr().out.count("| shift-1") == 1
    for name in ("tiny/corruptions.json", "tiny/corruptions.md", "tiny/verdicts.jsonl", "shifts.svg"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def mini() -> LVLM:
    torch.set_num_threads(1)
    lvlm = embedded.load(device_map="cpu")
    lvlm.longest = 6
    return lvlm


def gate_table(out: Path) -> int:
    run.calibrate, figures.RATE = partial(calibrate, rate=0.2), 0.2  # type: ignore[attr-defined]  # of this fork
    some = Twins(twins(0, 2)[:6], sounding(0)[:4])
    return len(run.gate(
        mini(), embedded.protocol(0, **SIZES), calibration(0, 16), out, text=embedded.SAFETY_TEXT, refusal_text=embedded.REFUSAL,
        settings=SETTINGS, templates=TEMPLATES, twins=some, with_ecso=False, batch_size=4, console=Console(quiet=True),
    ))  # fmt: skip


def kinds_table(out: Path) -> int:
    run.calibrate = partial(calibrate, rate=0.2)  # type: ignore[attr-defined]
    kinds.SPLITS, kinds.TRAIN, kinds.SWEEP = ("theft+fraud", kinds.ALL), 8, 4
    kinds.SIZES = {"harm": 8, "utility": 1, "mme": 1, "llava_bench": 1}
    kinds.calibration = lambda seed: calibration(seed, 16)  # type: ignore[attr-defined]
    return len(kinds.kinds(
        mini(), out, text=embedded.SAFETY_TEXT, refusal_text=embedded.REFUSAL, settings=SETTINGS, batch_size=4,
        console=Console(quiet=True),
    ))  # fmt: skip


def deep_table(out: Path) -> int:
    lvlm, data = mini(), embedded.protocol(0, **SIZES)
    how: dict[str, Any] = {
        "text": embedded.SAFETY_TEXT,
        "settings": SETTINGS,
        "batch_size": 4,
        "console": Console(quiet=True),
    }
    return len(begun(lvlm, data, out, beginning="sure , here", **how) + depth(lvlm, data, out, **how))


def unseen_table(out: Path) -> int:
    kinds.TRAIN, kinds.SWEEP = 8, 4
    splits.SIZES = {"harm": 8, "utility": 1, "mme": 0, "llava_bench": 0}
    unseen.splits_of = lambda part: ("all", "theft")  # type: ignore[assignment]
    return len(unseen.unseen(
        mini(), out / "kinds-1", "kinds-1", text=embedded.SAFETY_TEXT, settings=SETTINGS, batch_size=4,
        console=Console(quiet=True),
    ))  # fmt: skip


def looked(folder: Path) -> list[Any]:
    """What the looks of `davsp reproduce gate` are made of, of queries with pictures and without, three a batch."""
    torch.set_num_threads(1)
    some = [*queries("malicious", 5), replace(queries("malicious", 6)[5], image=None), *queries("malicious", 8)[6:]]
    shown: list[int] = []
    seen = see(LVLM.from_pretrained(folder, device_map="cpu"), NoDefense(), some, "sorry no", 3, shown.append)
    return [part.tolist() for part in seen] + [shown]


def test_looks(tiny_folder: Path, tmp_path: Path) -> None:
    with shared_by_all(tmp_path / "shared"):
        (*one, shown), (*other, none) = together(partial(looked, tiny_folder))
    assert one == other == together(partial(looked, tiny_folder), 1)[0][:-1]
    assert shown == [3, 3, 1, 1] and none == [] and len(one[1]) == 8


@pytest.mark.parametrize(
    ("table", "folders", "trained"),
    [
        (gate_table, ["seed-0"], ["davsp"]),
        (kinds_table, ["theft+fraud", "all"], ["davsp"]),
        (deep_table, ["seed-0"], list(BORDERS)),
        (unseen_table, ["kinds-1/seed-0/all", "kinds-1/seed-0/theft"], list(BORDERS)),
    ],
)
@pytest.mark.slow
def test_own_tables(table: Callable[[Path], int], folders: list[str], trained: list[str], tmp_path: Path) -> None:
    """Whatever rests on the trained borders is the same to the byte: two processes begin with those of one, as δ may round otherwise."""
    (rows,) = together(partial(table, tmp_path / "1"), 1)
    for folder in folders:
        made, kept = tmp_path / "1" / folder, tmp_path / "2" / folder
        for part in ("vector", "train", "prompts", "prompt"):
            if (made / part).exists():
                shutil.copytree(made / part, kept / part, ignore=shutil.ignore_patterns("gate.json"))
        (kept / "stages").mkdir(parents=True)
        for stage in ("vector", *trained):
            shutil.copy(made / "stages" / f"{stage}.json", kept / "stages")
    with shared_by_all(tmp_path / "shared"):
        assert together(partial(table, tmp_path / "2")) == [rows, 0] and rows > 20
    files = {path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "2") for path in (tmp_path / "2").rglob("*") if path.is_file()}
    same = [path for path in sorted(files) if path.name in SAME or path.suffix in (".md", ".svg", ".npz")]
    same = [path for path in same if path.parent.name != "stages"]  # these hold seconds
    assert len(same) >= 3
    for path in same:
        assert (tmp_path / "1" / path).read_bytes() == (tmp_path / "2" / path).read_bytes(), path


SAME = ("metrics.json", "outcomes.json", "twins.json", "verdicts.jsonl", "gate.json")
