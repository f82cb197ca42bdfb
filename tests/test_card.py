"""The card's figures of answers that the vector steers."""

import json
from importlib.resources import files

import pytest

from davsp import LVLM, HarmfulnessVector, embedded
from davsp.embedded.card import reads, steering


@pytest.mark.parametrize(("reply", "rsr", "over_refusal"), [
    ("i am sorry .", 1.0, 1.0), ("no red cake", 0.0, 0.0), ("", None, 1.0), (" . ", None, 1.0),
])  # fmt: skip
def test_silence_under_steering_resists_nothing_and_answers_nothing(
    reply: str, rsr: float | None, over_refusal: float, lvlm: LVLM, vector: HarmfulnessVector, monkeypatch
) -> None:
    said = (reply, "stop")
    monkeypatch.setattr(LVLM, "completions", lambda self, canvas, questions, *_, **__: [said] * len(questions))
    rows = steering(lvlm, vector, embedded.protocol(1, harm=2, utility=2, vector=2, sweep=2, train=1))
    value = {(r["defense"], r["metric"]): r["value"] for r in rows if not r["metric"].endswith("difference")}
    for name in ("vector-added", "vector-removed"):
        assert value[name, "rsr"] == rsr and value[name, "over_refusal"] == over_refusal


@pytest.mark.parametrize("name", ["davsp-mini", "davsp-mini-narrow", "davsp-mini-qwen"])
def test_the_cards_name_the_transformers_that_reads_the_folder(name: str) -> None:
    folder = files("davsp.embedded") / name
    config = json.loads((folder / "config.json").read_text())
    sentence = reads(config["architectures"][0], config["transformers_version"])
    assert sentence in (folder / "README.md").read_text()
    assert ("leaves it random" in sentence) == (config["model_type"] == "llava")
