"""`davsp reproduce deep-alignment --part curve`: a border at every look of a training, and what is had at equal utility."""

import json
import shutil
from unittest.mock import Mock

import pytest
from rich.console import Console

from davsp import HarmfulnessVector, VisualSafetyPrompt, embedded, train
from davsp.experiments.deep import curve, curve_table
from davsp.experiments.seeds import keep
from davsp.experiments.stages import Stages
from davsp.metrics import Outcome

SIZES = {"harm": 2, "utility": 1, "mme": 1, "llava_bench": 1, "vector": 4, "sweep": 2, "train": 8}


def test_a_curve_has_a_border_at_every_look_and_goes_on(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(curve, "LOOKS", (0, 1, 40))  # two steps: the last look is there
    monkeypatch.setattr(curve, "CURVES", {name: curve.CURVES[name] for name in ("answer", "both, λ 6, every row")})
    monkeypatch.setattr(curve_table, "DRAWS", 20)
    lvlm = mini.told({})
    lvlm.longest = 6
    settings = embedded.SETTINGS.model_copy(update={"steps": 2, "batch_size": 2})
    data, done = embedded.protocol(0, **SIZES), []
    monkeypatch.setattr(curve, "keep", lambda to, facts, found: [done.append(facts["done"]), keep(to, facts, found)])
    rows = curve.curve(lvlm, data, tmp_path, text=embedded.SAFETY_TEXT, settings=settings)
    at = {(r["defense"], r["metric"]): r for r in rows if r["split"] == "total"}
    assert all((f"{name} step {k}", "rsr") in at for name in curve.CURVES for k in (0, 1, 2))
    pixels = [(tmp_path / "seed-0" / "answer" / f"step-{k}" / "vsp.png").read_bytes() for k in (0, 1, 2)]
    assert len(set(pixels)) == 3
    whole = train(
        lvlm, VisualSafetyPrompt.create(lvlm.canvas, 14, text=embedded.SAFETY_TEXT), data.train_malicious, data.train_benign,
        HarmfulnessVector.load(tmp_path / "seed-0" / "vector"), settings.model_copy(update={"objective": "answer"}), tmp_path / "t",
        progress=False,
    )  # fmt: skip
    saved = VisualSafetyPrompt.from_pretrained(tmp_path / "seed-0" / "answer" / "step-2")
    assert saved.pixels_sha256() == whole.quantised().pixels_sha256()  # the last look is what `davsp train` makes
    assert "best of both, any λ, less answers alone" in (tmp_path / "curve.md").read_text()
    assert ("both, λ 6, every row step 2 against answer", "accuracy_difference") in at
    assert "both, λ 6, every row step 2, less answers alone" in (tmp_path / "curve.md").read_text()
    assert (tmp_path / "curve.svg").read_text().startswith("<svg")
    facts = json.loads((tmp_path / "seed-0" / "manifest.json").read_text())
    assert facts["done"] == facts["wanted"] == list(curve.CURVES)
    assert done == [["answer"], list(curve.CURVES)]  # a call that is stopped after a curve leaves a seed under way
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub is asked"))
    shutil.rmtree(tmp_path / "seed-0" / "answer" / "step-1")  # lost: the checkpoint is behind it
    assert curve.curve(lvlm, data, tmp_path, text=embedded.SAFETY_TEXT, settings=settings) == rows
    assert [(tmp_path / "seed-0" / "answer" / f"step-{k}" / "vsp.png").read_bytes() for k in (0, 1, 2)] == pixels
    shutil.rmtree(tmp_path / "seed-0" / "answer" / "step-2")
    (tmp_path / "seed-0" / "train" / "answer" / "metrics.jsonl").unlink()  # the checkpoint is there, and no use without
    stages = Stages(tmp_path / "seed-0", Console(quiet=True))
    vector = HarmfulnessVector.load(tmp_path / "seed-0" / "vector")
    how = settings.model_copy(update={**curve.CURVES["answer"], "seed": 0})
    assert list(curve.looked_at(stages, "answer", lvlm, data, vector, how, embedded.SAFETY_TEXT)) == [0, 1, 2]
    assert [(tmp_path / "seed-0" / "answer" / f"step-{k}" / "vsp.png").read_bytes() for k in (0, 1, 2)] == pixels


def test_looks_end_where_the_training_ends(mini, tmp_path, monkeypatch):
    """`--steps 30` trains 30 steps and `--steps 60` as many, though neither is one of `LOOKS`."""
    monkeypatch.setattr(curve, "fingerprint", lambda _: "weights")
    monkeypatch.setattr(curve, "sha256", lambda _: "vector")
    border = VisualSafetyPrompt.create(32, 4)
    monkeypatch.setattr(Stages, "run", lambda self, name, inputs, *_: dict.fromkeys(inputs[2], border))
    stages, data, vector = Stages(tmp_path, Console(quiet=True)), embedded.protocol(0, **SIZES), Mock(HarmfulnessVector)
    for steps, looks in ((30, [0, 30]), (60, [0, 40, 60]), (150, [0, 40, 80, 150]), (200, [0, 40, 80, 150, 200])):
        settings = embedded.SETTINGS.model_copy(update={"steps": steps})
        assert list(curve.looked_at(stages, "answer", mini, data, vector, settings, "")) == looks


def test_at_the_same_step_curves_are_compared_query_by_query():
    def made(*values: float) -> list[Outcome]:
        return [Outcome(f"{i}", "malicious", "total", "rsr", f"{i}", value) for i, value in enumerate(values)]

    quarter, every = curve_table.QUARTER, curve_table.EVERY_ROW
    outcomes = {
        "none": made(0, 0), "answer step 0": made(0, 0), "answer step 40": made(1, 0), f"{quarter} step 40": made(0, 1),
        f"{every} step 40": made(1, 1), f"{every} step 80": made(1, 1),
    }  # fmt: skip
    rows = curve_table.at_equal_steps("m", outcomes)
    assert {r["defense"]: r["value"] for r in rows} == {
        f"{quarter} step 40 against answer": 0.0, f"{every} step 40 against answer": 0.5,
        f"{every} step 40 against {quarter}": 0.5,
    }  # fmt: skip


def test_the_best_at_equal_utility_is_chosen_among_what_loses_so_little():
    def made(rsr: float, utility: float) -> list[Outcome]:
        bad = [Outcome(f"b{i}", "malicious", "total", "rsr", f"b{i}", float(i < 100 * rsr)) for i in range(100)]
        return bad + [
            Outcome(f"g{i}", "utility", "total", "accuracy", f"g{i}", float(i < 100 * utility)) for i in range(100)
        ]

    outcomes = {
        "none": made(0.4, 1.0),
        "answer step 0": made(0.5, 1.0),
        "answer step 40": made(0.9, 0.96),
        "both, λ 1 step 40": made(1.0, 0.8),
    }
    at = {(r["defense"], r["metric"]): r for r in curve_table.choices("m", outcomes)}
    assert at["best of answer", "rsr_at_1"]["value"] == 0.5 and at["best of answer", "rsr_at_5"]["value"] == 0.9
    assert at["best of answer", "rsr_at_1"]["low"] < 0.5 < at["best of answer", "rsr_at_1"]["high"]
    assert at["best of both, λ 1", "rsr_at_10"]["value"] is None  # it loses 20
