"""The loop: nothing stops it from reaching the same bits, and what it can't use it refuses."""

import errno
import faulthandler
import os
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from davsp import LVLM, AdditiveNoise, DavspError, TrainSettings, VisualSafetyPrompt, train
from davsp.errors import Interrupted
from davsp.runtime.files import alone, save_tensors
from davsp.training.borders import Run
from davsp.training.settings import Augmentation
from test_training import BENIGN, FAST, MALICIOUS, go, lines


@pytest.fixture
def prompt():
    return VisualSafetyPrompt.create(56, 9, text="please be safe")


@pytest.mark.parametrize(
    "change",
    [{"optimizer": "sign"}, {"optimizer": "adam"}, {"augment": get_args(Augmentation)}, {"adversarial": 4}],
    ids=repr,
)
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_interrupt_and_resume_is_uninterrupted(lvlm, prompt, vector, tmp_path, monkeypatch, change, stop):
    settings = FAST.model_copy(update=change)
    whole = go(lvlm, prompt, vector, tmp_path / "whole", settings)
    advance = Run.advance

    def interrupted(self, state):
        if state.step == stop:
            raise KeyboardInterrupt
        return advance(self, state)

    monkeypatch.setattr(Run, "advance", interrupted)
    with pytest.raises(Interrupted, match=f"stopped at step {stop} of 6.*same command again to go on"):
        go(lvlm, prompt, vector, tmp_path / "parts", settings)
    monkeypatch.undo()
    resumed = go(lvlm, prompt, vector, tmp_path / "parts", settings)
    assert torch.equal(whole.delta, resumed.delta)
    for name in ("metrics.jsonl", "checkpoint.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_kill_9_and_resume_is_uninterrupted(lvlm, prompt, vector, tmp_path):
    settings = FAST.model_copy(update={"steps": 15, "checkpoint_every": 3, "optimizer": "adam"})
    out, advance = tmp_path / "killed", Run.advance
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, where there are threads
        child = os.fork()  # what a fresh process imports for seconds is there already
    if child == 0:
        faulthandler.dump_traceback_later(120, exit=True)  # one that hangs tells where
        try:
            Run.advance = lambda self, state: advance(self, state) if state.step < 7 else signal.pause()
            go(lvlm, prompt, vector, out, settings)
        finally:
            os._exit(0)
    limit = time.time() + 120
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_bytes().count(b"\n") == 7):
        assert os.waitpid(child, os.WNOHANG)[0] == 0 and time.time() < limit, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(lines(out)) == 7  # the checkpoint is of step 6
    resumed = go(lvlm, prompt, vector, out, settings)
    whole = go(lvlm, prompt, vector, tmp_path / "whole", settings)
    assert torch.equal(whole.delta, resumed.delta)
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()


def test_a_second_training_in_the_folder_is_refused_while_the_first_is_there(lvlm, prompt, vector, tmp_path):
    with alone(tmp_path), pytest.raises(DavspError, match="another davsp is writing"):
        go(lvlm, prompt, vector, tmp_path)
    assert not list(tmp_path.iterdir())
    go(lvlm, prompt, vector, tmp_path)


def test_a_finished_run_is_not_run_again(lvlm, prompt, vector, tmp_path, monkeypatch):
    first = go(lvlm, prompt, vector, tmp_path)
    monkeypatch.setattr(Run, "advance", None)
    assert torch.equal(go(lvlm, prompt, vector, tmp_path).delta, first.delta)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lr", {"lr": 1 / 255}),
        ("seed", {"seed": 5}),
        ("layer", {"layer": 1}),
        ("steps", {"steps": 9}),
        ("micro_batch", {"micro_batch": 1}),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(lvlm, prompt, vector, tmp_path, name, change):
    settings = FAST.model_copy(update={"layer": 2, "mu_plus": 1e3, "mu_minus": -1e3})
    go(lvlm, prompt, vector, tmp_path, settings)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(DavspError, match=rf"checkpoint\.safetensors is of a run with other settings \(.*{name}"):
        go(lvlm, prompt, vector, tmp_path, settings.model_copy(update=change))
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    go(lvlm, prompt, vector, tmp_path, settings.model_copy(update=change), resume=False)


def test_a_checkpoint_of_another_eps_padding_or_weights_is_refused(lvlm, vector, tiny_folder, tmp_path):
    """Noise of every eps starts at zero, black borders of all widths are alike, a folder keeps its name."""
    noise = AdditiveNoise.create(56, 8 / 255)
    go(lvlm, noise, vector, tmp_path)
    with pytest.raises(DavspError, match=r"other settings \(prompt\)"):
        go(lvlm, AdditiveNoise.create(56, 32 / 255), vector, tmp_path)
    other = LVLM.from_pretrained(tiny_folder, device_map="cpu")
    next(other.model.parameters()).data.flatten()[0] += 1
    with pytest.raises(DavspError, match=r"other settings \(weights\)"):
        go(other, noise, vector, tmp_path)
    borders = [VisualSafetyPrompt(torch.zeros(3, 56, 56), padding) for padding in (8, 9)]
    identities = [Run(lvlm, b, MALICIOUS, BENIGN, vector, FAST, tmp_path, []).checkpoint.identity for b in borders]
    assert identities[0]["prompt"] != identities[1]["prompt"]


def test_a_checkpoint_of_other_data_is_refused(lvlm, prompt, vector, tmp_path):
    go(lvlm, prompt, vector, tmp_path)
    with pytest.raises(DavspError, match=r"other settings \(data\)"):
        train(lvlm, prompt, MALICIOUS[1:], BENIGN, vector, FAST, tmp_path, progress=False)
    with pytest.raises(DavspError, match=r"other settings \(prompt, data\)"):
        go(lvlm, VisualSafetyPrompt.create(56, 9, text="please"), vector, tmp_path)
    save_tensors(tmp_path / "checkpoint.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(DavspError, match="is not a checkpoint"):
        go(lvlm, prompt, vector, tmp_path)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk(lvlm, prompt, vector, tmp_path, monkeypatch, call):
    settings = FAST.model_copy(update={"checkpoint_every": 3})
    real, calls = getattr(os, call), []

    def full_after_two(*args):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, full_after_two)
    full = "metrics.jsonl" if call == "fsync" else "checkpoint.safetensors"  # which of them is the third to be written
    with pytest.raises(DavspError, match=rf"cannot write .*{full}: No space left"):
        go(lvlm, prompt, vector, tmp_path, settings)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "metrics.jsonl"]
    assert torch.equal(
        go(lvlm, prompt, vector, tmp_path, settings).delta, go(lvlm, prompt, vector, tmp_path / "whole", settings).delta
    )


def test_bad_data(lvlm, prompt, vector, tmp_path):
    def attempt(malicious, benign, settings=FAST):
        train(lvlm, prompt, malicious, benign, vector, settings, tmp_path / "out", progress=False)

    with pytest.raises(DavspError, match="no malicious queries"):
        attempt([], BENIGN)
    with pytest.raises(DavspError, match="no benign queries"):
        attempt(MALICIOUS, [])
    with pytest.raises(DavspError, match="malicious-0 has no image"):
        attempt([replace(MALICIOUS[0], image=None)], BENIGN)
    with pytest.raises(DavspError, match="benign-0 has no reference"):
        attempt(MALICIOUS, [replace(BENIGN[0], reference="")])
    with pytest.raises(DavspError, match=r"cannot open image .*gone\.png"):
        attempt([replace(MALICIOUS[0], image=Path("gone.png"))], BENIGN)
    assert not (tmp_path / "out").exists()
    attempt(MALICIOUS, [replace(BENIGN[0], reference="")], FAST.model_copy(update={"objective": "projection"}))


def test_bad_settings(lvlm, prompt, vector, tmp_path):
    with pytest.raises(DavspError, match="layer 4 is out of range"):
        go(lvlm, prompt, vector, tmp_path, FAST.model_copy(update={"layer": 4}))
    with pytest.raises(DavspError, match="must be above mu_minus"):
        go(lvlm, prompt, vector, tmp_path, FAST.model_copy(update={"mu_plus": -99.0}))
    with pytest.raises(DavspError, match="vector is of another model"):
        go(lvlm, prompt, replace(vector, vectors=vector.vectors[:, :16]), tmp_path)
    with pytest.raises(DavspError, match="canvas is 24x24 pixels"):
        go(lvlm, VisualSafetyPrompt.create(24, 5), vector, tmp_path)
    for bad in (
        {"stepz": 3},
        {"batch_size": 3},
        {"lr": 0},
        {"optimizer": "sgd"},
        {"steps": 0},
        {"lam": -1},
        {"micro_batch": 0},
    ):
        with pytest.raises(ValueError):
            TrainSettings(**bad)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_is_said(lvlm, prompt, vector, tmp_path):
    bad = replace(vector, vectors=vector.vectors * float("nan"))
    with pytest.raises(DavspError, match="loss is not finite at step 1"):
        go(lvlm, prompt, bad, tmp_path)
