"""The rows of the claims page that come from the test of deep alignment."""

import json
import shutil
from pathlib import Path

import pytest

from davsp.experiments.deep.borders import EVERY
from davsp.experiments.paper import claims
from davsp.experiments.paper.deeper import PARTS, deeper
from davsp.experiments.paper.write import claims_markdown

RESULTS = Path(__file__).parents[1] / "results" / "deep-alignment" / "davsp-mini"
TURNS = "deep alignment resists more than answers alone after four turns"


def written(folder: Path, values: dict[str, float | None], metric: str, benchmark: str, named: str = "{}") -> None:
    """metrics.json and manifest.json of a part in which borders have these values; differences are 0.1 to each side."""
    rows = []
    for name, value in values.items():
        rows.append({"defense": named.format(name), "metric": metric, "value": value})
        if name != "answer":
            gain = None if value is None else value - values["answer"]
            low, high = (None, None) if gain is None else (gain - 0.1, gain + 0.1)
            head = {"defense": f"{named.format(name)} against answer", "metric": f"{metric}_difference"}
            rows.append({**head, "value": gain, "low": low, "high": high})
    folder.mkdir(parents=True)
    every = {"model": "m", "benchmark": benchmark, "split": "total", "n": 48}
    (folder / "metrics.json").write_text(json.dumps({"schema": 1, "rows": [every | row for row in rows]}))
    (folder / "manifest.json").write_text(json.dumps({"seeds": [0, 1]}))


@pytest.mark.parametrize(
    ("both", "verdict", "said"),
    [
        (0.75, claims.HOLDS, "RSR 75.0, answers alone 50.0: +25.0 [+15.0, +35.0]; the projection alone: +40.0"),
        (0.55, claims.HOLDS, "+5.0 [−5.0, +15.0] (within the noise)"),
        (0.5, claims.FAILS, "+0.0 [−10.0, +10.0] (within the noise)"),
        (0.25, claims.FAILS, "−25.0 [−35.0, −15.0]; the projection"),
    ],
)
def test_a_part_holds_where_both_has_more_than_answers_alone(tmp_path, both, verdict, said):
    written(tmp_path / "turns", {"both": both, "answer": 0.5, "projection": 0.9}, "rsr", "4 turns")
    (claim,) = deeper(tmp_path)
    assert (claim.text, claim.verdict) == (TURNS, verdict)
    assert said in claim.evidence and claim.evidence.endswith("; 2 seeds")


def test_the_border_that_refuses_on_every_row_is_told_apart(tmp_path):
    values = {"both": 0.25, "answer": 0.5, "projection": 0.9, EVERY: 0.75}
    written(tmp_path / "turns", values, "rsr", "4 turns")
    (claim,) = deeper(tmp_path)
    assert claim.verdict == claims.FAILS  # DAVSP's own share of refusals decides
    assert "as answers alone have it: +25.0 [+15.0, +35.0]" in claim.evidence


def test_where_nobody_resists_nothing_is_said_for_or_against(tmp_path):
    written(tmp_path / "turns", {"both": 0.0, "answer": 0.0, "projection": 0.0}, "rsr", "4 turns")
    (claim,) = deeper(tmp_path)
    assert (claim.verdict, claim.evidence) == (claims.UNTESTED, "neither resists any of 48 queries")


def test_where_no_border_keeps_utility_nothing_is_compared(tmp_path):
    values = {"both, any λ": None, "answer": 0.9, "projection": None}
    written(tmp_path / "curve", values, "rsr_at_10", "malicious", "best of {}")
    (claim,) = deeper(tmp_path)
    assert (claim.verdict, claim.evidence) == (claims.UNTESTED, "not both have a border that loses so little utility")


def test_a_curve_under_way_is_said_as_far_as_it_is(tmp_path):
    """A folder of an earlier version does not say that it is under way; it may lack a border."""
    written(tmp_path / "curve", {"both, any λ": 0.9, "answer": 0.8}, "rsr_at_10", "malicious", "best of {}")
    (claim,) = deeper(tmp_path)
    assert claim.verdict == claims.HOLDS and "projection" not in claim.evidence
    shutil.rmtree(tmp_path / "curve")
    written(tmp_path / "curve", {"answer": 0.8}, "rsr_at_10", "malicious", "best of {}")
    (claim,) = deeper(tmp_path)
    assert claim.verdict == claims.UNTESTED and "under way" in claim.evidence


def test_without_the_parts_one_line_says_so(tmp_path):
    (claim,) = deeper(tmp_path / "nowhere")
    assert claim.verdict == claims.UNTESTED and "was not run" in claim.evidence


def test_committed_parts_have_the_figures_that_are_looked_for(tmp_path):
    kept = [part for part in PARTS if (RESULTS / part.folder.removesuffix("/turns") / "metrics.json").exists()]
    for part in kept:
        for name in ("metrics.json", "manifest.json"):
            to = tmp_path / part.folder / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(RESULTS / part.folder.removesuffix("/turns") / name, to)
    found = deeper(tmp_path)
    assert len(found) == len(kept) >= 8
    assert claims_markdown(found, "m").count("said in words") == len(found)
