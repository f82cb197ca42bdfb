"""A mistake that can be seen in the options or in the queries is told before a model is loaded, let alone a vector fitted."""

from pathlib import Path
from typing import Any

import pytest

from command import run
from davsp.benchmarks.custom import save_queries
from davsp.prompts import VisualSafetyPrompt
from davsp.query import Query

OWN = ["--malicious", "bad", "--benign", "good"]
HELD = ["--held-malicious", "held-bad", "--held-benign", "held-good"]
GATE = ["gate", "looks", "--look", "none", *OWN]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--benign-share", "0.99", "--batch-size", "4"], "--benign-share 0.99 is not possible"),
        (["train", "--malicious-answer-share", "1.5"], "--malicious-answer-share 1.5 is not possible"),
        (["train", "--recipe", "published", "--lr", "0"], "--lr 0.0 is not possible"),
        (["train", *OWN], "--vector is needed"),
        (["train", *OWN, "--vector", "nowhere"], "nowhere"),
        (["train", "--malicious", "good", "--benign", "bad"], "stands among the malicious ones"),
        (["vector", *OWN, "--held-malicious", "nowhere", "--held-benign", "good"], "no queries at nowhere"),
        ([*GATE, *HELD], "there are 4 benign queries to calibrate on"),
        ([*GATE, "--held-malicious", "bad", "--held-benign", "good"], "in the fitting set and held out"),
        ([*GATE, *HELD, "--false-refusals", "0.4", "--confidence", "0", "--vector", "nowhere"], "nowhere"),
        (["reproduce", "ablation", "--recipe", "mine"], "--recipe 'mine' is not known"),
        (["baseline", "pat", "--malicious", "good", "--benign", "bad"], "stands among the malicious ones"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_before_a_model_is_loaded(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("davsp.lvlm.base.LVLM.from_pretrained", loads)
    for name, label in (("bad", "malicious"), ("good", "benign"), ("held-bad", "malicious"), ("held-good", "benign")):
        save_queries(name, [Query(f"{name}-{i}", "What is it?", label, "own") for i in range(4)])
    assert run(*arguments) == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--padding", "400"], "padding 400 leaves no room"),
        (["train", "--layer", "99"], "layer 99 is out of range"),
        (["reproduce", "ablation", "--padding", "400"], "padding 400 leaves no room"),
        (["gate", "small", "--draw", "4", "--false-refusals", "0.4", "--confidence", "0"], "20x20"),
    ],
)
def test_a_mistake_is_told_before_a_vector_is_fitted(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fits(*_: Any, **__: Any) -> None:
        raise AssertionError("a vector is fitted")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("davsp.vector.HarmfulnessVector.fit", fits)
    VisualSafetyPrompt.create(20, 4).save_pretrained("small")
    assert run(*arguments) == 2 and says in capsys.readouterr().err


def test_a_card_without_canaries_is_told_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    VisualSafetyPrompt.create(20, 4).save_pretrained("small")
    assert run("card", "small", "--model", "nobody/has-it") == 2
    assert "canaries are drawn for the models that ship alone" in capsys.readouterr().err
