"""One change for all pictures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attacked import QUICK, TARGET, border, others
from davsp import LVLM
from davsp.attacks import AttackSettings, attack, universal
from davsp.attacks.run import AttackResult
from davsp.attacks.surface import surfaces
from davsp.defenses import NoDefense
from davsp.errors import DavspError
from davsp.query import Query
from davsp.runtime.files import save_tensors
from tiny import picture, queries


def test_universal_is_one_change_that_lowers_the_loss_and_goes_on_after_a_kill(
    lvlm: LVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, defenses = queries("malicious", 4), {"davsp": border()}
    settings = AttackSettings(attacks=("universal",), eps=(32,), **QUICK | {"universal_steps": 30})

    def run(out: Path) -> AttackResult:
        return attack(lvlm, defenses, data, out, settings, training=others(5), max_new_tokens=2)[-1]

    whole = run(tmp_path / "whole")
    clean = torch.cat([s.pictures for _, s in surfaces(lvlm, border(), data, TARGET)])
    sent = torch.cat([s.pictures for _, s in surfaces(lvlm, border(), whole.queries, TARGET)])
    moves, free = sent - clean, ((clean > 32 / 255) & (clean < 1 - 32 / 255)).all(0)
    assert 0 < float(moves.abs().max()) <= 32 / 255 + 1e-6
    assert bool(free.any()) and bool(((moves[:, free] - moves[:1, free]).abs() < 1.01 / 255).all())  # but for rounding
    assert sum(r["curve"][1] for r in whole.records) < sum(r["curve"][0] for r in whole.records)

    calls = 0

    def killed(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 25:  # behind the checkpoint of step 20
            raise RuntimeError("killed")
        return gradient(*args)

    gradient = universal._gradient
    monkeypatch.setattr(universal, "_gradient", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "again")
    monkeypatch.setattr(universal, "_gradient", gradient)
    assert [r["sha256"] for r in run(tmp_path / "again").records] == [r["sha256"] for r in whole.records]
    with pytest.raises(DavspError, match=r"universal-32/attack\.json is of .* \(training\)"):
        attack(lvlm, defenses, data, tmp_path / "again", settings, training=others(4), max_new_tokens=2)
    save_tensors(tmp_path / "again" / "davsp" / "universal-32" / "change.safetensors", {"x": torch.zeros(1)})
    (tmp_path / "again" / "davsp" / "universal-32" / "found.jsonl").unlink()
    with pytest.raises(DavspError, match=r"attack\.json|holds no universal change"):
        run(tmp_path / "again")


def test_processes_share_the_rows_of_a_universal_step(
    lvlm: LVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two takes one of three rows; of one row it takes none, and is there for the sum all the same."""
    rows, sums, gradient = list[int](), list[Tensor](), universal._gradient

    def counted(surface: Any, delta: Tensor) -> Tensor:
        rows.append(len(surface.pictures))
        return gradient(surface, delta)

    monkeypatch.setattr(universal, "_gradient", counted)
    for name, value in {"rank": lambda: 1, "processes": lambda: 2, "same": lambda *_: None}.items():
        monkeypatch.setattr(universal.parallel, name, value)
    monkeypatch.setattr(universal.parallel, "total", lambda own: sums.append(own) or own)
    for size in (3, 1):
        universal.train_universal(
            lvlm, border(), others(5), TARGET, 0.1, steps=1, batch_size=size, seed=0, file=tmp_path / "x"
        )
    assert rows == [1] and bool(sums[0].any()) and not bool(sums[1].any())


def test_universal_wants_one_size(tmp_path: Path) -> None:
    from davsp import embedded

    qwen = embedded.load("davsp-mini-qwen", device_map="cpu")
    data = [Query(str(i), "what is this ?", "malicious", "test", image=picture(i, size)) for i, size in enumerate([(56, 84), (84, 56)])]  # fmt: skip
    with pytest.raises(DavspError, match="under none pictures reach the model in several sizes"):
        universal.train_universal(
            qwen, NoDefense(), data, "sure", 0.1, steps=1, batch_size=2, seed=0, file=tmp_path / "x"
        )


@pytest.mark.parametrize(
    ("training", "says"),
    [
        (queries("malicious", 3)[2:], "may not be trained on pictures that are attacked, as that of malicious-2"),
        (queries("benign", 1), "is trained on malicious queries"),
        ([replace(others(1)[0], turns=(("user", "a"), ("assistant", "b")))], "an attack takes single questions"),
    ],
)
def test_universal_is_trained_on_other_malicious_pictures(lvlm: LVLM, tmp_path: Path, training: Any, says: str) -> None:
    settings = AttackSettings(attacks=("universal",), **QUICK)
    with pytest.raises(DavspError, match=says):
        attack(lvlm, {"none": NoDefense()}, queries("malicious", 3), tmp_path / "out", settings, training=training)
