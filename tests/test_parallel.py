"""Two processes do what one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from command import run
from davsp import HarmfulnessVector, VisualSafetyPrompt
from davsp.benchmarks.custom import save_queries
from davsp.errors import DavspError
from davsp.runtime import launch, parallel
from davsp.runtime.files import read_tensors
from davsp.training.batches import Batch
from davsp.training.borders import Run
from forks import forked, forked_nodes, free_port
from tiny import queries

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of torch's launcher

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


@pytest.fixture(scope="module")
def training(tiny_folder, data, tmp_path_factory):
    """`davsp train` of two steps, and the state that two processes reach with it."""
    command = [
        *common(tiny_folder, data), "--vector", data / "vector", "--optimizer", "adam", "--steps", "2", *STEPS
    ]  # fmt: skip
    out = tmp_path_factory.mktemp("two")
    assert forked(*command, "--out", out, "--num-processes", "2") == 0
    return command, state_of(out)


def state_of(out: Path) -> bytes:
    """All that the next step of a training depends on, with the metrics so far."""
    return (out / "training" / "checkpoint.safetensors").read_bytes() + (
        out / "training" / "metrics.jsonl"
    ).read_bytes()


def test_processes_on_two_nodes_reach_the_bits_of_two_on_one(training, tmp_path, capfd):
    command, state = training
    assert forked_nodes(*command, "--out", tmp_path) == [0, 0]
    assert state_of(tmp_path) == state
    assert capfd.readouterr().out.count("saved to") == 1


@pytest.mark.slow
def test_torchrun_on_two_nodes_reaches_the_bits_of_two_on_one(training, tiny_folder, data, tmp_path):
    """As a user starts it: torchrun twice, on ports of their own; training and answers."""
    command, state = training
    torchrun(*command, "--out", tmp_path / "train")
    assert state_of(tmp_path / "train") == state
    eval = ["eval", "--model", tiny_folder, "--device", "cpu", "--queries", data / "test", "--max-new-tokens", "6"]
    torchrun(*eval, "--max-unscored", "1", "--out", tmp_path / "nodes")
    assert forked(*eval, "--max-unscored", "1", "--out", tmp_path / "one") == 0
    assert answers(tmp_path / "nodes") == answers(tmp_path / "one")


def torchrun(*command: str | Path) -> None:
    port, env = free_port(), os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)),
                *("--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)),
                *("-m", "davsp.cli", *map(str, command)),
            ],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert [text.count(" in ") > 0 or "saved to" in text for text in said] == [True, False]  # the first one shows


def answers(out: Path) -> list[tuple[str, str, str]]:
    """Defense, query and text of every answer, in the order of the file."""
    lines = map(json.loads, (out / "responses.jsonl").read_text().splitlines())
    return [(line["defense"], line["query_id"], line["text"]) for line in lines]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_with_a_sentence_and_the_same_call_goes_on(
    training, tmp_path, monkeypatch, capfd, rank
):
    command, state = training
    advance = Run.advance

    def killed(self, now):
        if now.step == 1 and parallel.rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return advance(self, now)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", killed)
        assert forked(*command, "--out", tmp_path, "--num-processes", "2") == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and said.count("davsp: ") == 1
    assert said.endswith(
        f"davsp: process {rank} of 2 (numbered from 0) was ended by SIGKILL; often the machine's memory was full: give the same "
        "command again to go on.\n"
    )
    assert forked(*command, "--out", tmp_path, "--num-processes", "2") == 0
    assert state_of(tmp_path) == state


def test_ctrl_c_saves_in_two_processes_and_says_so(training, tmp_path, monkeypatch, capfd):
    command, state = training
    advance = Run.advance

    def stopped(self, now):
        if now.step == 1:
            if parallel.rank() == 0:
                os.kill(os.getppid(), signal.SIGINT)  # the terminal tells the launcher
            time.sleep(60)
        return advance(self, now)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", stopped)
        assert forked(*command, "--out", tmp_path, "--num-processes", "2") == 130
    said = capfd.readouterr().err
    assert said.count("stopped at step 1 of 2; the state is in") == 1, said
    assert "give the same command again" in said
    assert "Traceback" not in said and "SIGINT" not in said
    assert forked(*command, "--out", tmp_path, "--num-processes", "2") == 0
    assert state_of(tmp_path) == state


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
    assert launch.launch(["--help"], 2) == 0 and capfd.readouterr().out.count("Usage: ") == 1
    assert launch.launch(["nonsense"], 2) == 2 and "nonsense" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ("╭─ Error ──╮\n│ No such command 'nonsense'.   │\n╰──────────╯\n", "failed: No such command 'nonsense'."),
        ("a warning\ndavsp: there is no such file.\n\n", "davsp: there is no such file."),
        ("\n────\n", "failed: it left no word"),
    ],
)
def test_the_last_words_of_a_process_without_the_terminal_are_told(tmp_path, left, said, capsys):
    """If it ends before process 0, which makes the same mistake, has said so."""
    log = tmp_path / "run" / "attempt_0" / "1" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text(left)
    assert launch._ended({1: 2}, 2, tmp_path) == 2
    assert capsys.readouterr().err.rstrip("\n").endswith(said)


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_mistake_is_one_sentence_and_code_2_in_two_processes_as_well(tiny_folder, data, tmp_path, fresh, capfd):
    command = [
        *common(tiny_folder, data), "--vector", tmp_path / "none", "--out", tmp_path / "x", "--num-processes", "2"
    ]  # fmt: skip
    code, said = outcome(command, fresh, capfd)
    assert code == 2 and "Traceback" not in said
    # on a busy machine the second process may have said the same before it was ended
    assert len({line for line in said.splitlines() if line.startswith("davsp: ")}) == 1, said


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_batch_smaller_than_the_processes_is_refused(tiny_folder, data, tmp_path, fresh, capfd):
    command = [
        *common(tiny_folder, data), "--vector", data / "vector", "--out", tmp_path / "y", "--batch-size", "2",
        "--padding", "9", "--text", "please be safe", "--num-processes", "3",
    ]  # fmt: skip
    code, said = outcome(command, fresh, capfd)
    assert code == 2 and "batch_size 2 is less than the 3 processes" in said


def outcome(command: list[str | Path], fresh: bool, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what was said, of new processes or of forks."""
    if not fresh:
        return forked(*command), capfd.readouterr().err
    done = davsp(*command)
    return done.returncode, done.stderr


def common(tiny_folder: Path, data: Path) -> list[str | Path]:
    """`davsp train` on the tiny model and both classes."""
    classes = ["--malicious", data / "malicious", "--benign", data / "benign"]
    return ["train", "--model", tiny_folder, "--device", "cpu", *classes]


@pytest.mark.parametrize(
    ("last", "code", "sentence"),
    [
        ("sys.exit('davsp: no more')", 1, "davsp: no more"),
        ("os.kill(os.getpid(), 9)", 2, "davsp: process 1 of 2 (numbered from 0) was ended by SIGKILL; often the machine's memory was full"),
        ("1 / 0", 1, "davsp: process 1 of 2 (numbered from 0) failed: ZeroDivisionError: division by zero"),
        ("sys.exit(3)", 3, "it left no word"),
    ],
)  # fmt: skip
def test_a_process_that_dies_ends_the_others(monkeypatch, capfd, last, code, sentence):
    """Without it the others would wait for its gradient for ever; one sentence says which it was, and why."""
    script = f"import os, sys, time; {last} if os.environ['RANK'] == '1' else time.sleep(100)"
    monkeypatch.setattr(launch, "_entry", lambda words: (sys.executable, ("-c", script), "spawn"))
    handlers = [signal.getsignal(number) for number in launch.SIGNALS]
    assert launch.launch([], 2) == code
    said = capfd.readouterr()
    assert said.err.count("\n") == 1 and sentence in said.err and said.out == ""
    assert [signal.getsignal(number) for number in launch.SIGNALS] == handlers


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


class Gpus:
    """A machine with GPUs, as far as CUDA_VISIBLE_DEVICES lets a process see them."""

    def __init__(self, monkeypatch, count: int, visible: str | None = None, **environment: int) -> None:
        monkeypatch.delenv(launch.VISIBLE, raising=False)
        if visible is not None:
            monkeypatch.setenv(launch.VISIBLE, visible)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", self.seen)
        self.count = count

    def seen(self) -> int:
        visible = os.environ.get(launch.VISIBLE)
        return self.count if visible is None else len(visible.split(","))


def test_more_processes_than_gpus(monkeypatch, capsys):
    Gpus(monkeypatch, 1)
    assert run("train", "--num-processes", "2") == 2
    assert "2 processes with 1 GPU each are more than the 1 GPUs here" in capsys.readouterr().err
    Gpus(monkeypatch, 3)
    assert run("train", "--num-processes", "2", "--gpus-per-process", "2") == 2
    assert "2 processes with 2 GPUs each are more than the 3 GPUs here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "local", "each", "own", "place"),
    [
        (None, 0, None, "0", "cuda"),
        (None, 1, None, "1", "cuda"),  # of the second node, where its number is 5 of 8
        (None, 1, 2, "2,3", "auto"),
        ("4,5,6,7", 1, 2, "6,7", "auto"),
        ("GPU-a,GPU-b", 1, None, "GPU-b", "cuda"),
    ],
)
def test_a_process_sees_the_gpus_of_its_number_on_this_machine(monkeypatch, visible, local, each, own, place):
    Gpus(monkeypatch, 4, visible, RANK=local + 4, WORLD_SIZE=8, LOCAL_RANK=local, LOCAL_WORLD_SIZE=2)
    assert launch.take_gpus(each) == place
    assert os.environ[launch.VISIBLE] == own


def test_gpus_that_cannot_be_had(monkeypatch, capsys):
    assert launch.take_gpus(None) is None  # one process: as it was
    for asked in (["--num-processes", "2"], []):
        monkeypatch.setattr(launch, "launch", lambda *_: launch.take_gpus(1))
        assert run("train", "--gpus-per-process", "1", *asked) == 2
        assert "--gpus-per-process needs GPUs, and there is none here" in capsys.readouterr().err
    assert run("eval", "--gpus-per-process", "1", "--device", "cpu") == 2
    assert "--gpus-per-process and --device cpu do not go together" in capsys.readouterr().err
    assert run("eval", "--num-processes", "2", "--device", "cuda:1") == 2
    assert "--device cuda:1 is one for all processes" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("eval", "--num-processes", "4") == 2
    assert "torchrun started 2 processes; leave --num-processes 4 out" in capsys.readouterr().err
    Gpus(monkeypatch, 1, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)
    with pytest.raises(DavspError, match="2 processes with 1 GPU each are more than the 1 GPUs here"):
        launch.take_gpus(None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)  # a platform that looks once
    with pytest.raises(DavspError, match="GPU 1 cannot be set apart for process 0"):
        launch.take_gpus(None)
