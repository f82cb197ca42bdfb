"""Two processes do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from davsp import HarmfulnessVector, VisualSafetyPrompt
from davsp.benchmarks.custom import save_queries
from davsp.errors import DavspError
from davsp.runtime import parallel
from davsp.runtime.files import read_tensors
from davsp.training.batches import Batch
from forks import forked
from tiny import queries

STEPS = ["--batch-size", "6", "--padding", "9", "--text", "please be safe", "--lr", "0.002", "--seed", "3"]


@pytest.fixture(scope="module")
def data(lvlm, tmp_path_factory) -> Path:
    """Folders of queries and a vector, as a user has them."""
    folder = tmp_path_factory.mktemp("data")
    bad, good = queries("malicious", 7), queries("benign", 7)
    save_queries(folder / "malicious", bad)
    save_queries(folder / "benign", good)
    save_queries(folder / "test", [*queries("malicious", 9, 3), *queries("benign", 8, 3)])
    HarmfulnessVector.fit(lvlm, bad, good, text="please be safe", progress=False).save(folder / "vector")
    VisualSafetyPrompt.create(56, 9, "random", text="please be safe").save_pretrained(folder / "prompt")
    return folder


def davsp(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(
        [sys.executable, "-m", "davsp.cli", *map(str, command)], capture_output=True, text=True, timeout=240, env=env
    )


@pytest.mark.parametrize("steps", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_two_processes_train_the_delta_of_one(tiny_folder, data, tmp_path, steps, capfd):
    """Adam, both losses: within 1e-6 before rounding; the prompt, the metrics and the checkpoint are written once."""
    deltas, logs = [], []
    for count in ("1", "2"):
        out = tmp_path / count
        command = [
            "train", "--model", tiny_folder, "--device", "cpu", "--malicious", data / "malicious", "--benign", data / "benign",
            "--vector", data / "vector", "--out", out, "--optimizer", "adam", "--steps", str(steps), *STEPS,
            "--num-processes", count,
        ]  # fmt: skip
        if steps == 2:
            assert forked(*command) == 0
            said = capfd.readouterr().out
        else:
            done = davsp(*command)
            assert done.returncode == 0, done.stderr
            said = done.stdout
        assert said.count("saved to") == 1
        deltas.append(read_tensors(out / "training" / "checkpoint.safetensors")["delta"])
        logs.append([json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()])
    assert (deltas[0] - deltas[1]).abs().max() <= 1e-6
    assert (deltas[0] - VisualSafetyPrompt.create(56, 9).delta).abs().max() > 0.0015 * steps
    assert [r["step"] for r in logs[1]] == list(range(1, steps + 1))
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-4, atol=1e-5)
    saved = [VisualSafetyPrompt.from_pretrained(tmp_path / count).delta for count in ("1", "2")]
    assert (saved[0] - saved[1]).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_write_the_result_file_of_one(tiny_folder, data, tmp_path, fresh):
    for count in ("1", "2"):
        command = [
            "eval", "--model", tiny_folder, "--device", "cpu", "--prompt", data / "prompt", "--queries", data / "test",
            "--out", tmp_path / count, "--max-new-tokens", "6", "--num-processes", count, "--max-unscored", "1",
        ]  # fmt: skip
        if fresh:
            done = davsp(*command)
            assert done.returncode == 0, done.stderr
        else:
            assert forked(*command) == 0
    for name in ("metrics.json", "verdicts.jsonl", "run.json", "queries.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    lines = [(tmp_path / c / "responses.jsonl").read_text().splitlines() for c in ("1", "2")]
    texts = [[(r["defense"], r["query_id"], r["text"]) for r in map(json.loads, found)] for found in lines]
    assert texts[0] == texts[1] and len(texts[0]) == 2 * 17


def test_fresh_processes_run_the_command(capfd):
    """What a user starts; where other tests here take forks, those marked slow start the whole command."""
    assert parallel.launch(["--help"], 2) == 0 and capfd.readouterr().out.count("Usage: ") == 1
    assert parallel.launch(["nonsense"], 2) == 2 and "nonsense" in capfd.readouterr().err


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_mistake_is_one_sentence_and_code_2_in_two_processes_as_well(tiny_folder, data, tmp_path, fresh, capfd):
    command = [
        *common(tiny_folder, data), "--vector", tmp_path / "none", "--out", tmp_path / "x", "--num-processes", "2"
    ]  # fmt: skip
    if fresh:
        done = davsp(*command)
        code, said = done.returncode, done.stderr
    else:
        code, said = forked(*command), capfd.readouterr().err
    assert code == 2 and "Traceback" not in said
    # on a busy machine the second process may have said the same before it was ended
    assert len({line for line in said.splitlines() if line.startswith("davsp: ")}) == 1, said


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_batch_smaller_than_the_processes_is_refused(tiny_folder, data, tmp_path, fresh, capfd):
    command = [
        *common(tiny_folder, data), "--vector", data / "vector", "--out", tmp_path / "y", "--batch-size", "2",
        "--padding", "9", "--text", "please be safe", "--num-processes", "3",
    ]  # fmt: skip
    if fresh:
        done = davsp(*command)
        code, said = done.returncode, done.stderr
    else:
        code, said = forked(*command), capfd.readouterr().err
    assert code == 2 and "batch_size 2 is less than the 3 processes" in said


def common(tiny_folder: Path, data: Path) -> list[str | Path]:
    """`davsp train` on the tiny model and both classes."""
    classes = ["--malicious", data / "malicious", "--benign", data / "benign"]
    return ["train", "--model", tiny_folder, "--device", "cpu", *classes]


def test_a_process_that_dies_ends_the_others(monkeypatch, tmp_path):
    """Without it the others would wait for its gradient for ever."""
    code = "import os, sys, time; sys.exit('davsp: no more') if os.environ['RANK'] == '1' else time.sleep(100)"
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"RANK": str(i)}, stderr=subprocess.DEVNULL)
        for i in range(2)
    ]
    assert parallel._wait(children) == 1
    assert all(child.poll() is not None for child in children)


def test_shares_make_the_batch():
    batch = Batch(
        torch.arange(5 * 3).reshape(5, 3, 1, 1).byte(),
        list("abcde"),
        torch.tensor([True, True, True, False, False]),
        list("abcde"),
    )
    shares = [batch.share(i, 2) for i in range(2)]
    assert [one.questions for one in shares] == [["a", "c", "e"], ["b", "d"]]
    assert torch.equal(torch.cat([one.malicious for one in shares]), batch.malicious[[0, 2, 4, 1, 3]])


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DavspError, match="more than the 1 GPUs"):
        parallel.launch(["train"], 2)
