"""Measured answers in small, one at a time and in batches: the same queries, the same answers, the same lengths."""

from typing import Any

import evaluation
import inference
import pytest

from davsp import LVLM
from davsp.defenses import NoDefense
from tiny import queries


def test_every_answer_has_the_same_length(lvlm):
    """Also where the model would have ended; and the model is as it was."""
    before = lvlm.model.generation_config.eos_token_id
    mixed = queries("malicious", 3) + queries("benign", 3)
    defenses = inference.forms(lvlm, 9, "please be safe")
    rows = inference.measure(lvlm, defenses, mixed, rounds=2, new_tokens=7, seed=0)
    assert lvlm.model.generation_config.eos_token_id == before and not lvlm.layers[0]._forward_pre_hooks
    assert sorted((row["query"], row["form"]) for row in rows) == sorted(
        2 * [(q.id, d) for q in mixed for d in defenses]
    )
    table = inference.summary(rows, "cpu", 0)
    tokens = {name: row["prompt_tokens"] for name, row in table.items()}
    assert tokens["border"] == tokens["no defense"] == tokens["text"] - 3 == tokens["border and text"] - 3
    assert table["no defense"]["ratio"] == 1 and all(
        row["low"] <= row["ratio"] <= row["high"] for row in table.values()
    )


def test_an_answer_of_another_length_is_refused(lvlm, monkeypatch):
    completions = LVLM.completions

    def shorter(self: LVLM, canvas: Any, questions: list[str], max_new_tokens: int) -> list[Any]:
        return completions(self, canvas, questions, max_new_tokens - 1)

    monkeypatch.setattr(LVLM, "completions", shorter)
    with pytest.raises(RuntimeError, match="6 tokens, not 7"):
        inference.measure(lvlm, {"no defense": NoDefense()}, queries("benign", 1), 1, 7, 0)


def test_ratios_are_of_the_same_query():
    """A query that takes ten times as long does not sway the ratio."""
    rows = [
        {"query": query, "form": form, "cpu": base * factor, "wall": base, "prompt": 1}
        for _ in range(3)
        for query, base in (("a", 1.0), ("b", 10.0), ("c", 2.0))
        for form, factor in ((inference.NONE, 1), (inference.BORDER, 1.5), (inference.TEXT, 2), (inference.BOTH, 3))
    ]
    ratios = {name: (row["low"], row["ratio"], row["high"]) for name, row in inference.summary(rows, "cpu", 0).items()}
    assert [ratios[name] for name in (inference.BORDER, inference.BOTH)] == [(1.5,) * 3, (3.0,) * 3]


def test_batches_give_the_answers_of_one_at_a_time(lvlm):
    mixed = [*queries("malicious", 3), *queries("benign", 3)]
    rows, answers = evaluation.measure(lvlm, {"none": NoDefense()}, mixed, [1, 4], rounds=1, new_tokens=3, seed=0)
    assert answers[1] == answers[4] and len(answers[1]["none"]) == 6
    table = evaluation.summary(rows, [1, 4], "cpu", 6)
    assert table["1"]["ratio"] == 1 and table["4"]["answers_a_second"] > 0


def test_the_parts_of_a_batch(lvlm):
    (row,) = evaluation.parts(lvlm, queries("malicious", 3), 2, 1, 3)
    assert set(row) == {"tower", "prompts", "batch", "prompts_alone", "alone", "rows_kept"}
    assert all(value > 0 for value in row.values()) and row["rows_kept"] <= 1
