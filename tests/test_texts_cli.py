"""`davsp train --method pat` and `adashield-a`, and the specs and folders that eval and info take of them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from davsp import LVLM, DavspError, cli
from davsp.benchmarks.custom import save_queries
from davsp.cli import texts
from davsp.cli.defenses import rows
from davsp.defenses import PAT, AdaShieldA
from davsp.defenses.adashield_a import refine
from davsp.defenses.adashield_a.defender import ChatDefender
from davsp.defenses.adashield_a.features import LVLMEncoder
from davsp.defenses.adashield_a.pool import CONFIG as POOL
from davsp.defenses.adashield_a.pool import Pool, PoolConfig, PoolRow, keys_hash
from davsp.defenses.adashield_s import DAVSP
from davsp.defenses.pat.defense import CONFIG, PUBLISHED
from davsp.embedded import SAFETY_TEXT
from davsp.embedded.phrases import PhraseDefender
from tiny import queries

SETS = ("length=3", "attack_length=2", "start=please", "top_k=6", "behaviours=2", "target=yes")


def run(*arguments: str | Path) -> int:
    """The exit code of `davsp ARGUMENTS`, run in this process through its entry point."""
    old, sys.argv = sys.argv, ["davsp", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)
    finally:
        sys.argv = old


def test_tokens_are_trained_saved_evaluated_and_shown(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    for label in ("malicious", "benign"):
        save_queries(tmp_path / label, queries(label, 3))
    sets = [part for one in SETS for part in ("--set", one)]
    train = ["train", "--method", "pat", "--model", tiny_folder, "--malicious", tmp_path / "malicious", "--benign",
             tmp_path / "benign", "--text", "be safe", "--refusal", "sorry no", "--steps", "1", "--candidates", "4", *sets]  # fmt: skip
    assert run(*train, "--out", tmp_path / "pat", "--device", "cpu") == 0, capsys.readouterr().err
    made = json.loads((tmp_path / "pat" / CONFIG).read_text())
    assert len(made["control"].split()) == 3 and made["safety_text"] == "be safe"
    assert {name: made["settings"][name] for name in ("steps", "candidates", "length", "refusal")} == {
        "steps": 1, "candidates": 4, "length": 3, "refusal": "sorry no",
    }  # fmt: skip
    given = [
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
        run("eval", "--defense", f"mine={tmp_path / 'pat'}", *given, "--out", tmp_path / "run", "--device", "cpu") == 0
    )
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert made["control"] in json.dumps(said)
    capsys.readouterr()
    assert run("info", tmp_path / "pat") == 0 and made["control"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "pats"], "--method is davsp, uniguard, esiii, pat or adashield-a, not 'pats'"),
        (["--method", "pat", "--padding", "3"], "--padding does not go with --method pat"),
        (["--method", "pat", "--defender", "x"], "--defender does not go with --method pat"),
        (["--method", "pat", "--num-processes", "2"], "--num-processes does not go with --method pat"),
        (["--method", "pat", "--set", "lenght=3"], "--set 'lenght=3' is not known"),
        (["--method", "pat", "--set", "length=0"], "--length '0' is not possible"),
        (["--method", "adashield-a", "--text", "x"], "--text does not go with --method adashield-a"),
        (["--method", "adashield-a", "--steps", "3"], "--steps does not go with --method adashield-a"),
        (["--method", "adashield-a", "--defender", "x"], "--defender writes words that this model lacks"),
        (["--method", "davsp", "--set", "length=3"], "--set does not go with --method davsp"),
        (["--encoder", "x"], "--encoder does not go with --method davsp"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("davsp.cli.train.own_protocol", lambda *_: None)  # drawn in a second
    monkeypatch.setattr("davsp.cli.train.queries_at", lambda *_: [])
    assert run("train", *arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_another_model_needs_a_defender(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    save_queries(tmp_path / "bad", queries("malicious", 3))
    given = [
        "--method",
        "adashield-a",
        "--model",
        tiny_folder,
        "--malicious",
        tmp_path / "bad",
        "--out",
        tmp_path / "out",
    ]
    assert run("train", *given) == 2 and "--defender is missing" in capsys.readouterr().err
    assert run("train", *given, "--defender", "m", "--defender-key-env", "NO_SUCH_KEY") == 2
    assert "NO_SUCH_KEY is empty" in capsys.readouterr().err


@pytest.mark.parametrize("own", [True, False])
def test_a_pool_is_made_by_the_models_defender(
    own: bool, lvlm: LVLM, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar and own features with a model that ships; the server and CLIP that are named with another."""
    used: dict[str, Any] = {}
    keys = torch.eye(2)

    def make(lvlm: LVLM, malicious: Any, defender: Any, encoder: Any, settings: Any, *rest: Any) -> Pool:
        used.update(defender=defender, encoder=encoder, settings=settings)
        done = [PoolRow(query=str(i), question="q", scenario="theft", defense_prompt="please be safe", improvement="why", response="r",
                    init_score=10, final_score=1, iteration=1, validated=1.0) for i in range(2)]  # fmt: skip
        return Pool(
            PoolConfig(encoder={"kind": "own"}, defender=defender.describe(), keys=keys_hash(keys), rows=done), keys
        )

    monkeypatch.setattr("davsp.defenses.adashield_a.make_pool", make)
    monkeypatch.setattr("davsp.defenses.adashield_a.features.ClipEncoder", lambda name, **_: f"clip {name}")
    monkeypatch.setattr(texts, "is_embedded", lambda model: own)
    server = {} if own else {"defender": "vicuna", "defender_url": "http://127.0.0.1:1/v1", "encoder": "my/clip"}
    asked = texts.Asked(None, None, ["beta=none", "rounds=2"], {}, **{  # type: ignore[arg-type]
        "defender": None, "defender_url": None, "defender_key": None, "encoder": None, **server,
    })  # fmt: skip
    texts.train("adashield-a", asked, lambda: lvlm, [], [], tmp_path, 5, True)
    settings = used["settings"]
    assert (settings.beta, settings.rounds, settings.seed) == (None, 2, 5)
    if own:
        assert isinstance(used["defender"], PhraseDefender) and isinstance(used["encoder"], LVLMEncoder)
        assert (settings.start, settings.placement, settings.judge) == (SAFETY_TEXT, "prefix", "keyword")
    else:
        assert isinstance(used["defender"], ChatDefender) and used["encoder"] == "clip my/clip"
        assert (settings.placement, settings.judge) == ("sandwich", "adashield")
    assert ("by a grammar of phrases, not by a model" in capsys.readouterr().err) == own
    assert run("info", tmp_path) == 0 and "theft" in capsys.readouterr().out
    (found,) = rows([f"mine={tmp_path}"], None, None, False).values()
    assert isinstance(found, AdaShieldA) and found.name == "mine" and (tmp_path / POOL).exists()
    assert refine.FILE == "pool-search.json"


def test_specs_of_the_published_strings() -> None:
    found = rows(["pat:vicuna", "pat:vicuna:alone", "pat:transfer"], None, None, False)
    assert [type(one) for one in found.values()] == [PAT] * 3 and list(found) == [one.name for one in found.values()]
    assert [one.text for one in found.values()] == [DAVSP, "", DAVSP]  # type: ignore[attr-defined]
    assert found["pat:transfer"].control == PUBLISHED["transfer"]  # type: ignore[attr-defined]
    assert rows(["pat:vicuna"], None, None, True, mini=True)["pat:vicuna"].text == SAFETY_TEXT  # type: ignore[attr-defined]
    for wrong in ("pat", "pat:gpt", "pat:vicuna:bare", "pat:"):
        with pytest.raises(DavspError):
            rows([wrong], None, None, False)
