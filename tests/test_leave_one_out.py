"""A border of several models: trained a step on each in turns, and asked on the one that was left out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from command import run
from davsp import LVLM, DavspError, HarmfulnessVector, TrainSettings, VisualSafetyPrompt, embedded
from davsp.embedded.data import Protocol
from davsp.errors import Interrupted
from davsp.experiments import leave_one_out as experiment
from davsp.experiments.seeds import keep
from davsp.metrics import Outcome
from davsp.runtime.files import read_json
from davsp.training.in_turns import InTurns, Pupil, train_in_turns
from tiny import queries, save_tiny

SETTINGS = TrainSettings(steps=4, batch_size=4, layer=2, mu_plus=1e3, mu_minus=-1e3, optimizer="adam", lr=0.05, seed=3)
QUERIES = queries("malicious", 8), queries("benign", 8)


@pytest.fixture(scope="module")
def pupils(lvlm: LVLM, vector: HarmfulnessVector, tmp_path_factory: pytest.TempPathFactory) -> list[Pupil]:
    """The tiny model, and one like it with another canvas."""
    wide = LVLM.from_pretrained(save_tiny(tmp_path_factory.mktemp("wide"), canvas=84), device_map="cpu")
    return [
        Pupil(lvlm, vector, *QUERIES),
        Pupil(wide, HarmfulnessVector.fit(wide, *QUERIES, progress=False), *QUERIES),
    ]


def grey() -> VisualSafetyPrompt:
    return VisualSafetyPrompt.create(56, 8)


def steps(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_models_take_turns_and_each_has_rows_of_its_own(pupils: list[Pupil], tmp_path: Path) -> None:
    border = train_in_turns(grey(), pupils, SETTINGS, tmp_path / "two", progress=False)
    assert border.canvas == 56 and not torch.equal(border.delta, grey().delta)
    assert [line["model"] for line in steps(tmp_path / "two")] == [0, 1, 0, 1]
    border.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    both = " and ".join(Path(pupil.lvlm.model_id).name for pupil in pupils)
    assert f"# Visual safety prompt for {both}\n" in text and f"| model | {both} |" in text
    assert "base_model" not in text and str(tmp_path.parent) not in text
    assert VisualSafetyPrompt.from_pretrained(tmp_path / "saved").config["figures"] == {"train_step": 4}
    twice = InTurns(grey(), [pupils[0]] * 2, SETTINGS, tmp_path / "same")
    state = twice.checkpoint.start(grey().delta)
    (first, again), rows = zip(*(twice._step(replace(state, step=k)) for k in (0, 1)), strict=True)
    assert torch.equal(first, again) and rows[0]["loss"] == rows[1]["loss"]  # the first batch of either


def test_the_gradient_goes_through_the_resizing(pupils: list[Pupil], tmp_path: Path) -> None:
    """That of the wide model, against the loss a little to both sides."""
    training = InTurns(grey(), pupils, SETTINGS, tmp_path)
    state = replace(training.checkpoint.start(grey().delta), step=1)
    gradient, _ = training._step(state)
    wide = training.runs[1]

    def loss(delta: torch.Tensor) -> float:
        seen = grey().with_delta(delta).resized(84)
        assert seen.padding == 12
        return wide.gradient(seen.delta, wide._batch(0))[1]["loss"]

    way = gradient / gradient.norm()
    slope = (loss(state.delta + 0.02 * way) - loss(state.delta - 0.02 * way)) / 0.04
    assert slope == pytest.approx(float(gradient.norm()), rel=0.05)


def test_a_training_that_is_stopped_goes_on_to_the_same_bits(
    pupils: list[Pupil], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_in_turns(grey(), pupils, SETTINGS, tmp_path / "whole", progress=False)
    step = InTurns._step

    def stopped(self: InTurns, state: Any) -> Any:
        if state.step == 3:
            raise KeyboardInterrupt
        return step(self, state)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(InTurns, "_step", stopped)
        train_in_turns(grey(), pupils, SETTINGS, tmp_path / "parts", progress=False)
    assert len(steps(tmp_path / "parts")) == 3
    assert torch.equal(train_in_turns(grey(), pupils, SETTINGS, tmp_path / "parts", progress=False).delta, whole.delta)
    with pytest.raises(DavspError, match="other settings"):
        train_in_turns(grey(), [pupils[0], pupils[0]], SETTINGS, tmp_path / "parts", progress=False)


def test_what_cannot_take_turns(pupils: list[Pupil], tmp_path: Path) -> None:
    with pytest.raises(DavspError, match="two models or more"):
        train_in_turns(grey(), pupils[:1], SETTINGS, tmp_path)
    with pytest.raises(DavspError, match="5 steps cannot be shared evenly by 2 models"):
        train_in_turns(grey(), pupils, SETTINGS.model_copy(update={"steps": 5}), tmp_path)
    with pytest.raises(DavspError, match="canvas"):
        train_in_turns(VisualSafetyPrompt.create(84, 12), pupils, SETTINGS, tmp_path)
    assert not list(tmp_path.iterdir())


# -- the experiment ----------------------------------------------------------------------------------------------------


def test_each_model_is_asked_under_borders_that_never_met_it(
    pupils: list[Pupil], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, wide = (pupil.lvlm for pupil in pupils)
    lvlms = {"a": small, "b": wide, "c": small}
    for lvlm in lvlms.values():
        monkeypatch.setattr(lvlm, "longest", 3)
    bad, good = queries("malicious", 4, seed=1), queries("benign", 4, seed=1)
    test = [*(replace(q, group=q.id, benchmark="typo") for q in bad), *(replace(q, benchmark="utility") for q in good)]
    data = Protocol(*QUERIES, *QUERIES, *QUERIES, test)
    settings = SETTINGS.model_copy(update={"steps": 2})
    rows = experiment.leave_one_out(lvlms, data, tmp_path, text="please be safe", settings=settings)
    at = {(r["model"], r["defense"], r["metric"]): r for r in rows}
    assert {defense for model, defense, _ in at if model == "b" and "against" not in defense} == {
        "none", "text", "alone", "a", "c", "both"
    }  # fmt: skip
    assert at["b", "both", "accuracy"]["n"] == 4
    assert [at[asked, "both against one", "accuracy_difference"]["n"] for asked in ("b", "all")] == [8, 24]
    for pair in ("a+b", "b+c", "a+c"):
        border = VisualSafetyPrompt.from_pretrained(tmp_path / "seed-0" / pair / "prompts" / "both")
        assert border.canvas == lvlms[pair[0]].canvas
        assert len(steps(tmp_path / "seed-0" / pair / "train" / "both")) == 4  # two on each
    page = (tmp_path / "leave-one-out.md").read_text()
    assert "seeds 0." in page and page.count("| b |") == 9 and "| all | of both, less of one |" in page
    with pytest.raises(DavspError, match="pooled"):
        experiment.leave_one_out(
            lvlms, data, tmp_path, text="be safe", settings=settings, seed=1
        )  # of another text, and before anything is trained
    assert not (tmp_path / "seed-1").exists()


def test_two_sources_stand_beside_the_average_of_one(tmp_path: Path) -> None:
    """Each query is compared with its answer under either single source."""
    resisted = {
        "none": "0000", "text": "0000", "alone": "1111", "a": "1100", "b": "1000", "c": "0000", "both": "1110"
    }  # fmt: skip
    outcomes = {
        name: [
            Outcome(f"0 {model} {i}", model, "total", metric, f"g{i}", float(value))
            for model in "abc"
            for metric in ("rsr", "accuracy", "over_refusal")
            for i, value in enumerate(values)
        ]
        for name, values in resisted.items()
    }
    facts = {"seed": 0, "models": ["a", "b", "c"]}
    keep(tmp_path / "seed-0", facts, outcomes)
    rows = experiment.pool(tmp_path)
    at = {(r["model"], r["defense"], r["metric"]): r["value"] for r in rows}
    assert at["a", "both against one", "rsr_difference"] == 0.75 - (0.25 + 0) / 2
    assert at["c", "both against one", "rsr_difference"] == 0.75 - (0.5 + 0.25) / 2
    assert at["all", "both against one", "rsr_difference"] == pytest.approx(0.75 - 0.25)
    assert at["all", "one against text", "rsr_difference"] == 0.25
    assert at["a", "both", "rsr_difference"] == 0.75 and ("a", "a", "rsr") not in at
    assert read_json(tmp_path / "metrics.json")["rows"] == rows
    other = {
        name: [replace(o, query_id=f"1{o.query_id[1:]}", value=0.0) for o in found] for name, found in outcomes.items()
    }
    keep(tmp_path / "seed-1", facts | {"seed": 1}, other)
    rows = experiment.pool(tmp_path)
    at = {
        (r["split"], r["defense"]): r["value"] for r in rows if (r["model"], r["metric"]) == ("all", "rsr_difference")
    }
    assert [at[split, "both against one"] for split in ("total", "seed 0", "seed 1")] == [0.25, 0.5, 0.0]
    shutil.rmtree(tmp_path / "seed-1")
    outcomes["both"] = [replace(o, value=None) if o.metric == "rsr" else o for o in outcomes["both"]]  # unscored
    keep(tmp_path / "seed-0", facts, outcomes)
    experiment.pool(tmp_path)
    assert "| all | of both, less of one | – | +50.0 " in (tmp_path / "leave-one-out.md").read_text()


def test_the_command_asks_all_models_that_ship(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def noted(lvlms: Any, data: Any, out: Path, **how: Any) -> None:
        asked.update(how, models=list(lvlms))
        out.mkdir()
        (out / "leave-one-out.md").write_text("the table\n")

    monkeypatch.setattr(experiment, "leave_one_out", noted)
    monkeypatch.setattr(embedded, "protocol", lambda seed: seed)
    assert run("reproduce", "leave-one-out", "--steps", 7, "--seed", 2, "--out", tmp_path / "out") == 0
    assert "the table" in capsys.readouterr().out
    assert asked["models"] == list(embedded.MODELS)
    assert (asked["settings"].steps, asked["settings"].lam, asked["seed"]) == (7, 6.0, 2)
    for options, why in (
        (["--model", "davsp-mini-qwen"], "asks all models that ship; leave --model out"),
        (["--num-processes", 2], "reproduce leave-one-out takes one process"),
        (["--part", "turns"], "--part goes with deep-alignment"),
    ):
        assert run("reproduce", "leave-one-out", *options, "--out", tmp_path / "other") == 2
        assert why in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "other").exists()
