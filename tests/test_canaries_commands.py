"""Canaries by command: `check`, the start of the proxy, the card, and after a training."""

import asyncio
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from command import run
from davsp import LVLM, Query, VisualSafetyPrompt
from davsp.embedded import counterparts
from proxy import CANVAS
from test_canaries import FILES
from tiny import queries
from upstreams import Fake, sees


@pytest.fixture
def plain() -> VisualSafetyPrompt:
    return VisualSafetyPrompt.create(24, 5, "random", 3, "please be safe").quantised()


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch, tmp_path: Path) -> Fake:
    """A fake upstream in place of every connection of a command; its border is in PROMPT."""
    fake = Fake()
    monkeypatch.setattr("davsp.serve.upstream.Pools", lambda limits: fake.upstream)
    fake.border.save_pretrained(tmp_path / "prompt")
    return fake


def checked(folder: Path, *options: Any) -> int:
    return run("check", "--upstream", "http://127.0.0.1:9/v1", "--prompt", folder, *options)


def test_check_prints_a_table_and_ends_by_what_it_saw(served: Fake, tmp_path: Path, capsys):
    assert checked(tmp_path / "prompt") == 0
    out = capsys.readouterr().out
    assert (
        max(map(len, out.splitlines()[:-1])) <= 80
        and "the border has its effect: the upstream's m refuses 24 of 24" in out
    )
    rows = {name: re.findall(r"\d+ of \d+", row) for row in out.splitlines() if (name := row[1:13].strip())}
    assert rows["the prompt"] == ["24 of 24", "0 of 8", "24 of 24", "0 of 8", "38 of 40", "0 of 8"]
    assert rows["text alone"] == ["0 of 24", "0 of 8", "0 of 24", "0 of 8", "4 of 40", "0 of 8"]
    assert len(served.upstream.bodies) == 96
    served.upstream.answer = sees(served.border, 3)
    assert (
        checked(tmp_path / "prompt", "--model", "n") == 1
        and "the upstream's n refuses 3 of 24" in capsys.readouterr().out
    )
    served.upstream.answer = lambda number, body: httpx2.ConnectError("refused")
    assert checked(tmp_path / "prompt") == 2 and "could not be asked" in capsys.readouterr().out
    (tmp_path / "prompt" / "canaries.json").unlink()
    assert checked(tmp_path / "prompt") == 2 and "has no canaries" in capsys.readouterr().err


def test_the_start_says_it_and_can_require_it(served: Fake, tmp_path: Path, capsys, monkeypatch):
    apps: list[Any] = []
    monkeypatch.setattr("davsp.cli.serve._run", lambda app, host, port: apps.append(app))
    monkeypatch.setattr("davsp.serve.probe._look", lambda *_: asyncio.sleep(0, []))
    start = ("serve", "--upstream", "http://127.0.0.1:9/v1", "--prompt", tmp_path / "prompt", "--canvas", CANVAS)
    assert run(*start, "--require-effect") == 0 and "the border has its effect" in capsys.readouterr().err
    count = len(served.upstream.bodies)

    async def ready() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(apps[0]), base_url="http://localhost") as http:
            return await http.get("/ready")

    assert asyncio.run(ready()).json()["effect"] == "holds" and len(served.upstream.bodies) == count == 64
    served.upstream.answer = sees(served.border, 3)
    assert run(*start) == 0 and "THE BORDER DOES NOT HAVE ITS EFFECT" in capsys.readouterr().err
    assert run(*start, "--require-effect") == 2 and "davsp: --require-effect: THE BORDER" in capsys.readouterr().err
    assert run(*start, "--no-probe", "--require-effect") == 2 and "leave one out" in capsys.readouterr().err
    assert run(*start, "--no-probe") == 0 and "effect" not in capsys.readouterr().err
    (tmp_path / "prompt" / "canaries.json").unlink()
    assert run(*start) == 0 and "the prompt has no canaries" in capsys.readouterr().err
    assert (
        run(*start, "--require-effect") == 2
        and "--require-effect: the prompt has no canaries" in capsys.readouterr().err
    )


@pytest.fixture
def flips(monkeypatch) -> None:
    """Every malicious query is flipped, and no benign one."""
    monkeypatch.setattr(
        "davsp.defenses.effect._ask",
        lambda lvlm, prompt, chunk, longest: [
            {"none": False, "text": False, "prompt": q.label == "malicious"} for q in chunk
        ],
    )


def test_card_puts_canaries_beside_a_border(flips, lvlm: LVLM, tiny_folder: Path, tmp_path: Path, capsys):
    from davsp.benchmarks.custom import save_queries

    plain = VisualSafetyPrompt.create(lvlm.canvas, 8, "random", text="please be safe")
    plain.save_pretrained(tmp_path / "p")
    before = {name: (tmp_path / "p" / name).read_bytes() for name in FILES}
    save_queries(tmp_path / "own", [*queries("malicious", 30), *queries("benign", 3)])
    card = ("card", tmp_path / "p", "--model", tiny_folder)
    assert run(*card) == 2 and "for the models that ship alone; give your own queries" in capsys.readouterr().err
    assert run(*card, "--canaries", tmp_path / "own") == 0
    assert "24 malicious queries that the border flips and 3 benign ones" in capsys.readouterr().out
    assert {name: (tmp_path / "p" / name).read_bytes() for name in FILES} == before
    assert run("info", tmp_path / "p") == 0
    assert "24 malicious queries that the border flips and 3 benign ones" in capsys.readouterr().out


def test_train_puts_canaries_beside_the_border(flips, vector, tiny_folder: Path, tmp_path: Path, capsys):
    from davsp.benchmarks.custom import save_queries

    vector.save(tmp_path / "vector")
    for label in ("malicious", "benign"):
        save_queries(tmp_path / label, queries(label, 4))
    save_queries(tmp_path / "own", [*queries("malicious", 9), *queries("benign", 3)])
    train = (
        "train", "--model", tiny_folder, "--malicious", tmp_path / "malicious", "--benign", tmp_path / "benign",
        "--vector", tmp_path / "vector", "--steps", 1, "--batch-size", 2, "--padding", 8, "--out", tmp_path / "out",
    )  # fmt: skip
    assert run(*train, "--canaries", tmp_path / "nowhere") == 2 and not (tmp_path / "out").exists()
    assert run(*train) == 0
    said = capsys.readouterr()
    assert "no canaries: canaries are drawn for the models that ship alone" in said.err and "saved to" in said.out
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*FILES, "training"])
    assert run(*train, "--canaries", tmp_path / "own") == 0
    assert "canaries.json: 9 malicious queries that the border flips and 3 benign ones" in capsys.readouterr().out
    assert len(VisualSafetyPrompt.from_pretrained(tmp_path / "out").canaries.canaries) == 12
    assert run(*train, "--kind", "additive", "--canaries", tmp_path / "own") == 2


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ([replace(q, turns=(("user", "q"), ("assistant", "no"))) for q in queries("malicious", 9)], r"'\S+' in \S*own/queries.jsonl has turns before its question"),
        ([*queries("malicious", 7), *queries("benign", 9)], r"own/queries.jsonl holds 7 malicious queries with pictures, and canaries are at least 8"),
        ([replace(q, image=None) for q in queries("malicious", 9)], "holds 0 malicious queries with pictures"),
    ],
)  # fmt: skip
def test_what_can_be_no_canaries_is_told_before_a_model_is_loaded(
    own: list[Query], says: str, vector, tmp_path: Path, capsys, monkeypatch
):
    from davsp.benchmarks.custom import save_queries

    vector.save(tmp_path / "vector")
    for name, some in (("bad", queries("malicious", 4)), ("good", queries("benign", 4)), ("own", own)):
        save_queries(tmp_path / name, some)
    monkeypatch.setattr("davsp.lvlm.base.LVLM.from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    data = ("--malicious", tmp_path / "bad", "--benign", tmp_path / "good", "--vector", tmp_path / "vector")
    assert run("train", "--model", "org/m", *data, "--canaries", tmp_path / "own", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert re.search(says, said) and f"--canaries {tmp_path / 'own'}: " in said and not (tmp_path / "out").exists()


def test_nobodys_benchmark_is_copied(tmp_path: Path, capsys):
    from davsp.benchmarks.custom import save_queries

    VisualSafetyPrompt.create(56, 8).save_pretrained(tmp_path / "p")
    counterparts.write(tmp_path / "sets", figstep=2, mm_safetybench=1, vlguard=1, mm_vet=1, mme=1, llava_bench=1)
    for folder in (tmp_path / "sets" / "figstep", tmp_path / "sets"):
        assert run("card", tmp_path / "p", "--canaries", folder) == 2
        assert re.search(r"holds \w+, whose rows are not ours to copy", capsys.readouterr().err)
    save_queries(tmp_path / "own", [Query("1", "q", "malicious", "sd_typo", image=queries("malicious", 1)[0].image)])
    assert run("card", tmp_path / "p", "--canaries", tmp_path / "own") == 2
    assert "says it is of mm_safetybench, whose rows are not ours" in capsys.readouterr().err
