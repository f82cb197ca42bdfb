"""Seeds of one folder: what may be pooled, and what is said of a seed that is under way."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from davsp import LVLM, embedded
from davsp.embedded.ecso_templates import TEMPLATES
from davsp.errors import DavspError
from davsp.experiments.deep import begun, curve, curve_table, depth, splits, turns, unseen
from davsp.experiments.deep.borders import TITLES
from davsp.experiments.gate import run as gate
from davsp.experiments.gate.kinds import ALL
from davsp.experiments.paper import claims
from davsp.experiments.paper.deeper import deeper
from davsp.experiments.seeds import OUTCOMES, check_alike, check_beside, keep
from davsp.metrics import Outcome

MADE = {
    "weights": "w", "text": "t", "settings": {"steps": 150, "lam": 2.5, "seed": 0}, "curves": {"answer": {"lam": 1}},
    "follow_ups": ("more .",), "part": "kinds-1", "beginning": "sure", "barred": "i",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field", "both"),
    [
        ({"weights": "v"}, "weights", "'w', seed 1 'v'"),
        ({"text": "other"}, "text", "'t', seed 1 'other'"),
        ({"settings": {"steps": 10, "lam": 2.5}}, "settings.steps", "150, seed 1 10"),
        ({"curves": {"answer": {"lam": 2}, "new": {}}}, "curves.answer.lam", "1, seed 1 2"),
        ({"follow_ups": ["go on ."]}, "follow_ups", "['more .'], seed 1 ['go on .']"),
        ({"part": "kinds-2"}, "part", "'kinds-1', seed 1 'kinds-2'"),
        ({"beginning": "yes"}, "beginning", "'sure', seed 1 'yes'"),
        ({"barred": "no"}, "barred", "'i', seed 1 'no'"),
    ],
)
def test_seeds_that_were_made_in_other_ways_are_named(change: dict[str, Any], field: str, both: str, tmp_path: Path):
    with pytest.raises(DavspError) as told:
        check_alike(tmp_path, [{"seed": 0} | MADE, {"seed": 1} | MADE | change])
    assert f"in {tmp_path} seed 0 has {field} {both}: choose another --out" in str(told.value)


def test_what_differs_by_nature_or_is_not_known_is_pooled(tmp_path: Path):
    other = {
        "layer": 5,
        "time": "later",
        "commit": "b",
        "stages": {"answer": 2.0},
        "torch": "3",
        "test": {"sha256": "b"},
    }
    settings = {"steps": 150, "seed": 1, "new": True}
    curves = {"answer": {"lam": 1}, "new": {"lam": 3}}
    check_alike(
        tmp_path,
        [{"seed": 0, "layer": 3} | MADE, {"seed": 1} | MADE | other | {"settings": settings, "curves": curves}],
    )
    check_alike(tmp_path, [{"seed": 0} | MADE, {"seed": 1, "settings": {}}])
    keep(tmp_path / "seed-0", {"seed": 0} | MADE, {})
    check_beside(tmp_path, 0, MADE | {"text": "of the same seed, which is made anew"})


def test_of_three_seeds_two_are_compared_though_the_first_lacks_the_field(tmp_path: Path):
    with pytest.raises(DavspError, match="seed 1 has text 't', seed 2 'other'"):
        check_alike(tmp_path, [{"seed": 0}, {"seed": 1} | MADE, {"seed": 2} | MADE | {"text": "other"}])


def test_seeds_of_other_settings_are_not_pooled(tmp_path: Path):
    for seed, steps in ((0, 150), (1, 10)):
        facts = {"seed": seed, "settings": {"steps": steps}, "beginning": "sure", "stages": {}, "layer": 3}
        keep(tmp_path / f"seed-{seed}", facts, {})
    for pool in (
        begun.pool,
        curve_table.pool,
        depth.pool,
        turns.pool,
        gate.pool,
        lambda out, m: unseen.pool(out, m, "forms"),
    ):
        with pytest.raises(DavspError, match=r"settings\.steps 150, seed 1 10"):
            pool(tmp_path, "m")
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("part", ["begun", "curve", "depth", "turns", "unseen", "gate"])
def test_a_seed_that_could_not_be_pooled_is_not_begun(
    part: str, mini: LVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / part if part in ("depth", "turns") else tmp_path
    keep(folder / "seed-0", {"seed": 0, "settings": {"steps": 10}}, {})
    how: dict[str, Any] = {"text": embedded.SAFETY_TEXT, "settings": embedded.SETTINGS, "seed": 1}
    more: dict[str, dict[str, Any]] = {
        "begun": {"data": None, "beginning": "sure"}, "unseen": {"part": "forms"},
        "gate": {"data": None, "sets": ([], [], [], []), "refusal_text": "no", "templates": TEMPLATES},
    }  # fmt: skip
    modules: dict[str, Any] = {m.__name__.split(".")[-1]: m for m in (begun, curve, depth, turns, unseen)} | {
        "gate": gate
    }
    monkeypatch.setattr(modules[part], "fitted_vector", lambda *_: pytest.fail("it is begun"))
    with pytest.raises(DavspError, match=rf"settings\.steps 10, seed 1 {embedded.SETTINGS.steps}"):
        getattr(modules[part], part)(mini, out=tmp_path, **how, **more.get(part, {"data": None}))
    assert not (tmp_path / "seed-1").exists()


# -- under way -----------------------------------------------------------------------------------------------------------


def row(seed: int, benchmark: str, metric: str, good: int, split: str = "total") -> list[Outcome]:
    return [Outcome(f"{seed} {i}", benchmark, split, metric, f"g{i}", float(i < good)) for i in range(4)]


def curves(seed: int, names: list[str]) -> tuple[dict[str, Any], dict[str, list[Outcome]]]:
    """A seed of `curve` with these of its curves, each of two points."""
    defenses = {"none": 1, "text": 2} | {f"{name} step {k}": 2 + (k > 0) for name in names for k in (0, 40)}
    facts = {"seed": seed, "stages": {}, "wanted": list(curve_table.CURVES), "done": names}
    return facts, {
        name: [*row(seed, "malicious", "rsr", good), *row(seed, "utility", "accuracy", 4), *row(seed, "benign", "over_refusal", 0)]
        for name, good in defenses.items()
    }  # fmt: skip


def test_a_seed_that_is_whole_keeps_all_of_its_curves_beside_one_that_is_under_way(tmp_path: Path):
    out = tmp_path / "curve"
    keep(out / "seed-0", *curves(0, list(curve_table.CURVES)))
    rows = curve_table.pool(out, "m")
    page, before = (out / "curve.md").read_text(), deeper(tmp_path)
    keep(out / "seed-1", *curves(1, ["answer"]))
    assert curve_table.pool(out, "m") == rows and deeper(tmp_path) == before
    assert before[0].verdict == claims.FAILS and before[0].evidence.endswith("; 1 seed")
    said = "- Under way, and in none of the figures: seed 1 has 1 of 7 (answer).\n"
    assert (out / "curve.md").read_text() == page + said
    keep(out / "seed-1", *curves(1, list(curve_table.CURVES)))
    curve_table.pool(out, "m")
    assert "seeds 0, 1" in (out / "curve.md").read_text() and "Under way" not in (out / "curve.md").read_text()


def test_seeds_that_are_under_way_give_a_table_and_no_verdict(tmp_path: Path):
    out = tmp_path / "curve"
    done = list(curve_table.CURVES)[:3]
    keep(out / "seed-0", *curves(0, done))
    keep(out / "seed-1", *curves(1, done[:2]))
    curve_table.pool(out, "m")
    page = (out / "curve.md").read_text()
    assert (
        "seeds 0, 1" in page
        and "- Under way: seed 1 has 2 of 7 (answer; both, λ 2.5). The figures are of that." in page
    )
    (claim,) = deeper(tmp_path)
    assert claim.verdict == claims.UNTESTED
    assert "is under way: seed 0 has 3 of 7 (answer; both, λ 2.5; projection), seed 1 has 2 of 7" in claim.evidence


@pytest.mark.parametrize("known", [True, False])
def test_choices_of_kinds_that_are_under_way_are_counted(known: bool, tmp_path: Path):
    """A folder of an earlier version does not say how many it wants; it is read as whole."""
    first, *others = [split for split in splits.splits_of("kinds-2") if split != ALL]
    facts = {"seed": 0, "layers": {}, "stages": {}} | ({"done": [first], "wanted": [first, *others]} if known else {})
    places = (("unseen", "rsr"), ("met", "rsr"), ("utility", "accuracy"), ("benign", "over_refusal"))
    names = [*TITLES, *(f"{name}, {ALL}" for name in TITLES)]
    keep(tmp_path / "kinds-2" / "seed-0", facts, {
        name: [o for place in places for split in (first, "total") for o in row(0, *place, 3, split)] for name in names
    })  # fmt: skip
    unseen.pool(tmp_path / "kinds-2", "m", "kinds-2")
    (claim,) = deeper(tmp_path)
    said = f"seed 0 has 1 of 6 ({first})"
    assert (claim.verdict == claims.UNTESTED and said in claim.evidence) == known
    assert (f"- Under way: {said}" in (tmp_path / "kinds-2" / "unseen.md").read_text()) == known


def test_a_part_that_is_stopped_says_which_splits_are_done(mini: LVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = {"harm": 1, "utility": 1, "mme": 1, "llava_bench": 1, "vector": 4, "sweep": 2, "train": 8}
    monkeypatch.setattr(splits, "protocol", lambda seed, **_: embedded.protocol(seed, **sizes))

    def borders(stages: Any, *_: Any) -> dict[str, Any]:
        if stages.out.name == "steps" and stop:
            raise KeyboardInterrupt
        return {}

    monkeypatch.setattr(unseen, "borders", borders)
    monkeypatch.setattr(unseen, "fitted_vector", lambda *_: SimpleNamespace(layer=1))
    monkeypatch.setattr(unseen, "evaluate", lambda *_, **__: SimpleNamespace(verdicts={}))
    monkeypatch.setattr(unseen, "pool", lambda *_: [])
    file = tmp_path / "wordings" / "seed-0" / "manifest.json"
    for stop in (True, False):  # noqa: B007
        try:
            unseen.unseen(
                mini, tmp_path / "wordings", "wordings", text=embedded.SAFETY_TEXT, settings=embedded.SETTINGS
            )
        except KeyboardInterrupt:
            assert json.loads(file.read_text())["done"] == ["how"]
    facts = json.loads(file.read_text())
    assert facts["done"] == facts["wanted"] == ["how", "steps"]


def test_outcomes_never_stand_beside_a_manifest_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A seed that was whole is given anew, and the call dies between its two files."""
    keep(tmp_path, {"done": ["a", "b"]}, {"none": []})
    written: list[str] = []

    def write(path: Path, _: Any) -> None:
        written.append(path.name)
        if path.name == OUTCOMES:
            raise KeyboardInterrupt

    monkeypatch.setattr("davsp.experiments.seeds.write_json", write)
    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path, {"done": ["a"]}, {"none": []})
    assert written == ["manifest.json", OUTCOMES] and not (tmp_path / OUTCOMES).exists()
