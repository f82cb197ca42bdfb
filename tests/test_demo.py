"""`davsp demo`: all stages on the tiny model, cut off, deleted, changed; and what its report shows."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from davsp import LVLM, DavspError, TrainSettings, VisualSafetyPrompt
from davsp.defenses import VisualPrompt
from davsp.embedded.data import Protocol
from davsp.evaluation import Evaluation
from davsp.experiments.demo import run_demo
from davsp.runtime.files import sha256
from tiny import queries


def noise() -> Protocol:
    """A protocol of noise for the tiny model."""
    sets = [queries(label, 4, seed) for seed in range(3) for label in ("malicious", "benign")]
    bad = [
        replace(q, id=f"{b}{q.id}", benchmark=b)
        for b in ("sd", "typo", "sd_typo", "figstep")
        for q in queries("malicious", 2, 9)
    ]
    good = [
        replace(q, benchmark="utility", category=c, id=f"{c}{q.id}")
        for c in ("rec", "ocr")
        for q in queries("benign", 2, 9)
    ]
    return Protocol(*sets, test=[*bad, *good])


SETTINGS = TrainSettings.model_validate({"steps": 4, "batch_size": 4, "checkpoint_every": 2, "probe_every": 2})


def demo(lvlm: LVLM | None, out: Path, settings: TrainSettings = SETTINGS) -> tuple[Evaluation, str]:
    console = Console(record=True, width=140, file=io.StringIO())
    options = {"safety_text": "please be safe", "padding": 8, "batch_size": 4, "max_new_tokens": 4}
    found = run_demo(out, lvlm, noise(), settings, console=console, **options)  # type: ignore[arg-type]
    return found, console.export_text()


def seconds(out: Path) -> dict[str, float]:
    """What the stages took, by the manifest."""
    taken = json.loads((out / "manifest.json").read_text())["stages"]
    return {name: taken[name] for name in ("vector", "davsp", "additive", "evaluate")}


def pixels(out: Path) -> bytes:
    """Of the border; the tiny model's figures hardly depend on them."""
    return (out / "prompt" / "vsp.png").read_bytes()


@pytest.fixture(scope="module")
def finished(lvlm: LVLM, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    """A run that has ended: tests copy its folder, or compare with it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, demo(lvlm, out)[0]


def test_demo_end_to_end(lvlm: LVLM, tmp_path: Path) -> None:
    """All files are there, the second run keeps them, and other settings are made anew and give other pixels."""
    found, printed = demo(lvlm, tmp_path)
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert rows == found.rows
    assert list(dict.fromkeys(r["defense"] for r in rows)) == [
        "none",
        "safety-text",
        "random-border",
        "additive",
        "davsp",
        "gate",
    ]
    assert {r["benchmark"] for r in rows if r["metric"] == "rsr"} == {"sd", "typo", "sd_typo", "figstep"}
    assert "in distribution" in (tmp_path / "report.html").read_text()
    for stage in ("vector", "davsp", "additive", "evaluate", "report"):
        assert re.search(rf"^{stage} +[\d.]+ s", printed, re.MULTILINE)

    prompt = VisualSafetyPrompt.from_pretrained(tmp_path / "prompt")
    told = prompt.config["measured"]
    assert told["files"]["metrics.json"] == sha256(tmp_path / "metrics.json") and told["judges"] == ["keyword/1"]
    (figure,) = (f for f in told["figures"] if (f["benchmark"], f["metric"]) == ("sd", "rsr"))
    (row,) = (r for r in rows if (r["defense"], r["benchmark"], r["metric"]) == ("davsp", "sd", "rsr"))
    assert figure["value"] == (row["value"], row["low"], row["high"]) and figure["n"] == row["n"]
    evaluated = json.loads((tmp_path / "run.json").read_text())["defenses"]["davsp"]
    assert evaluated == VisualPrompt(prompt).describe()  # what was measured is what was exported

    first = seconds(tmp_path)
    again, printed = demo(lvlm, tmp_path)
    assert again == found and printed.count("kept") == 3
    assert seconds(tmp_path) == first and min(first.values()) > 0

    _, printed = demo(lvlm, tmp_path, SETTINGS.model_copy(update={"steps": 6}))
    assert printed.count("made anew") == 2 and "answered anew" in printed
    assert VisualPrompt(VisualSafetyPrompt.from_pretrained(tmp_path / "prompt")).describe() != evaluated


def test_demo_goes_on_after_a_kill(
    lvlm: LVLM, finished: tuple[Path, Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the border is saved: training is not lost, and the end is the same."""
    with monkeypatch.context() as patch:
        patch.setattr(
            VisualSafetyPrompt, "save_pretrained", lambda *_: (_ for _ in ()).throw(DavspError("the disk is full"))
        )
        with pytest.raises(DavspError, match="full"):
            demo(lvlm, tmp_path / "cut")
    cut, printed = demo(lvlm, tmp_path / "cut")
    assert re.search(r"^davsp .*finished", printed, re.MULTILINE)
    assert cut.rows == finished[1].rows and pixels(tmp_path / "cut") == pixels(finished[0])


def test_demo_goes_on_after_a_kill_before_a_changed_stage(
    lvlm: LVLM, finished: tuple[Path, Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the new settings were noted and before the training began: no checkpoint of the old ones is met."""
    other, out = SETTINGS.model_copy(update={"steps": 6}), tmp_path / "out"
    shutil.copytree(finished[0], out)
    with monkeypatch.context() as patch:
        patch.setattr("davsp.experiments.stages.train", lambda *_: (_ for _ in ()).throw(DavspError("killed")))
        with pytest.raises(DavspError, match="killed"):
            demo(lvlm, out, other)
    found, _ = demo(lvlm, out, other)
    whole, _ = demo(lvlm, tmp_path / "whole", other)
    assert found.rows == whole.rows and pixels(out) == pixels(tmp_path / "whole") != pixels(finished[0])


@pytest.mark.parametrize(
    ("gone", "stage"), [("prompt", "davsp"), ("train/davsp", "davsp"), ("vector", "vector"), ("additive", "additive")]
)
def test_what_was_deleted_is_made_anew(
    gone: str,
    stage: str,
    lvlm: LVLM,
    finished: tuple[Path, Evaluation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rest is kept, the figures are the same, and the hub is not asked."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / gone)
    again, printed = demo(lvlm, out)
    assert again.rows == finished[1].rows and pixels(out) == pixels(finished[0])
    assert f"{stage}: made anew, as what was kept is not whole" in " ".join(printed.split())
    assert printed.count("kept; it took") == 2


def test_only_the_model_that_ships_is_shown_unredacted(
    lvlm: LVLM, finished: tuple[Path, Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model does not refuse, so its answers are redacted; those of the embedded one are harmless."""
    monkeypatch.setattr("davsp.embedded.load", lambda: lvlm)
    demo(None, tmp_path / "shipped")
    assert "[redacted]" in (finished[0] / "report.html").read_text()
    assert "[redacted]" not in (tmp_path / "shipped" / "report.html").read_text()
