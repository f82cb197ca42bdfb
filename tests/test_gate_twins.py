"""Harmless twins, kinds of harm that were never met, and the figures that are made of both."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from command import run
from davsp import LVLM, VisualSafetyPrompt, embedded
from davsp.defenses import Defense, Gate, NoDefense, VisualPrompt
from davsp.embedded import words
from davsp.embedded.data import FORMS
from davsp.embedded.twins import SOUNDING, harmless, sounding, twins
from davsp.experiments.gate import kinds
from davsp.experiments.gate.table import TITLES
from davsp.experiments.gate.twins import DEFENSES, FILE, Twins, told, twin_rows, twin_table
from davsp.experiments.stages import Stages
from davsp.metrics import Outcome
from davsp.query import Query, Response
from davsp.store import queries_hash
from tiny import queries


def parts_of(phrase: str) -> tuple[str, str]:
    verb, _, thing = phrase.split()
    return verb, thing


def test_twins_are_of_the_test_and_differ_by_one_word():
    both = twins(0, 6)
    test = [
        q
        for q in embedded.protocol(0, harm=6, train=1, sweep=1, vector=4, utility=1, mme=1, llava_bench=1).test
        if q.label == "malicious"
    ]
    assert queries_hash([query for query, _ in both]) == queries_hash(test)  # the very queries of the test
    assert len({twin.id for _, twin in both}) == len(both) == 6 * (len(FORMS) - 1)
    for query, twin in both:
        pair = words.Pair(*parts_of(query.group))
        deed = words.Pair(*parts_of(" ".join(twin.reference.split(" then ")[1].split()[:3])))
        assert pair.kind and not deed.kind and words.split(deed) in ("test", "mini")
        assert (pair.verb == deed.verb) != (pair.thing == deed.thing)
        assert twin.group == query.group and twin.category == query.benchmark and twin.reference == deed.steps
        assert twin.question == query.question.replace(f" {pair.verb} ", f" {deed.verb} ")
        shown, other = np.asarray(query.image), np.asarray(twin.image)
        named = query.benchmark == "sd" and pair.thing == deed.thing  # the question alone tells
        assert np.array_equal(shown, other) == named and (named or twin.question == query.question or "sd" in query.id)
        assert np.mean((shown == other).all(-1)) > 0.6  # ground, place and lettering stay


def test_every_malicious_pair_of_the_test_has_a_twin():
    import random

    for pair in words.pairs("malicious", "test"):
        twin = harmless(pair, random.Random(0))
        assert not twin.kind and (twin.verb == pair.verb or twin.thing == pair.thing)


def test_what_sounds_harmful_is_benign_and_has_an_answer():
    some = sounding(0, 6)
    assert len({q.id for q in some}) == len(some) == 6 * len(SOUNDING)
    assert all(q.label == "benign" and q.reference and q.benchmark == "sounding" for q in some)
    for q in some:
        shown = {*q.question.split(), *q.reference.split()}
        assert shown & {*words.HARMFUL_THINGS, *words.HARMFUL_VERBS}
    known = set(words.vocabulary())
    assert all(word in known for q in (*some, *(t for _, t in twins(0, 3))) for word in q.reference.split())


def defenses(border: VisualSafetyPrompt) -> dict[str, Defense]:
    """Rows as `reproduce gate` has; a look costs nothing here."""
    davsp = VisualPrompt(border)
    return {name: NoDefense() if name == "none" else davsp if name == "davsp" else Gate(davsp) for name in DEFENSES}


@pytest.fixture
def border() -> VisualSafetyPrompt:
    return VisualSafetyPrompt.create(56, 8, "random", text="please be safe").quantised()


def test_twins_are_added_to_a_finished_folder(
    lvlm: LVLM, border: VisualSafetyPrompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Told apart: the malicious one refused, its twin answered; the second time nothing is answered again."""
    bad, good = queries("malicious", 4), queries("benign", 6)
    pairs = list(zip(bad, good[:4], strict=True))
    says = {q.id: "i am sorry , no" if q is good[1] else "a red car" for q in good}
    asked: list[str] = []

    def respond(self: Defense, lvlm: LVLM, some: list[Query], *rest: Any) -> list[Response]:
        asked.extend(q.id for q in some)
        return [Response(q.id, self.name, says[q.id] if self.name != "none" else "a red car", None, 0.1) for q in some]

    monkeypatch.setattr(NoDefense, "respond", respond)
    monkeypatch.setattr(VisualPrompt, "respond", respond)
    resisted = {
        name: [Outcome(f"7 {q.id}", "t", "total", "rsr", q.group, float(i < 3)) for i, q in enumerate(bad)]
        for name in DEFENSES
    }

    def again() -> None:
        rest = resisted, 7, 4
        told(Stages(tmp_path, Console(quiet=True)), lvlm, defenses(border), Twins(pairs, good[4:]), *rest)

    again()
    first = len(asked)
    again()
    assert len(asked) == first > 0
    facts = json.loads((tmp_path / FILE).read_text())
    values = {name: [o["value"] for o in rows if o["metric"] == "told_apart"] for name, rows in facts.items()}
    assert values["none"] == [1, 1, 1, 0] and values["davsp"] == values["gate-first"] == [1, 0, 1, 0]
    assert {o["benchmark"] for o in facts["davsp"]} == {"twins", good[4].benchmark}
    resisted["none"] = []
    with pytest.raises(KeyError):  # another test's outcomes: made anew, not kept
        again()


def outcome(i: int, metric: str, value: float, benchmark: str = "twins") -> Outcome:
    return Outcome(str(i), benchmark, "total", metric, f"intent {i // 2}", value)


def test_rows_and_table_of_twins():
    apart = {"none": [0] * 12, "davsp": [1] * 6 + [0] * 6, "gate-first": [1] * 4 + [0] * 2 + [1] * 6}
    outcomes = {
        name: [outcome(i, "told_apart", v) for i, v in enumerate(values)]
        + [outcome(i, "over_refusal", float(i == 0), place) for i in range(12) for place in ("twins", "sounding")]
        for name, values in apart.items()
    }
    rows = twin_rows("m", outcomes)
    at = {(r["defense"], r["benchmark"], r["metric"]): r for r in rows}
    against = at["gate-first", "twins", "told_apart_against_davsp"]
    assert (against["gained"], against["lost"], against["n"]) == (6, 2, 12) and against["value"] == pytest.approx(
        4 / 12
    )
    assert against["mcnemar"] == pytest.approx(stats.binomtest(6, 8).pvalue) and against["p"] != against["mcnemar"]
    assert at["davsp", "twins", "told_apart_against_none"]["mcnemar"] == pytest.approx(2 * 0.5**6)
    assert ("none", "twins", "told_apart_against_davsp") not in at
    assert at["davsp", "twins", "told_apart"]["low"] < 0.5 < at["davsp", "twins", "told_apart"]["high"]
    text = "\n".join(twin_table(rows, TITLES))
    assert "| gate, `first` | 83.3" in text and "+6 −2" in text and twin_table([], TITLES) == []


# -- kinds -------------------------------------------------------------------------------------------------------------


def test_a_split_meets_its_kinds_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kinds, "TRAIN", 48)
    monkeypatch.setattr(kinds, "SWEEP", 12)
    monkeypatch.setattr(kinds, "SIZES", {"harm": 24, "utility": 1, "mme": 1, "llava_bench": 1, "vector": 8})
    assert len(kinds.SPLITS) == 7
    for split in ("theft+poison", "all"):
        seen = set(kinds.kinds_of(split))
        data = kinds.seen_only(0, kinds.kinds_of(split))
        for part, count in ((data.train_malicious, kinds.TRAIN), (data.sweep_malicious, kinds.SWEEP)):
            times = [sum(q.category == kind for q in part) for kind in seen]
            assert {q.category for q in part} == seen and len({q.id for q in part}) == len(part) == count
            assert set(times) == {count // len(seen)}
            test = {q.group for q in data.test if q.label == "malicious"}
            assert not {q.group for q in part} & test
        assert {q.category for q in data.test if q.label == "malicious"} == set(kinds.HARD)
        assert not {q.category for q in data.vector_malicious} & set(kinds.HARD)
    pictures = {q.image.tobytes() for q in data.train_malicious if q.image is not None}  # type: ignore[union-attr]
    assert len(pictures) > 0.9 * kinds.TRAIN  # few pairs, but drawn anew


def test_rows_of_kinds_stand_beside_those_that_met_all():
    kind_of = {f"{kind}-{i}": kind for kind in kinds.HARD for i in range(4)}

    def found(safe: tuple[str, ...]) -> list[Outcome]:
        """RSR of all queries of these kinds."""
        bad = [Outcome(i, "typo", "total", "rsr", i, float(kind in safe)) for i, kind in kind_of.items()]
        return [*bad, Outcome("b", "benign", "total", "over_refusal", "b", 0.0)]

    every = {
        split: {name: found(() if name == "none" else kinds.kinds_of(split)) for name in ("none", *kinds.TITLES)}
        for split in kinds.SPLITS
    }
    rows = kinds.kind_rows("m", every, kind_of)
    at = {(r["defense"], r["benchmark"], r["split"], r["metric"]): r for r in rows}
    for split in (*kinds.SPLITS[:-1], "total"):
        assert at["davsp", "unseen kinds", split, "rsr"]["value"] == 0
        assert at["davsp", "seen kinds", split, "rsr"]["value"] == 1
        assert at["davsp, all kinds", "unseen kinds", split, "rsr"]["value"] == 1
    assert at["davsp", "unseen kinds", "total", "rsr"]["n"] == 6 * 8
    text = kinds.kind_table(rows, "m")
    assert text.count("\n| ") == 1 + 6 + 3 and "| theft, poison | fraud, hacking | 0 <sub>" in text


def test_gate_kinds_is_apart_from_tables_and_for_models_that_ship(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert run("reproduce", "gate-kinds", "gate") == 2 and "apart from the tables" in capsys.readouterr().err
    assert run("reproduce", "gate-kinds", "--model", tmp_path) == 2
    assert "reproduce gate-kinds is for the models that ship" in capsys.readouterr().err
