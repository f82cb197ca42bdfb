"""--defense: every spec means the defense that it says, and everything else is an error that lists what is known."""

import json
from pathlib import Path
from typing import Any

import pytest

from command import run as davsp
from davsp import DavspError, HarmfulnessVector, VisualSafetyPrompt, embedded
from davsp.benchmarks.custom import save_queries
from davsp.cli.defenses import rows
from davsp.defenses import ECSO, Chain, Defense, Gate, Intervention, NoDefense, SafetyText, VisualPrompt, adashield_s
from davsp.embedded.ecso_templates import TEMPLATES
from tiny import queries


@pytest.fixture
def border(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VisualPrompt:
    """In the folders out/prompt and "out/a+b=c" below the working directory."""
    monkeypatch.chdir(tmp_path)
    prompt = VisualSafetyPrompt.create(56, 8, "random", text="please be safe")
    for name in ("prompt", "a+b=c"):
        prompt.save_pretrained(Path("out") / name)
    return VisualPrompt(prompt)


def read(spec: str, vector: HarmfulnessVector | None = None, shipped: bool = False) -> Defense:
    ((name, defense),) = rows([spec], None, "be kind", shipped, vector).items()
    assert defense.name == name
    return defense


def test_every_spec(border: VisualPrompt, vector: HarmfulnessVector) -> None:
    text = SafetyText("be kind")
    expected: dict[str, tuple[str, Defense]] = {
        "none": ("none", NoDefense()),
        "safety-text": ("safety-text", text),
        "safety-text=a+b=c": ("safety-text", SafetyText("a+b=c")),
        "mine=out/prompt": ("mine", border),
        "mine=out/a+b=c": ("mine", border),
        "out/a+b=c": ("davsp", border),
        "adashield-s": ("adashield-s", adashield_s()),
        "adashield-s:prefix": ("adashield-s:prefix", adashield_s("prefix")),
        "adashield-s:prefix+davsp=out/prompt": ("adashield-s:prefix+davsp", Chain([adashield_s("prefix"), border])),
        "ecso": ("ecso", ECSO()),
        "ecso:published": ("ecso:published", ECSO(rule="published")),
        "ecso+out/prompt": ("ecso+davsp", ECSO(border)),
        "ecso:published,whole+mine=out/a+b=c": (
            "ecso:published,whole+mine",
            ECSO(border, rule="published", follow="whole"),
        ),
        "ecso+safety-text=a+b": ("ecso+safety-text", ECSO(SafetyText("a+b"))),
        "ecso+safety-text+out/prompt": ("ecso+safety-text+davsp", ECSO(Chain([text, border]))),
        "ecso-adaptive+davsp=out/prompt": ("ecso-adaptive+davsp", ECSO(instead=border)),
        "ecso-adaptive+ecso+davsp=out/prompt": ("ecso-adaptive+ecso+davsp", ECSO(instead=ECSO(border))),
        "gate+out/prompt": ("gate+davsp", Gate(border)),
        "gate:answer,ecso+mine=out/a+b=c": ("gate:answer,ecso+mine", Gate(border, else_=ECSO())),
        "gate:answer,ecso+safety-text": ("gate:answer,ecso+safety-text", Gate(text, else_=ECSO())),
        "intervention:-1.5": ("intervention:-1.5", Intervention(vector, times=-1.5)),
        "intervention:plus": ("intervention:plus", Intervention(vector, to=vector.mu_plus)),
        "intervention:minus": ("intervention:minus", Intervention(vector, to=vector.mu_minus)),
        "intervention:to:-9.5+out/prompt": ("intervention:to:-9.5+davsp", Intervention(vector, to=-9.5, inner=border)),
    }
    for spec, (name, defense) in expected.items():
        built = read(spec, vector)
        assert built.name == name and built.describe() == defense.describe(), spec


def test_the_embedded_models_are_asked_in_their_own_words() -> None:
    assert read("ecso", shipped=True).describe() == ECSO(templates=TEMPLATES).describe()
    before = read("gate:answer,ecso+safety-text", shipped=True).describe()
    assert before["else"] == ECSO(templates=TEMPLATES).describe()
    text = adashield_s(text=embedded.SAFETY_TEXT)
    assert read("adashield-s", shipped=True).describe() == text.describe()
    assert rows([], None, None, True)["safety-text"].describe() == SafetyText(embedded.SAFETY_TEXT).describe()
    assert list(rows([], None, None, False)) == ["none"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("frame", "'frame' is not known: give none; none:WAY"),
        ("none=out/prompt", "is not known"),
        ("ecso=out/prompt", "is not known"),
        ("ecso+", "is not known"),
        ("ecso+frame", "'frame' is not known"),
        ("frame+ecso", "'frame' is not known"),
        ("adashield-s:suffix", "is not known"),
        ("=out/prompt", "is not known"),
        ("ecso:strict", "may stand published, whole"),
        ("ecso-adaptive", "needs what answers again"),
        ("gate:answer,pat+out/prompt", "behind the comma may stand ecso"),
        ("gate:answer,ecso", "gate:answer,ecso needs what it looks through: gate:answer,ecso+NAME=FOLDER"),
        ("gate,ecso+out/prompt", "does not say how the gate looks: gate:answer,ecso"),
        ("gate:last,ecso+out/prompt", "a gate has no kind 'last'"),
        ("gate:first,ecso+out/prompt", "no threshold yet"),
        ("intervention", "does not say by how much"),
        ("intervention:up", "does not say by how much"),
        ("intervention:at:2", "does not say by how much"),
        ("intervention:nan", "needs a finite number"),
        ("davsp=nowhere/at/all", "no prompt at nowhere/at/all"),
    ],
)
def test_anything_else_is_an_error(spec: str, says: str, vector: HarmfulnessVector, border: VisualPrompt) -> None:
    with pytest.raises(DavspError) as stop:
        read(spec, vector)
    assert says in str(stop.value)


def test_an_intervention_needs_a_vector() -> None:
    with pytest.raises(DavspError, match="needs --vector"):
        read("intervention:1")


def test_eval_under_each(
    border: VisualPrompt, tiny_folder: Path, vector: HarmfulnessVector, tmp_path: Path, capsys: Any
) -> None:
    """All at once, the costs in table and report; a second time nothing is answered again."""
    save_queries(tmp_path / "data", [*queries("malicious", 3), *queries("benign", 2)])
    vector.save(tmp_path / "vector")
    names = ["none", "adashield-s", "ecso", "ecso+davsp", "ecso-adaptive+davsp", "intervention:2"]
    specs = [f"{name}=out/prompt" if name.endswith("davsp") else name for name in names]
    command = ["eval", "--queries", tmp_path / "data", "--model", tiny_folder, "--vector", tmp_path / "vector"]
    command += [part for spec in specs for part in ("--defense", spec)]
    command += ["--max-new-tokens", 4, "--max-unscored", 1, "--out", tmp_path / "run"]
    assert davsp(*command) == 0
    shown = capsys.readouterr().out
    assert "Prompt tokens" in shown and "ECSO + DAVSP, adaptive" in shown
    assert "What an answer takes" in (tmp_path / "run" / "report.html").read_text()
    rates = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    calls = {r["defense"]: r["value"] for r in rates if r["metric"] == "calls"}
    assert list(calls) == names and calls["none"] == calls["intervention:2"] == 1 < calls["ecso-adaptive+davsp"] <= 3
    answers = (tmp_path / "run" / "responses.jsonl").read_bytes()
    assert all(json.loads(line)["projection"] is not None for line in answers.splitlines())
    assert davsp(*command) == 0 and (tmp_path / "run" / "responses.jsonl").read_bytes() == answers
    remote = ["--engine", "openai", "--base-url", "http://127.0.0.1:9/v1", "--api-model", "m"]
    assert davsp("eval", "--queries", tmp_path / "data", "--defense", "intervention:2", *remote) == 2
    assert "needs --vector" in capsys.readouterr().err
