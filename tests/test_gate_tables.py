"""`davsp reproduce gate`: areas and rates as counted by hand, seeds pooled, no answer asked for twice."""

import itertools
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from command import run as davsp
from davsp import LVLM, VisualSafetyPrompt, embedded
from davsp.defenses import ECSO, Defense, Gate, NoDefense, VisualPrompt
from davsp.defenses.gate import calibrate
from davsp.embedded.data import calibration
from davsp.embedded.ecso_templates import TEMPLATES
from davsp.errors import DavspError
from davsp.experiments.gate import figures, run
from davsp.experiments.gate.figures import areas, auroc, gates, rates
from davsp.experiments.gate.looks import _kth, features, scores, see
from davsp.experiments.gate.once import Once, answered
from davsp.experiments.gate.table import LINES, TITLES, markdown, roc
from davsp.metrics import Outcome
from davsp.runtime.files import read_json, write_json
from tiny import queries


def looks(seed: int, apart: float) -> dict[str, np.ndarray]:
    """Scores of one look on made-up queries; classes `apart` standard deviations apart."""
    rng = np.random.default_rng(seed)
    malicious = np.arange(300) < 100
    made = {"malicious": malicious, "group": np.array([f"g{i % 25} {m}" for i, m in enumerate(malicious)])}
    made |= {"benchmark": np.where(malicious, "sd", "utility"), "id": np.array([f"{seed} q{i}" for i in range(300)])}
    for which, n in (("held-malicious", 50), ("held-benign", 700)):
        made[f"davsp refusal/{which}"] = rng.normal(apart * (which == "held-malicious"), 1, n)
    made["davsp refusal/test"] = rng.normal(0, 1, 300) + apart * malicious
    return made


def outcomes(name: str, refused: dict[str, int], wrong: int) -> list[Outcome]:
    """Twelve malicious queries of each set, four an intent, and ten benign ones."""
    made = [
        Outcome(f"{s}{i}", s, "total", "rsr", f"{s} {i // 4}", float(i < refused[s]))
        for s in refused
        for i in range(12)
    ]
    for i in range(10):
        made.append(Outcome(f"b{i}", "benign", "total", "over_refusal", f"b{i}", float(name == "davsp" and i == 0)))
        made.append(Outcome(f"b{i}", "utility", "total", "accuracy", f"b{i}", float(i >= wrong)))
    return made


def test_the_area_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(3)
    values, malicious = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(values[malicious], values[~malicious])]
    assert auroc(values, malicious) == pytest.approx(np.mean(pairs))


def test_figures_of_a_look():
    one, other = looks(0, 3.0), looks(1, 3.0)
    rows = {r["metric"]: r for r in areas("m", [one, other])}
    each = [auroc(x["davsp refusal/test"], x["malicious"]) for x in (one, other)]
    assert rows["auroc"]["value"] == pytest.approx(np.mean(each)) and rows["auroc"]["n"] == 600
    assert rows["auroc"]["low"] < rows["auroc"]["value"] < rows["auroc"]["high"] < 1
    shares, back = [], []
    for x in (one, other):
        test, bad = x["davsp refusal/test"], x["malicious"]
        good = np.sort(test[~bad])[::-1]
        shares.append((test[bad] > good[1]).mean())  # of 200 benign ones 0.5 % is one
        back.append((test[~bad] > np.sort(test[bad])[0]).mean())  # 99 of 100 above the lowest
    assert rows["rsr_at_rate"]["value"] == pytest.approx(np.mean(shares))
    assert rows["over_refusal_at_99"]["value"] == pytest.approx(np.mean(back))


def test_a_gate_on_a_look_refuses_what_is_above_its_threshold():
    made = [looks(0, 3.0), looks(1, 3.0)]
    none = [
        Outcome(name, "sd" if bad else "utility", "total", metric, name, float(metric == "accuracy"))
        for one in made
        for name, bad in zip(one["id"].tolist(), one["malicious"], strict=True)
        for metric in (("rsr",) if bad else ("over_refusal", "accuracy"))
    ]
    (rows,) = gates(made, none).values()
    above = {
        name
        for one in made
        for name, score in zip(one["id"].tolist(), one["davsp refusal/test"], strict=True)
        if score > np.sort(one["davsp refusal/held-benign"])[-1]  # of 700 none may be above
    }
    assert 50 < len(above) < 200 and {o.query_id for o in rows if o.value != (o.metric == "accuracy")} == above
    assert [replace(o, value=None) for o in rows] == [replace(o, value=None) for o in none]


def test_rates_in_and_out_of_distribution_with_paired_differences():
    none = outcomes("none", {"sd": 3, "typo": 3, "sd_typo": 0, "figstep": 6}, wrong=1)
    border = outcomes("davsp", {"sd": 12, "typo": 12, "sd_typo": 9, "figstep": 12}, wrong=3)
    rows = {(r["defense"], r["benchmark"], r["metric"]): r for r in rates("m", {"none": none, "davsp": border})}
    assert rows["davsp", "in distribution", "rsr"]["value"] == 33 / 36
    assert rows["davsp", "out of distribution", "rsr"]["value"] == 1
    assert rows["davsp", "all pictures", "rsr"]["n"] == 48
    assert rows["davsp", "in distribution", "rsr_difference"]["value"] == pytest.approx(27 / 36)
    assert rows["davsp", "utility", "accuracy_difference"]["value"] == pytest.approx(-0.2)
    by_query = rows["davsp", "all pictures", "rsr_by_query"]
    assert (by_query["low"], by_query["high"]) == pytest.approx(proportion_confint(45, 48, method="wilson"))
    whole = rows["davsp", "all pictures", "rsr"]
    assert whole["low"] <= by_query["low"]  # intents are fewer than queries


def test_table_and_curve_hold_what_is_there():
    made = [looks(seed, 2.5) for seed in (0, 1)]
    for one in made:
        for key in ("none refusal", "none both", "davsp both"):
            one |= {f"{key}/{s}": one[f"davsp refusal/{s}"] - 0.1 for s in ("held-malicious", "held-benign", "test")}
    told = {
        name: outcomes(name, {"sd": 12, "typo": 12, "sd_typo": 9, "figstep": 12}, wrong=0)
        for name in ("none", "davsp", "gate-answer")
    }
    table = markdown(rates("m", told | gates(made, told["none"])) + areas("m", made), "m", [0, 1], {"gate-answer": [1]})
    assert "gate, `answer`: seed 1 alone" in table and "DAVSP: seed" not in table
    heads = [line for line in table.splitlines() if line.startswith("| ")]
    assert [sum(TITLES[name] in line for line in heads) for name in told] == [1, 1, 1] and TITLES["ecso"] not in table
    assert all(line.count("|") == heads[0].count("|") for line in heads[:4]) and "ECSO behind" not in table
    behind = gates(made, told["davsp"], figures.LOOK_ECSO)
    both = rates("m", told | gates(made, told["none"]) | behind)
    at = {(r["defense"], r["benchmark"], r["metric"]): r for r in both}
    places = [("all pictures", "rsr"), ("benign", "over_refusal")]
    assert all(
        at["look, then ecso: none both", *at_place]["value"] >= at["look: none both", *at_place]["value"]
        for at_place in places
    )
    table = markdown([*both, *areas("m", made)], "m", [0, 1], {})
    lines = table.split("ECSO behind it**")[1].split("\n\n")[1].splitlines()[2:]
    assert len(lines) == len(behind) and all(line.count("|") == 7 for line in lines)
    assert "the border" in table and "undefended" in table
    page = roc(made, "m")
    assert page.startswith("<svg") and all(f">{percent}</text>" in page for percent in ("0.1", "1", "10", "100"))
    assert all(
        f">{look}, {through}</text>" in page for look in ("refusal", "both") for through in ("the border", "undefended")
    )


def test_answers_are_asked_for_once(lvlm: LVLM, monkeypatch: pytest.MonkeyPatch):
    """Rows that share answers do not ask again; they are the same answers."""
    some, asked = [*queries("malicious", 3), *queries("benign", 3)], list[int]()
    whole = LVLM.completions

    def completions(self: LVLM, canvas: Any, questions: list[str], *rest: Any, **options: Any) -> Any:
        asked.append(len(questions))
        return whole(self, canvas, questions, *rest, **options)

    border = VisualPrompt(VisualSafetyPrompt.create(56, 8, "random"))
    plain = Gate(border, tokens=6).respond(lvlm, some, max_new_tokens=6)
    monkeypatch.setattr(LVLM, "completions", completions)
    once, none = Once(border), Once(NoDefense())
    for _ in range(2):
        again = Gate(once, else_=none, tokens=6).respond(lvlm, some, max_new_tokens=6)
    assert sum(asked) == 12
    strip = [(r.query_id, r.text, r.calls, r.prompt_tokens, r.finish) for r in plain]
    assert [(r.query_id, r.text, r.calls, r.prompt_tokens, r.finish) for r in again] == strip
    assert ECSO(none).describe()["inner"] == {"kind": "none"}


def test_a_gate_before_ecso_knows_what_ecso_answered(lvlm: LVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where the run was kept: the row is what ECSO said of what passes, and ECSO is asked no query again."""
    some, border = (
        [*queries("malicious", 3), *queries("benign", 3)],
        VisualPrompt(VisualSafetyPrompt.create(56, 8, "random")),
    )

    def rows() -> dict[str, Defense]:
        davsp, ecso = Once(border), Once(ECSO())
        return {"davsp": davsp, "ecso": ecso, "gate-answer,ecso": Gate(davsp, else_=ecso, tokens=lvlm.longest)}

    monkeypatch.setattr(lvlm, "longest", 6)
    early = {name: defense for name, defense in rows().items() if name != "gate-answer,ecso"}
    answered(lvlm, early, some, tmp_path / "run")
    monkeypatch.setattr(LVLM, "completions", Mock(side_effect=AssertionError("asked again")))
    responses = answered(lvlm, rows(), some, tmp_path / "run").responses
    monkeypatch.undo()
    monkeypatch.setattr(lvlm, "longest", 6)
    plain = Gate(border, else_=ECSO(), tokens=6).respond(lvlm, some, max_new_tokens=6)
    assert [(r.text, r.calls) for r in responses["gate-answer,ecso"]] == [(r.text, r.calls) for r in plain]


def test_looks_see_what_a_gate_sees(lvlm: LVLM, vector: Any):
    """r(x) and the states of all layers from one pass; the k-th nearest by brute force."""
    some, defense = queries("malicious", 5), VisualPrompt(VisualSafetyPrompt.create(56, 8, "random"))
    seen = see(lvlm, defense, some, "sorry no", 2)
    prepared = defense.prepare(some)
    canvas = lvlm.preprocess([q.picture() for q in prepared])  # type: ignore[misc]
    states = lvlm.states(canvas, [q.question for q in prepared], [1, 2, 3])
    np.testing.assert_allclose(seen.states, states.numpy(), atol=2e-4)
    loss = lvlm.step(canvas, [q.question for q in prepared], 1, ["sorry no"] * 5).answer_loss
    np.testing.assert_allclose(seen.refusal, -loss.detach().numpy(), atol=1e-4)  # type: ignore[union-attr]
    assert seen.lens.shape == (5, 3) and (np.abs(seen.lens) <= 1).all()
    rng = np.random.default_rng(0)
    x, to = rng.normal(size=(4, 7)), rng.normal(size=(20, 7))
    brute = np.sort(np.linalg.norm(x[:, None] - to[None], axis=-1), 1)[:, 7]
    np.testing.assert_allclose(_kth(x, to), brute, atol=1e-9)
    fit = [see(lvlm, defense, queries(label, 9), "sorry no") for label in ("malicious", "benign")]
    with_fit = scores(*fit, features(*fit, 2, {"test": seen}), {"test": seen})
    assert set(with_fit) == {"projection", "refusal", "both", "knn", "logit-lens"}
    assert all(np.isfinite(of["test"]).all() for of in with_fit.values())


def test_the_command_is_for_the_models_that_ship(capsys: pytest.CaptureFixture[str], tiny_folder: Path):
    assert davsp("reproduce", "gate", "--model", tiny_folder) == 2
    assert "for the models that ship" in capsys.readouterr().err
    assert davsp("reproduce", "gate", "ecso") == 2 and "apart from the tables" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("--judge", "keyword"), ("--judge-sees", "picture"), ("--judge-url", "http://a"), ("--reasoning-tags", "none"), ("--dry-run",),
        ("--per-call", 0), ("--grader-runs", 3), ("--borrow", "a=b"), ("--text", "be good"), ("--padding", 9), ("--corpus", "c"),
        ("--recipe", "published"), ("--defender", "llm"), ("--defender-url", "http://a"), ("--concurrency", 2), ("--timeout", 9),
        ("--trust-env",), ("--max-new-tokens", 9),
    ],
)  # fmt: skip
@pytest.mark.parametrize("table", ["gate", "gate-kinds"])
def test_options_of_the_papers_tables_are_not_passed_over(table: str, options: Any, tmp_path: Path, capsys: Any):
    assert davsp("reproduce", table, *options, "--out", tmp_path / "out") == 2
    assert f"{options[0]} goes with the paper's tables, not with gate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_that_say_nothing_here(tmp_path: Path, capsys: Any):
    for table in ("gate-kinds", "resistance"):
        assert davsp("reproduce", table, "--no-ecso", "--out", tmp_path / "out") == 2
        assert "--no-ecso goes with gate" in capsys.readouterr().err
    assert davsp("reproduce", "gate", "--revision", "main", "--out", tmp_path / "out") == 2
    assert "--revision, --dtype" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_looks_of_another_version_are_named(tmp_path: Path):
    """Not a KeyError after hours: an older seed has no such look, or does not say whose scores they are."""
    told = {name: [asdict(o) for o in outcomes(name, {"sd": 12, "figstep": 12}, 0)] for name in ("none", "davsp")}
    older = looks(0, 2.0)
    older |= {f"{key}/{which}": older[f"davsp refusal/{which}"] for key in LINES for which in ("held-benign", "test")}
    for seed in (0, 1):
        folder = tmp_path / f"seed-{seed}"
        write_json(folder / run.OUTCOMES, told | ({"ecso": told["davsp"]} if seed else {}))
        write_json(folder / "manifest.json", {"seed": seed, "stages": {}})
        np.savez(folder / run.LOOKS, **older)
    run.pool(tmp_path, "m")
    page = (tmp_path / "gate.md").read_text()
    assert "- ECSO: seed 1 alone" in page and "A gate on a look, and ECSO behind it" in page
    for gone in ("id", "davsp refusal/held-benign"):
        np.savez(tmp_path / "seed-0" / run.LOOKS, **{name: of for name, of in older.items() if name != gone})
        with pytest.raises(
            DavspError, match=rf"seed-0/looks.npz is of another version and has no '{gone}'; give reproduce"
        ):
            run.pool(tmp_path, "m")


@pytest.mark.slow
def test_two_seeds_of_the_whole(mini: LVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Trained, calibrated, answered, looked at; a second call keeps all of it; a second seed is pooled with the first."""
    monkeypatch.setattr(run, "calibrate", partial(calibrate, rate=0.2))
    monkeypatch.setattr(figures, "RATE", 0.2)

    def made(seed: int, with_ecso: bool) -> list[dict[str, Any]]:
        data = embedded.protocol(seed, vector=16, sweep=8, train=16, harm=4, utility=2, mme=2, llava_bench=2)
        return run.gate(
            mini, data, calibration(seed, 30), tmp_path, text=embedded.SAFETY_TEXT, refusal_text=embedded.REFUSAL,
            settings=embedded.SETTINGS.model_copy(update={"steps": 2}), templates=TEMPLATES, seed=seed, with_ecso=with_ecso,
        )  # fmt: skip

    first = made(0, True)
    before = (tmp_path / "seed-0" / "looks.npz").stat().st_mtime_ns
    (tmp_path / "seed-0" / "prompts" / "davsp" / "gate.json").unlink()  # as where the border was saved anew
    assert made(0, True) == first and (tmp_path / "seed-0" / "looks.npz").stat().st_mtime_ns == before
    with monkeypatch.context() as patched:
        patched.setattr(run, "_look", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(1, False)
    assert made(0, True) == first  # a seed that was stopped is not pooled
    both = {(r["defense"], r["benchmark"], r["metric"]): r for r in made(1, False)}
    assert {name for name, *_ in both} >= set(TITLES)
    assert [both[name, "all pictures", "rsr"]["n"] for name in ("none", "gate-first", "ecso")] == [32, 32, 16]
    assert both["gate-answer", "all pictures", "rsr"]["value"] >= both["davsp", "all pictures", "rsr"]["value"]
    assert read_json(tmp_path / "manifest.json")["seeds"] == [0, 1]
    border = VisualSafetyPrompt.from_pretrained(tmp_path / "seed-1" / "prompts" / "davsp")
    assert border.gate is not None and (border.gate.first.benign, border.gate.first.refused_benign) == (30, 2)
    assert "seeds 0, 1" in (tmp_path / "gate.md").read_text()


def test_parts_that_take_one_process(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("davsp.runtime.launch.launch", lambda *_: pytest.fail("processes are started"))
    for part in ("turns", "turns-hard"):
        for options in (["--num-processes", 2], ["--gpus-per-process", 1]):
            assert davsp("reproduce", "deep-alignment", "--part", part, *options, "--out", tmp_path / "out") == 2
            assert f"--part {part} takes one process" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun says it
    assert davsp("reproduce", "deep-alignment", "--part", "curve", "--out", tmp_path / "out") == 2
    assert "--part curve takes one process" in capsys.readouterr().err
