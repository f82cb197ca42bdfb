"""`davsp reproduce` as a user calls it: what does not go together, dry runs, and whose words and budget a table takes."""

import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from command import run as davsp
from davsp import cli, embedded
from davsp.cli import reproduce
from davsp.defenses.adashield_s import DAVSP
from davsp.defenses.ecso import PUBLISHED
from davsp.embedded.ecso_templates import TEMPLATES
from davsp.errors import DavspError
from davsp.experiments.paper import run
from davsp.experiments.paper.plan import dry
from davsp.prompts import VisualSafetyPrompt
from paper_rows import SMALL


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["nonsense"], "choose utility, resistance"),
        (["resistance", "--borrow", "a=b"], "goes with the table transfer"),
        (["transfer", "--borrow", "nothing"], "is not MODEL=FOLDER"),
        (["resistance", "--split", "x.json"], "go together"),
        (["resistance", "--model", "org/other"], "the embedded data is for"),
        (["resistance", "--judge", "keyword", "--judge", "keyword-gcg"], "a table has one"),
        (["resistance", "--defender-url", "http://127.0.0.1:9/v1"], "go with --defender"),
        (["resistance", "--defender", "m"], "are for other models"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(line, says, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["davsp", "reproduce", *line])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert says in err and len(err.strip().splitlines()) == 1


def test_a_run_borrows_the_borders_beside_it_and_never_its_own(tmp_path: Path):
    for name in ("davsp-mini", "davsp-mini-narrow", "mine"):
        VisualSafetyPrompt.create(32, 4).save_pretrained(tmp_path / name / "prompts" / "davsp")
    borders = reproduce._borrowed(None, tmp_path / "mine", "davsp-mini")
    assert borders == {"davsp-mini-narrow": tmp_path / "davsp-mini-narrow" / "prompts" / "davsp"}


def test_a_dry_run_counts_calls_and_loads_no_model(monkeypatch):
    monkeypatch.setattr("davsp.embedded.load", lambda *a, **k: pytest.fail("it loaded a model"))
    text = dry(["ecso"], "llava", None, 1024, 0.5)
    total = 1480 * 3 + 500 + 118 + 2374 + 60
    assert f"{total} test queries" in text
    calls = total * (1 + 4 + 1 + 3 + 4)
    assert f"{calls} calls at most, {calls * 0.5 / 3600:.1f} hours" in text and "training of 1 prompts (davsp)" in text


@pytest.mark.parametrize(
    ("options", "longest", "pace"),
    [
        (["--model", "llava-hf/llava-1.5-13b-hf", "--benchmark", "mme=x"], 1024, 2.252),
        (["--model", "llava-hf/llava-1.5-13b-hf", "--benchmark", "mme=x", "--max-new-tokens", "512"], 512, 1.228),
        ([], 48, 0.3),
        (["--per-call", "0.5"], 48, 0.5),
    ],
)
def test_a_dry_run_reckons_with_the_length_of_answers(options: list[str], longest: int, pace: float, capsys):
    assert davsp("reproduce", "ecso", "--dry-run", *options) == 0
    text = capsys.readouterr().out
    calls = int(re.search(r"(\d+) calls at most", text)[1])
    assert f"{calls * pace / 3600:.1f} hours at {pace:.3g} s a call (answers of up to {longest} tokens)" in text


@pytest.mark.slow
def test_the_published_road_from_folders_to_tables(tmp_path: Path, monkeypatch, capsys):
    """Undefended runs, the split drawn from them, then tables: on the embedded counterparts, in the real layouts."""
    from davsp.embedded import counterparts

    monkeypatch.chdir(tmp_path)
    root = counterparts.write(
        tmp_path / "sets", 0, mm_safetybench=2, figstep=3, vlguard=8, mm_vet=12, mme=1, llava_bench=3
    )
    sets = {
        name: ("--benchmark", f"{name}={root / name}") for name in ("vlguard", "mm_safetybench", "mm_vet", "figstep")
    }

    def davsp(*line: str) -> None:
        monkeypatch.setattr("sys.argv", ["davsp", *map(str, line)])
        try:
            cli.main()
        except SystemExit as stop:
            assert stop.code in (None, 0), capsys.readouterr().err

    for name, split in (("vlguard", "train"), ("mm_safetybench", "all")):
        davsp("eval", "--defense", "none", *sets[name], "--split", split, "--out", f"out/{name}", "--max-unscored", "1")
    davsp("data", "split", "split.json", "--run", "out/vlguard", "--run", "out/mm_safetybench", "--vector", "2", "--intents",
          "1", "--helpful", "4", *(x for pair in sets.values() for x in pair))  # fmt: skip
    davsp("reproduce", "intervention", "ablation", "--split", "split.json", *(x for pair in sets.values() for x in pair),
          "--judge", "keyword", "--judge", "exact", "--steps", "1")  # fmt: skip
    out = tmp_path / "out/reproduce/davsp-mini"
    assert "in place of the published sets: figstep_embedded, mm_vet_embedded" in (out / "ablation.md").read_text()
    lines = list(csv.DictReader(io.StringIO((out / "ablation.csv").read_text())))
    measured = {x["column"] for x in lines if x["defense"] == "davsp" and x["value"]}
    assert measured == {"sd_typo", "sd", "typo", "figstep", "mm_vet"}
    pooled = next(csv.DictReader(io.StringIO((out / "intervention.csv").read_text())))
    assert (pooled["defense"], pooled["column"]) == ("none", "mm_safetybench") and pooled["value"]
    facts = json.loads((out / "manifest.json").read_text())  # the model's own words, whatever the data
    assert facts["text"] == embedded.SAFETY_TEXT
    assert facts["settings"] == embedded.SETTINGS.model_copy(update={"steps": 1}).model_dump()


@pytest.mark.parametrize("model", [None, "davsp-mini", "davsp-mini-narrow", "other"])
def test_words_and_budget_follow_the_model_and_not_the_data(model, tmp_path: Path, monkeypatch, capsys):
    """With published sets and a split a model that ships keeps its text, templates, recipe and corpus; another is as published."""
    kits = []

    def stop(lvlm, data, out, **options):
        kits.append(options)
        raise DavspError("enough")

    monkeypatch.chdir(tmp_path)
    protocol = embedded.protocol(0, **SMALL)
    monkeypatch.setattr("davsp.cli.reproduce._published", lambda sets, split: protocol)
    monkeypatch.setattr(
        "davsp.cli.reproduce.load_lvlm", lambda *options: SimpleNamespace(takes_templates=lambda: False)
    )
    monkeypatch.setattr(run, "make_kit", stop)
    named = ["--model", model] if model else []
    line = ["reproduce", "resistance", *named, "--split", "split.json", "--benchmark", "mm_vet=sets"]
    monkeypatch.setattr("sys.argv", ["davsp", *line])
    with pytest.raises(SystemExit):
        cli.main()
    assert "enough" in capsys.readouterr().err
    (kit,) = kits
    shipped = model != "other"
    assert kit["shipped"] == shipped
    assert kit["text"] == (embedded.SAFETY_TEXT if shipped else DAVSP)
    assert kit["templates"] == (TEMPLATES if shipped else PUBLISHED)
    assert (kit["settings"] == embedded.SETTINGS) == shipped and (kit["settings"].steps == 1200) != shipped
    monkeypatch.setattr("sys.argv", ["davsp", *line, "--corpus", "c.txt"])
    with pytest.raises(SystemExit):
        cli.main()
    assert ("are for other models" if shipped else "cannot read c.txt") in capsys.readouterr().err
