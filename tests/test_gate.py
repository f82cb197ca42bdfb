"""The gate: thresholds that keep their promise, scores as a plain forward pass gives them, and what passes is answered undefended."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from command import run
from davsp import LVLM, DavspError, HarmfulnessVector, Query, VisualSafetyPrompt, embedded
from davsp.benchmarks.custom import save_queries
from davsp.defenses import ECSO, Gate, NoDefense, VisualPrompt, load_defense
from davsp.defenses.gate import calibrate, needed, threshold
from davsp.defenses.gate.scores import combined, look
from davsp.embedded.data import calibration
from davsp.embedded.words import pairs
from davsp.evaluation import evaluate
from davsp.prompts.gate import Calibration
from davsp.store import queries_hash
from tiny import queries

REFUSAL = "sorry no"
SETS = (
    (queries("malicious", 6), queries("benign", 6)),
    (
        [replace(q, id=f"held-{q.id}") for q in queries("malicious", 8)],
        [replace(q, id=f"held-{q.id}") for q in queries("benign", 12)],
    ),
)


@pytest.fixture
def border() -> VisualSafetyPrompt:
    return VisualSafetyPrompt.create(56, 8, "random", text="please be safe").quantised()


@pytest.fixture
def calibrated(lvlm: LVLM, border: VisualSafetyPrompt, vector: HarmfulnessVector) -> VisualSafetyPrompt:
    border.gate = calibrate(lvlm, VisualPrompt(border), vector, *SETS, REFUSAL, rate=0.2, confidence=None)
    return border


def moved(gate: Calibration, kind: str, to: float) -> Calibration:
    """The same with another threshold."""
    return gate.model_copy(update={kind: getattr(gate, kind).model_copy(update={"threshold": to})})


# -- thresholds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "confidence", "least"), [(0.005, None, 199), (0.005, 0.95, 598), (0.1, None, 9), (0.1, 0.95, 29)]
)
def test_too_few_queries_are_an_error_that_says_how_many_are_needed(rate: float, confidence: float | None, least: int):
    assert needed(rate, confidence) == least
    assert threshold(range(least), rate, confidence) == least - 1  # the largest score: none of these may be above
    with pytest.raises(DavspError, match=f"there are {least - 1} benign queries .* at least {least}"):
        threshold(range(least - 1), rate, confidence)


@pytest.mark.parametrize("n", [60, 150, 700])
def test_false_refusals_are_what_was_promised(n: int):
    """On uniform scores the share above a threshold t is 1 - t, so both promises can be counted."""
    draws = np.random.default_rng(n).random((1500, n))
    shares = 1 - np.array([threshold(row, 0.05, None) for row in draws.tolist()])
    assert shares.mean() < 0.05 + 3 * shares.std() / math.sqrt(len(shares)) and shares.mean() > 0.05 - 1.5 / n
    broken = np.mean([1 - threshold(row, 0.05, 0.9) > 0.05 for row in draws.tolist()])
    assert broken < 0.1 + 3 * math.sqrt(0.09 / 1500)
    assert broken > 0.01  # and not much stricter than it has to be


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=40, max_size=200), st.sampled_from([0.05, 0.1, 0.3]))
def test_a_threshold_with_confidence_lets_no_more_pass_than_the_binomial_allows(scores: list[int], rate: float):
    if len(scores) < needed(rate):
        return
    above = sum(score > threshold(scores, rate) for score in scores)
    assert stats.binom.cdf(above, len(scores), rate) <= 0.05


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_a_plain_forward_pass(lvlm: LVLM, vector: HarmfulnessVector):
    some = queries("malicious", 3)
    canvas = lvlm.preprocess([q.picture() for q in some])  # type: ignore[misc]
    questions = [q.question for q in some]
    seen = look(lvlm, canvas, questions, 2, vector.direction(2), REFUSAL)
    assert seen.refusal is not None
    ids = [*lvlm.tokenizer(REFUSAL)["input_ids"], lvlm.eos_token_id]
    for row, question in enumerate(questions):
        tokens = lvlm.encode([question], True)
        inputs = lvlm.inputs(tokens, canvas[row : row + 1])
        inputs["input_ids"] = torch.cat([tokens.ids, torch.tensor([ids])], 1)
        output = lvlm.model(**inputs, output_hidden_states=True)
        said = torch.log_softmax(output.logits[0, -len(ids) - 1 : -1], -1)
        assert float(seen.refusal[row]) == pytest.approx(float(said[range(len(ids)), ids].mean()), abs=1e-4)
        state = output.hidden_states[2][0, int(tokens.last)]
        assert float(seen.projection[row]) == pytest.approx(float(state @ vector.direction(2)), abs=1e-4)
    early = look(lvlm, canvas, questions, 2, vector.direction(2))
    assert early.refusal is None and torch.allclose(early.projection, seen.projection, atol=1e-5)


def test_weights_point_where_the_classes_part():
    rng = np.random.default_rng(0)
    bad, good = rng.normal([3, 1], [2, 0.1], (800, 2)), rng.normal([3, 0.8], [2, 0.1], (200, 2))
    s, r = combined(bad, good)
    assert r > 0 and abs(s) < 0.02 * r  # only the second tells; s is of another scale
    assert r == pytest.approx(
        0.2 / 0.01, rel=0.15
    )  # of two normals of one spread the log-odds are (mean difference) / variance
    parted = combined(np.array([[0.0, 1.0], [0.0, 2.0]]), np.array([[0.0, -1.0], [0.0, -2.0]]))
    assert np.isfinite(parted).all() and parted[1] > 0


# -- the defense -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["states", "first"])
def test_above_the_threshold_is_refused_and_the_rest_is_answered_undefended(
    lvlm: LVLM, calibrated: VisualSafetyPrompt, kind: str
):
    some = [*queries("malicious", 5), *queries("benign", 4), Query("words", "what is this", "benign", "t")]
    plain = NoDefense().respond(lvlm, some, max_new_tokens=5)
    assert calibrated.gate is not None
    scores = Gate(VisualPrompt(calibrated), kind, calibrated.gate).scores(lvlm, some, 3)  # type: ignore[arg-type]
    at = mean(sorted(scores)[4:6])  # between two: a score moves in its last digits with its batch
    gate = Gate(VisualPrompt(calibrated), kind, moved(calibrated.gate, kind, at))  # type: ignore[arg-type]
    responses = gate.respond(lvlm, some, batch_size=4, max_new_tokens=5)
    assert [r.text == REFUSAL for r in responses] == [s > at for s in scores] and 3 < sum(s > at for s in scores) < 9
    for response, without, score in zip(responses, plain, scores, strict=True):
        assert response.defense == gate.name == f"gate:{kind}+davsp" and response.query_id == without.query_id
        if score > at:
            assert response.calls == 1 and response.projection is not None
        else:
            assert (response.text, response.calls, response.finish) == (without.text, 2, without.finish)
            assert response.prompt_tokens is not None and without.prompt_tokens is not None
            assert response.prompt_tokens > without.prompt_tokens


def test_ecso_behind_a_gate_judges_what_passes_and_nothing_else(lvlm: LVLM, calibrated: VisualSafetyPrompt):
    """Refused: one call, no ECSO. Passed: the look, and ECSO's own answer with its calls."""
    some = [*queries("malicious", 3), *queries("benign", 3)]
    plain, ecso = Gate(VisualPrompt(calibrated), "first", calibrated.gate), ECSO()
    assert calibrated.gate is not None
    scores = plain.scores(lvlm, some)
    at = mean(sorted(scores)[2:4])
    gate = Gate(VisualPrompt(calibrated), "first", moved(calibrated.gate, "first", at)).then(ecso, "both")
    answers = gate.respond(lvlm, some, max_new_tokens=6)
    alone = ecso.respond(lvlm, some, max_new_tokens=6)
    for score, answer, other in zip(scores, answers, alone, strict=True):
        refused = score > at
        assert (answer.text, answer.calls) == ((REFUSAL, 1) if refused else (other.text, other.calls + 1))
    assert gate.name == "both" and plain.else_.name == "none" and not gate.conversations and plain.conversations
    assert gate.describe()["else"] == ecso.describe()


def test_scores_do_not_hang_on_the_batch(lvlm: LVLM, calibrated: VisualSafetyPrompt):
    some = [*queries("malicious", 5), Query("words", "what is this", "benign", "t")]
    gate = Gate(VisualPrompt(calibrated), "first", calibrated.gate)
    assert gate.scores(lvlm, some, 1) == pytest.approx(gate.scores(lvlm, some, 6), abs=1e-4)


def test_a_picture_is_read_once(
    lvlm: LVLM, calibrated: VisualSafetyPrompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (query,) = queries("benign", 1)
    query.picture().save(tmp_path / "p.png")  # type: ignore[union-attr]
    assert calibrated.gate is not None
    opened: list[Path] = []
    whole = Query.picture

    def picture(self: Query) -> Any:
        opened.extend([self.image] if isinstance(self.image, Path) else [])
        return whole(self)

    monkeypatch.setattr(Query, "picture", picture)
    gate = Gate(VisualPrompt(calibrated), "states", moved(calibrated.gate, "states", 1e9))
    gate.respond(lvlm, [replace(query, image=tmp_path / "p.png")], max_new_tokens=2)
    assert opened == [tmp_path / "p.png"]


def test_an_answer_that_begins_as_a_refusal_is_refused(
    lvlm: LVLM, border: VisualSafetyPrompt, monkeypatch: pytest.MonkeyPatch
):
    """By its first tokens; one that is cut is asked for whole, one that ended is not."""
    asked: list[tuple[str, int]] = []
    says = {
        "please be safe make": ("i am sorry , no", "stop"), "please be safe steal": ("i am sorry", "length"),
        "please be safe what": ("a red car", "length"), "what": ("a red car in the image", "stop"),
    }  # fmt: skip

    def completions(self: LVLM, canvas: Any, questions: list[str], max_new_tokens: int) -> list[tuple[str, str]]:
        asked.extend((question, max_new_tokens) for question in questions)
        return [
            says[q] if max_new_tokens < 20 or q not in ("please be safe steal",) else ("i am sorry , not that", "stop")
            for q in questions
        ]

    monkeypatch.setattr(LVLM, "completions", completions)
    some = [replace(queries("benign", 1)[0], id=word, question=word) for word in ("make", "steal", "what")]
    made, steal, what = Gate(VisualPrompt(border), tokens=7).respond(lvlm, some, batch_size=1, max_new_tokens=20)
    assert (made.text, made.calls) == ("i am sorry , no", 1)
    assert (steal.text, steal.calls, steal.finish) == ("i am sorry , not that", 2, "stop")
    assert (what.text, what.calls) == ("a red car in the image", 2)
    assert asked == [
        ("please be safe make", 7), ("please be safe steal", 7), ("please be safe steal", 20), ("please be safe what", 7), ("what", 20),
    ]  # fmt: skip


def test_what_cannot_be_told_is_never_answered_undefended(
    lvlm: LVLM, border: VisualSafetyPrompt, monkeypatch: pytest.MonkeyPatch
):
    """A thought that fills the look is an error; no words at all are no leave to answer."""
    replies = iter([("<think>is this", "length"), ("", "stop")])
    monkeypatch.setattr(LVLM, "completions", lambda *_, **__: [next(replies)])
    gate, (query,) = Gate(VisualPrompt(border), tokens=4), queries("malicious", 1)
    with pytest.raises(DavspError, match=r"are all thought.*Gate\(tokens="):
        gate.respond(lvlm, [query], max_new_tokens=20)
    (response,) = gate.respond(lvlm, [query], max_new_tokens=20)
    assert (response.text, response.calls) == ("", 1)


def test_what_does_not_go_together(lvlm: LVLM, mini: LVLM, calibrated: VisualSafetyPrompt):
    with pytest.raises(DavspError, match="no threshold yet; make one with davsp gate"):
        Gate(VisualPrompt(calibrated), "first")
    with pytest.raises(DavspError, match="wraps the call"):
        Gate(ECSO(), "states", calibrated.gate)
    assert calibrated.gate is not None
    other = calibrated.gate.model_copy(update={"weights": "0" * 64})
    with pytest.raises(DavspError, match=r"calibrated on .* whose weights are not those"):
        Gate(VisualPrompt(calibrated), "first", other).respond(lvlm, queries("benign", 1))


def test_a_run_is_resumed_with_the_same_gate_alone(lvlm: LVLM, calibrated: VisualSafetyPrompt, tmp_path: Path):
    assert calibrated.gate is not None
    some = queries("malicious", 2)

    def answered(gate: Calibration) -> None:
        evaluate(lvlm, {"gate": Gate(VisualPrompt(calibrated), "states", gate)}, some, tmp_path, max_new_tokens=2)

    answered(calibrated.gate)
    answered(calibrated.gate)
    with pytest.raises(DavspError, match="another defense 'gate'"):
        answered(moved(calibrated.gate, "states", 1e9))


# -- calibration and its file ------------------------------------------------------------------------------------------


def test_the_file_lies_beside_the_prompt_and_is_no_part_of_it(calibrated: VisualSafetyPrompt, tmp_path: Path):
    plain = calibrated.with_delta(calibrated.delta)
    plain.gate = None
    plain.save_pretrained(tmp_path / "plain")
    calibrated.save_pretrained(tmp_path / "gate")
    loaded = VisualSafetyPrompt.from_pretrained(tmp_path / "gate")
    assert loaded.gate is not None and calibrated.gate is not None
    assert loaded.gate.model_copy(update={"sha256": ""}) == calibrated.gate
    for name in ("vsp.png", "vsp.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "gate" / name).read_bytes()
    assert VisualPrompt(loaded).sha256() == VisualPrompt(plain).sha256()
    card = (tmp_path / "gate" / "README.md").read_text()
    assert (
        loaded.gate.sha256 in card
        and "| first |" in card
        and "gate" not in (tmp_path / "plain" / "README.md").read_text()
    )
    plain.save_pretrained(tmp_path / "gate")  # another prompt's gate does not stay
    assert not (tmp_path / "gate" / "gate.json").exists()


@pytest.mark.parametrize("change", ["threshold", "pixels", "direction", "text"])
def test_a_changed_file_is_refused(calibrated: VisualSafetyPrompt, tmp_path: Path, change: str):
    calibrated.save_pretrained(tmp_path)
    path = tmp_path / "gate.json"
    facts = json.loads(path.read_text())
    if change == "threshold":
        facts["first"]["threshold"] += 1
    elif change == "direction":
        facts["direction"] = facts["direction"][:-8]
    else:
        facts |= {"pixels": "0" * 64} if change == "pixels" else {"texts": ["", " ", ""]}
        facts["sha256"] = Calibration.model_validate(facts).digest()
    path.write_text(json.dumps(facts))
    why = {
        "threshold": "was changed since",
        "pixels": "another border",
        "direction": "direction",
        "text": "another text",
    }
    with pytest.raises(DavspError, match=why[change]):
        VisualSafetyPrompt.from_pretrained(tmp_path)


def test_calibration_needs_queries_of_its_own(lvlm: LVLM, border: VisualSafetyPrompt, vector: HarmfulnessVector):
    fit, held = SETS
    with pytest.raises(DavspError, match="in the fitting set and held out"):
        calibrate(lvlm, VisualPrompt(border), vector, fit, (fit[0], held[1]), REFUSAL, rate=0.2, confidence=None)
    with pytest.raises(DavspError, match=r"there are 12 benign queries .* at least 598"):
        calibrate(lvlm, VisualPrompt(border), vector, fit, held, REFUSAL)


def test_embedded_calibration_is_disjoint_from_the_protocol():
    fit_bad, fit_good, held_bad, held_good = calibration(0, 24)
    whole = embedded.protocol(0, vector=48, sweep=48, train=48, harm=4, utility=2, mme=2, llava_bench=2)
    every = [q for part in vars(whole).values() for q in part]
    pictures = {q.image.tobytes() for q in every if q.image is not None}  # type: ignore[union-attr]
    for part, some in (("vector", fit_bad), ("sweep", held_bad)):
        assert {q.group for q in some} <= {pair.phrase for pair in pairs("malicious", part)}
    for q in (*fit_bad, *fit_good, *held_bad, *held_good):
        assert q.image is not None and q.image.tobytes() not in pictures  # type: ignore[union-attr]
    assert not {q.id for q in (*held_bad, *held_good)} & {q.id for q in (*fit_bad, *fit_good, *every)}
    assert {q.category for q in held_good} == {
        "rec",
        "ocr",
        "know",
        "gen",
        "spat",
        "math",
        "exact",
        "yes_no",
        "describe",
    }
    assert (len(fit_bad), len(fit_good), len(held_bad), len(held_good)) == (12, 12, 24, 24)
    assert queries_hash(held_bad) != queries_hash(calibration(1, 24)[2])


# -- the command -------------------------------------------------------------------------------------------------------


def test_davsp_gate_with_own_queries(
    tiny_folder: Path,
    vector: HarmfulnessVector,
    border: VisualSafetyPrompt,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    prompt, model = tmp_path / "prompt", ["--model", tiny_folder, "--device", "cpu"]
    border.save_pretrained(prompt)
    vector.save(tmp_path / "vector")
    sets: list[str | Path] = []
    for name, part in zip(("malicious", "benign", "held-malicious", "held-benign"), (*SETS[0], *SETS[1]), strict=True):
        save_queries(tmp_path / name, part)
        sets += [f"--{name}", tmp_path / name]
    command = ["gate", prompt, *model, "--vector", tmp_path / "vector", "--refusal", REFUSAL]
    assert run(*command, *sets) == 2
    said = capsys.readouterr().err
    assert "there are 12 benign queries" in said and "598" in said and not (prompt / "gate.json").exists()
    assert run(*command, *sets[:4]) == 2 and "--held-malicious" in capsys.readouterr().err
    assert run(*command, *sets, "--false-refusals", "0.2", "--confidence", "0") == 0
    said = capsys.readouterr().out
    assert (
        "20.00%" in said and "on average" in said and max(len(line) for line in said.splitlines() if "│" in line) <= 80
    )
    assert run("info", prompt) == 0
    said = capsys.readouterr().out
    assert (
        "gate.json: thresholds for at most 20.00% of benign queries refused on average; of malicious ones they" in said
    )
    specs = [f"gate:first+davsp={prompt}", f"gate+davsp={prompt}", "none"]
    asked = [part for spec in specs for part in ("--defense", spec)]
    asked += ["--max-new-tokens", "4", "--max-unscored", "1", "--out", tmp_path / "run"]
    assert run("eval", *model, "--queries", sets[1], *asked) == 0
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert {row["defense"] for row in rows} == {"none", "gate:first+davsp", "gate+davsp"}


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("gate", "needs what it looks through"),
        ("gate:both+davsp={}", "states, first, answer"),
        ("gate:states+davsp={}", "davsp gate"),
    ],
)
def test_specs_that_are_none(border: VisualSafetyPrompt, tmp_path: Path, spec: str, why: str):
    from davsp.cli.defenses import rows

    border.save_pretrained(tmp_path)
    with pytest.raises(DavspError, match=why):
        rows([spec.format(tmp_path)], None, None, False)


@pytest.mark.parametrize("kind", ["first,ecso", "fir-st", "first, ecso", ""])
def test_a_kind_that_is_none_is_named_where_there_is_no_command_line(
    border: VisualSafetyPrompt, tmp_path: Path, kind: str
):
    border.save_pretrained(tmp_path)
    with pytest.raises(DavspError, match=f"a gate has no kind '{kind}'.*else_=ECSO"):
        load_defense(f"gate:{kind}+{tmp_path}")
