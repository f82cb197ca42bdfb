"""The Python in the pages runs: README's ten lines, the steps of docs/concepts.md, and the examples to write one's own from.

On few queries and two steps of training, as what is looked at here is that the code fits the package.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from davsp import LVLM
    from davsp.embedded.data import Protocol

ROOT = Path(__file__).parents[1]
SMALL = {"vector": 4, "sweep": 4, "train": 4, "harm": 1, "utility": 1, "mme": 1, "llava_bench": 1}


@pytest.fixture(autouse=True)
def small(mini: "LVLM", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder of its own, on a small draw of the embedded queries, with two steps of four rows."""
    from davsp import embedded

    protocol, settings = embedded.protocol, embedded.SETTINGS

    def few(seed: int = 0, **sizes: int) -> "Protocol":
        """Of the test two malicious queries and a benign one."""
        whole = protocol(seed, **SMALL)
        chosen = [q for q in whole.test if q.benchmark in ("typo", "sd_typo", "llava_bench")]
        return replace(whole, test=chosen)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embedded, "load", lambda: mini)
    monkeypatch.setattr(embedded, "protocol", few, raising=False)
    monkeypatch.setattr(embedded, "SETTINGS", settings.model_copy(update={"steps": 2, "batch_size": 4}), raising=False)


def run(page: str) -> dict[str, Any]:
    """All Python of a page, top to bottom; the names that it leaves."""
    text = (ROOT / page).read_text()
    names: dict[str, Any] = {}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], page, "exec"), names)
    return names


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("README.md")
    assert names["picture"].size == (168, 168) and len(capsys.readouterr().out.strip()) > 10
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1 and len([line for line in code[0].splitlines() if line]) == 10


def test_concepts(capsys: pytest.CaptureFixture[str]) -> None:
    """Each step prints what it says; what was measured is what was saved."""
    from davsp import VisualSafetyPrompt

    names = run("docs/concepts.md")
    printed = capsys.readouterr().out
    assert re.search(r"^malicious \| .* \| ", printed) and re.search(r"^layer \d, margins ", printed, re.MULTILINE)
    assert re.search(r"^projection [+-]\d", printed, re.MULTILINE) and "(168, 168)" in printed
    assert re.findall(r"^(\S+) sd_typo ", printed, re.MULTILINE) == ["none", "safety-text", "davsp"]
    saved = VisualSafetyPrompt.from_pretrained("out/concepts/prompt")
    assert saved.pixels_sha256() == names["defenses"]["davsp"].prompt.pixels_sha256() != names["border"].pixels_sha256()


def test_add_a_defense() -> None:
    names = run("docs/add-a-defense.md")
    assert all(query.question.isupper() for query in names["Shout"]().prepare(names["test"]))
    assert {row["defense"] for row in names["evaluation"].rows} == {"none", "shout"}


def test_attack(capsys: pytest.CaptureFixture[str]) -> None:
    run("docs/attack.md")
    assert re.findall(r"^(as it is|blurred) [\d.]+$", capsys.readouterr().out, re.MULTILINE) == ["as it is", "blurred"]
