"""The race of recipes in small: the published one as it is published, what counts as good, and turns."""

import json
from functools import partial
from random import Random
from types import SimpleNamespace

import published_recipe
import pytest
import time_to_quality
import torch

from davsp import TrainSettings, VisualSafetyPrompt, embedded
from davsp.errors import DavspError
from davsp.training.borders import Run
from tiny import queries


@pytest.fixture
def recipe(lvlm, vector, tmp_path):
    """The published one on the tiny model."""
    settings = published_recipe.published_settings(vector, TrainSettings(refusal="sorry no"))
    prompt = VisualSafetyPrompt.create(56, 9)
    return Run(lvlm, prompt, queries("malicious", 5), queries("benign", 6), vector, settings, tmp_path, [])


def test_the_published_recipe(lvlm, vector, recipe, monkeypatch):
    """Batches of one class that come again in the same order, signs of a level each, mean colour, no clamp."""
    steps_taken, gradient = [], recipe.gradient

    def spy(delta, batch):
        steps_taken.append((delta, batch))
        return torch.sign(recipe.prompt.delta), {}  # always the same way, so that the border leaves [0, 1]

    monkeypatch.setattr(recipe, "gradient", spy)
    steps = published_recipe.published(recipe, seed=0)
    prompts = [next(steps) for _ in range(200)]
    mask = recipe.prompt.mask
    torch.testing.assert_close(steps_taken[0][0], lvlm.mean.view(3, 1, 1) * mask)
    torch.testing.assert_close(steps_taken[1][0], steps_taken[0][0] - mask / 255)
    assert steps_taken[199][0].min() < 0 and prompts[-1].delta.min() == 0
    batches = {
        label: [b for _, b in steps_taken if bool(b.malicious[0]) == (label == "malicious")]
        for label in recipe.__dict__
    }
    bad, good = batches["malicious"], batches["benign"]
    assert 70 < len(bad) < 130 and all(bool(b.malicious.all()) != bool((~b.malicious).all()) for _, b in steps_taken)
    assert [b.questions for b in bad[:9]] == [b.questions for b in bad[3:12]]  # five queries: three batches
    assert [b.interiors.sum() for b in good[:9]] == [b.interiors.sum() for b in good[3:12]]
    assert all(b.answered == len(b) for b in good) and 0 < sum(b.answered > 0 for b in bad) < 25
    gradient(recipe.prompt.delta, bad[0])  # and the loop can take such a batch


def test_the_published_loss_on_this_models_scale(vector, recipe):
    """Margins 29 apart are the class means; the hinge in that unit plus 0.02 x the answer loss, times the unit."""
    benign, malicious = (float(mean[vector.layer - 1]) for mean in (vector.mean_benign, vector.mean_malicious))
    assert (recipe.mu_plus, recipe.mu_minus) == pytest.approx((malicious, benign))
    assert recipe.weight_hinge == 1 and recipe.weight_answer == pytest.approx(0.02 * (malicious - benign) / 29)


def look(step: int, rsr: float, utility: float) -> dict[str, float]:
    return {"step": step, "cpu": 2.0 * step, "wall": 3.0 * step, "rsr": rsr, "utility": utility}


def test_good_is_what_stays_good():
    """From the first look after the last bad one; both bars count, and either bound belongs to good."""
    good, unsafe, useless = (0.95, 0.9), (0.94, 1.0), (1.0, 0.89)
    curve = [look(10 * n, *rates) for n, rates in enumerate([good, unsafe, good, useless, good, good], 1)]
    assert time_to_quality.held(curve, 0.9) == {"step": [40, 50], "cpu": [80, 100], "wall": [120, 150]}
    assert time_to_quality.held(curve[:1], 0.9) == {"step": [0, 10], "cpu": [0, 20], "wall": [0, 30]}
    assert time_to_quality.held(curve[:4], 0.9) is None and time_to_quality.held(curve[:3], 0.9)["step"] == [20, 30]


def test_laps_count_steps_and_not_looks(monkeypatch):
    border, now = VisualSafetyPrompt.create(56, 9), [0.0]
    clock = SimpleNamespace(process_time=lambda: now[0], perf_counter=lambda: 2 * now[0])
    monkeypatch.setattr(time_to_quality, "time", clock)

    def steps():
        for number in range(1, 8):
            now[0] += 1
            yield border.with_delta(border.delta * 0 + number)

    def seen(prompt):
        now[0] += 100
        return {"rsr": float(prompt.delta.max())}

    rows = list(time_to_quality.laps(steps(), seen, limit=7, every=3))
    assert [(row["step"], row["cpu"], row["wall"], row["rsr"]) for row in rows] == [
        (3, 3, 6, 3),
        (6, 6, 12, 6),
        (7, 7, 14, 7),
    ]


def test_recipes_over_seeds():
    """Never is more than any number: in the median, and against the first recipe's whole run."""

    def seed(*steps):
        recipes = {}
        for name, step in zip(("default", "fast"), steps, strict=True):
            curve = [look(10 * n, 1.0, 0.9 if step and 10 * n >= step else 0.5) for n in range(1, 6)]
            recipes[name] = {"held": time_to_quality.held(curve, 0.9), "curve": curve}
        return {"no_defense": {"utility": 0.92}, "recipes": recipes}

    table = time_to_quality.summary([seed(40, 20), seed(None, 10), seed(20, None)], "cpu")
    assert table["default"]["step"] == [40, 20, None] and table["default"]["cpu"] == [80, 40, None]
    assert (table["fast"]["good"], table["fast"]["seeds"], table["fast"]["step"]) == (2, 3, [20, 10, None])
    assert table["fast"]["times"] == [0.5, 0.2, None] and table["default"]["times"] == [1, None, 1]
    assert table["fast"]["whole"] == [100, 100, 100] and table["fast"]["lost"] == [0.02, 0.02, 0.42]
    time_to_quality.show({"clock": "cpu", "summary": table})


def test_the_literal_step_has_the_gradient_of_ours(lvlm, vector, recipe):
    """One backward for all, eager attention, padding: the same numbers at another price."""
    batch = published_recipe.epoch(recipe, "benign", Random(0))[0]
    delta = recipe.prompt.delta
    ours = recipe.gradient(delta, batch)[0]
    lvlm.model.set_attn_implementation("eager")
    try:
        theirs = time_to_quality.literal(recipe, delta, batch, 64, stacked=True)
    finally:
        lvlm.model.set_attn_implementation("sdpa")
    assert ours.abs().max() > 1e-6 and (theirs - ours).abs().max() < 1e-4 * ours.abs().max()


def test_steps_are_timed_in_pairs(lvlm):
    data = embedded.protocol(0, vector=6, sweep=6, train=6, harm=1, utility=1, mme=1, llava_bench=1)
    settings = TrainSettings(batch_size=4, mu_plus=99.0, mu_minus=-99.0, refusal=embedded.REFUSAL)
    before = lvlm.model.config._attn_implementation
    result = time_to_quality.step_pairs(lvlm, data, "please be safe", settings, 9, 2, 64)
    assert {name: len(taken) for name, taken in result["seconds"].items()} == {"ours": 2, "benign": 2, "malicious": 2}
    ours, benign, malicious = (taken[0] for taken in result["seconds"].values())
    assert result["ratio"]["pairs"][0] == pytest.approx((0.525 * benign + 0.475 * malicious) / 2 / (ours / 4))
    assert result["ratio"]["lowest"] <= result["ratio"]["median"] <= result["ratio"]["highest"]
    assert lvlm.model.config._attn_implementation == before


def test_recipes_run_in_turns(lvlm, tmp_path, monkeypatch):
    """On the embedded data in small, with a model that can't read it. What a file has is not measured again."""
    monkeypatch.setattr(time_to_quality, "SETTINGS", TrainSettings(steps=3, batch_size=4, mu_plus=99.0, mu_minus=-99.0))
    monkeypatch.setattr(time_to_quality.embedded, "load", lambda *_, **__: lvlm)
    monkeypatch.setattr(time_to_quality, "SIZES", time_to_quality.SIZES | {"vector": 6, "sweep": 6, "train": 6})
    monkeypatch.setattr(time_to_quality.embedded, "protocol", partial(embedded.protocol, vector=6, sweep=6, train=6))
    (tmp_path / "thin.json").write_text('{"steps": 2, "lr": 0.1, "padding": 5}')
    out, asked = tmp_path / "out.json", dict(recipe=["default", str(tmp_path / "thin.json")], every=[2, 1], limit=1)
    compare, seeds = time_to_quality.compare, []
    monkeypatch.setattr(time_to_quality, "compare", lambda *all: seeds.append(all) or compare(*all))
    time_to_quality.main(out, **asked, on="sweep", seed=[5])
    time_to_quality.main(out, **asked, on="sweep", seed=[5, 6])
    assert [one[-1] for one in seeds] == [5, 6] and {query.id[:5] for query in seeds[0][2]} == {"sweep"}
    assert seeds[0][3][1].settings(6).lr == 0.1 and seeds[0][3][1].padding == 5
    result = json.loads(out.read_text())
    curves = {name: [row["step"] for row in run["curve"]] for name, run in result["seeds"][1]["recipes"].items()}
    assert curves == {"default": [2, 3], "thin": [1, 2]} and result["summary"]["thin"]["seeds"] == 2
    with pytest.raises(DavspError, match="another 'on'"):
        time_to_quality.main(out, **asked, seed=[5])
