"""`davsp baseline pat` and `adashield-a`, and the specs and folders that eval and info take of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from command import run
from davsp import LVLM, DavspError
from davsp.benchmarks.custom import save_queries
from davsp.cli import baseline
from davsp.cli.defenses import rows
from davsp.defenses import PAT, AdaShieldA
from davsp.defenses.adashield_a import RefineSettings, refine
from davsp.defenses.adashield_a.defender import ChatDefender
from davsp.defenses.adashield_a.features import LVLMEncoder
from davsp.defenses.adashield_a.pool import CONFIG as POOL
from davsp.defenses.adashield_a.pool import Pool, PoolConfig, PoolRow, keys_hash
from davsp.defenses.adashield_s import DAVSP
from davsp.defenses.pat import PatSettings
from davsp.defenses.pat.defense import CONFIG, PUBLISHED
from davsp.embedded import SAFETY_TEXT, recipes
from davsp.embedded.phrases import PhraseDefender
from davsp.training.settings import SentenceSettings
from tiny import queries

URL = "http://127.0.0.1:1/v1"
SETS = ("length=3", "attack_length=2", "start=please", "top_k=6", "behaviours=2", "target=yes")


def test_tokens_are_trained_saved_evaluated_and_shown(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    for label in ("malicious", "benign"):
        save_queries(tmp_path / label, queries(label, 3))
    sets = [part for one in SETS for part in ("--set", one)]
    train = ["baseline", "pat", "--model", tiny_folder, "--malicious", tmp_path / "malicious", "--benign",
             tmp_path / "benign", "--text", "be safe", "--refusal", "sorry no", "--steps", "1", "--candidates", "4", *sets]  # fmt: skip
    assert run(*train, "--out", tmp_path / "pat", "--device", "cpu") == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "pat" / CONFIG).read_text())
    assert len(config["control"].split()) == 3 and config["safety_text"] == "be safe"
    assert {name: config["settings"][name] for name in ("steps", "candidates", "length", "refusal")} == {
        "steps": 1, "candidates": 4, "length": 3, "refusal": "sorry no",
    }  # fmt: skip
    options = [
        "--model",
        tiny_folder,
        "--queries",
        tmp_path / "malicious",
        "--max-new-tokens",
        "2",
        "--max-unscored",
        "1",
    ]
    assert (
        run("eval", "--defense", f"mine={tmp_path / 'pat'}", *options, "--out", tmp_path / "run", "--device", "cpu")
        == 0
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert config["control"] in json.dumps(record)
    capsys.readouterr()
    assert run("info", tmp_path / "pat") == 0 and config["control"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pat", "--set", "lenght=3"], "--set 'lenght=3' is not known"),
        (["pat", "--set", "length=0"], "--length '0' is not possible"),
        (["pat", "--malicious", "gone"], "--benign is missing"),
        (["pat", "--malicious", "gone", "--split", "s.json"], "--split takes the place of --malicious and --benign"),
        (["adashield-a", "--defender", "x"], "--defender writes words that this model lacks"),
        (["adashield-a", "--defender-url", "http://127.0.0.1:1/v1"], "--defender-url and --defender-key-env go with"),
        (["adashield-a", "--malicious", "gone"], "there are no queries at gone"),
    ],
)
def test_wrong_values_are_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("davsp.cli.baseline.load_lvlm", lambda model: None)
    assert run("baseline", *arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


OPTIONS = {
    "train": ["--corpus", "--set", "--encoder", "--defender", "--text-part", "--with-text", "--candidates"],
    "baseline uniguard": ["--vector", "--kind", "--layer", "--benchmark", "--malicious", "--set", "--defender"],
    "baseline esiii": ["--text-part", "--with-text", "--sweeps", "--vector", "--padding", "--split"],
    "baseline pat": ["--padding", "--defender", "--encoder", "--corpus", "--lam"],
    "baseline adashield-a": ["--text", "--steps", "--benign", "--eps", "--refusal", "--num-processes"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_an_option_of_another_method_is_unknown(
    command: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for option in OPTIONS[command]:
        assert run(*command.split(), option, "1") == 2
        assert f"No such option: {option}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_old_form_says_the_new_one_and_passes_its_options_on(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("train", "--method", "pats") == 2
    assert "--method is davsp, uniguard, esiii, pat or adashield-a, not 'pats'" in capsys.readouterr().err
    assert run("train", "--method", "pat", "--set", "lenght=3", "--out", "a b") == 2
    note, error = capsys.readouterr().err.splitlines()
    assert "`davsp train --method pat` is now `davsp baseline pat --set lenght=3 --out 'a b'`" in note
    assert "--set 'lenght=3' is not known" in error
    for old, new in (
        (["train", "--method=esiii", "--eps", "0.1"], ["baseline", "esiii", "--eps", "0.1", "--out", "out/prompt"]),
        (["train", "--steps", "2", "--method", "davsp"], ["train", "--steps", "2", "--out", "out/prompt"]),
        (["train", "--steps", "2"], ["train", "--steps", "2"]),
        (["eval", "--method", "pat"], ["eval", "--method", "pat"]),
        ([], []),
    ):
        assert baseline.from_train(old) == new


@pytest.mark.parametrize("model", ["davsp-mini-narrow", "other"])
@pytest.mark.parametrize("method", ["uniguard", "esiii", "pat", "adashield-a"])
def test_words_and_budget_follow_the_model(
    method: str, model: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the user's own data a model that ships keeps its text, budget and words; another is as published."""
    calls: list[tuple[Any, ...]] = []

    def stop(*arguments: Any, **options: Any) -> None:
        calls.append((*arguments, *options.values()))
        raise DavspError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("davsp.cli.baseline.load_lvlm", lambda model: SimpleNamespace(device="cpu"))
    for name in ("ClipEncoder", "LVLMEncoder"):
        monkeypatch.setattr(f"davsp.defenses.adashield_a.features.{name}", lambda *arguments, **options: None)
    for name in ("uniguard.train_uniguard", "esiii.train_esiii", "pat.train_pat", "adashield_a.make_pool"):
        monkeypatch.setattr(f"davsp.defenses.{name}", stop)
    for label in ("malicious", "benign"):
        save_queries(tmp_path / label, queries(label, 3))
    (tmp_path / "corpus.txt").write_text("a sentence\n")
    shipped = model != "other"
    options = {
        "uniguard": ["--corpus", "corpus.txt"],
        "esiii": ["--corpus", "corpus.txt"],
        "pat": ["--malicious", "malicious", "--benign", "benign"],
        "adashield-a": ["--malicious", "malicious", *([] if shipped else ["--defender", "m", "--defender-url", URL])],
    }
    assert run("baseline", method, "--model", model, *options[method]) == 2
    assert "enough" in capsys.readouterr().err
    (call,) = calls
    (settings,) = (x for x in call if isinstance(x, (SentenceSettings, PatSettings, RefineSettings)))
    recipe = {"uniguard": recipes.NOISE, "esiii": recipes.NOISE, "pat": recipes.TOKENS, "adashield-a": recipes.POOL}
    assert ({name: getattr(settings, name) for name in recipe[method]} == recipe[method]) == shipped
    if method == "adashield-a":
        assert settings.start == (SAFETY_TEXT if shipped else refine.PUBLISHED)
        assert any(isinstance(x, PhraseDefender) for x in call) == shipped
    else:
        assert (SAFETY_TEXT in call, DAVSP in call) == (shipped, not shipped)


def test_another_model_needs_a_defender(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    save_queries(tmp_path / "bad", queries("malicious", 3))
    command = [
        "baseline",
        "adashield-a",
        "--model",
        tiny_folder,
        "--malicious",
        tmp_path / "bad",
        "--out",
        tmp_path / "out",
    ]
    assert run(*command) == 2 and "--defender is missing" in capsys.readouterr().err
    assert run(*command, "--defender", "m", "--defender-key-env", "NO_SUCH_KEY") == 2
    assert "NO_SUCH_KEY is empty" in capsys.readouterr().err


@pytest.mark.parametrize("shipped", [True, False])
def test_a_pool_is_made_by_the_models_defender(
    shipped: bool, lvlm: LVLM, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar and the model's own features where it ships; the server and CLIP that are named with another."""
    used: dict[str, Any] = {}
    keys = torch.eye(2)

    def make(lvlm: LVLM, malicious: Any, defender: Any, encoder: Any, settings: Any, *rest: Any) -> Pool:
        used.update(defender=defender, encoder=encoder, settings=settings)
        rows = [PoolRow(query=str(i), question="q", scenario="theft", defense_prompt="please be safe", improvement="why", response="r",
                    init_score=10, final_score=1, iteration=1, validated=1.0) for i in range(2)]  # fmt: skip
        return Pool(
            PoolConfig(encoder={"kind": "own"}, defender=defender.describe(), keys=keys_hash(keys), rows=rows), keys
        )

    monkeypatch.setattr("davsp.defenses.adashield_a.make_pool", make)
    monkeypatch.setattr("davsp.defenses.adashield_a.features.ClipEncoder", lambda name, **_: f"clip {name}")
    monkeypatch.setattr(baseline, "is_shipped", lambda model: shipped)
    monkeypatch.setattr(baseline, "load_lvlm", lambda model: lvlm)
    save_queries(tmp_path / "bad", queries("malicious", 2))
    server = ["--defender", "vicuna", "--defender-url", "http://127.0.0.1:1/v1", "--encoder", "my/clip"]
    command = ["baseline", "adashield-a", "--malicious", tmp_path / "bad", "--set", "beta=none", "--set", "rounds=2"]
    assert run(*command, *([] if shipped else server), "--seed", "5", "--out", tmp_path / "pool") == 0
    settings = used["settings"]
    assert (settings.beta, settings.rounds, settings.seed) == (None, 2, 5)
    if shipped:
        assert isinstance(used["defender"], PhraseDefender) and isinstance(used["encoder"], LVLMEncoder)
        assert (settings.start, settings.placement, settings.judge) == (SAFETY_TEXT, "prefix", "keyword")
    else:
        assert isinstance(used["defender"], ChatDefender) and used["encoder"] == "clip my/clip"
        assert (settings.placement, settings.judge) == ("sandwich", "adashield")
    assert ("by a grammar of phrases, not by a model" in capsys.readouterr().err) == shipped
    assert run("info", tmp_path / "pool") == 0 and "theft" in capsys.readouterr().out
    (defense,) = rows([f"mine={tmp_path / 'pool'}"], None, None, False).values()
    assert isinstance(defense, AdaShieldA) and defense.name == "mine" and (tmp_path / "pool" / POOL).exists()
    assert refine.FILE == "pool-search.json"


def test_specs_of_the_published_strings() -> None:
    defenses = rows(["pat:vicuna", "pat:vicuna:alone", "pat:transfer"], None, None, False)
    assert [(type(d), d.name) for d in defenses.values()] == [(PAT, name) for name in defenses]
    assert [d.text for d in defenses.values()] == [DAVSP, "", DAVSP]  # type: ignore[attr-defined]
    assert defenses["pat:transfer"].control == PUBLISHED["transfer"]  # type: ignore[attr-defined]
    assert rows(["pat:vicuna"], None, None, True)["pat:vicuna"].text == SAFETY_TEXT  # type: ignore[attr-defined]
    for wrong in ("pat", "pat:gpt", "pat:vicuna:bare", "pat:"):
        with pytest.raises(DavspError):
            rows([wrong], None, None, False)
