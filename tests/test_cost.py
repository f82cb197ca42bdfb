"""What an answer takes: in the rows, in the table and on the page."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from davsp import LVLM, Response, metrics
from davsp.metrics import latency
from davsp.query import COST
from davsp.report import Report
from davsp.report.cells import costs
from davsp.report.html import render
from davsp.report.terminal import print_costs
from test_evaluation import DEFENSES, run, texts


def test_what_an_answer_takes() -> None:
    """Beside No Defense; nothing where it is not known."""
    rows = metrics.cost_rows("m", {
        "none": [Response("1", "none", "", None, 1.0, 1, 20, 16)], "ecso": [Response("1", "ecso", "", None, 4.5, 4, 95, 48)],
        "old": [Response("1", "old", "")],
    })  # fmt: skip
    times = {"none": 1.0, "ecso": 4.5}
    expected = [
        ("none", ["1.00", "20.0", "16.0", "×1.00"]),
        ("ecso", ["4.00 (+3.00)", "95.0 (+75.0)", "48.0 (+32.0)", "×4.50"]),
    ]
    assert costs(rows, times) == expected and costs([], times) == []
    page = render(Report(rows, "m", latency=times))
    assert "What an answer takes" in page and "95.0 (+75.0)" in page and "×4.50" in page
    assert "What an answer takes" not in render(Report([], "m"))
    console = Console(record=True, width=100, file=io.StringIO())
    print_costs(console, rows, times)
    assert re.search(r"ECSO.*4\.00 \(\+3\.00\).*×4\.50", console.export_text())


def test_cost_is_in_the_rows(lvlm: LVLM, tmp_path: Path) -> None:
    """Means, and what a defense adds; an old file without these fields loads, stays as it is, and has no such rows."""
    evaluation = run(lvlm, tmp_path)
    cost = {(r["defense"], r["metric"]): r["value"] for r in evaluation.rows if r["benchmark"] == "cost"}
    tokens = {name: [r.prompt_tokens or 0 for r in evaluation.responses[name]] for name in DEFENSES}
    assert cost["none", "calls"] == 1 and cost["safety-text", "calls_difference"] == 0
    assert cost["none", "prompt_tokens"] == pytest.approx(sum(tokens["none"]) / 9)
    assert cost["safety-text", "prompt_tokens_difference"] == pytest.approx(3)  # please be safe
    assert cost["none", "image_tokens"] == pytest.approx(8 / 9 * lvlm.tokens_per_image)
    assert ("none", "calls_difference") not in cost
    path = tmp_path / "responses.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    old = [{key: value for key, value in line.items() if key not in (*COST, "finish")} for line in lines]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in old))
    before = path.read_bytes()
    again = run(lvlm, tmp_path)
    assert path.read_bytes() == before and texts(again) == texts(evaluation)
    assert again.rows == [r for r in evaluation.rows if r["benchmark"] != "cost"]
    assert latency({"none": [Response("1", "none", "", None, 2.0)], "x": [Response("1", "x", "", None, 3.0)]}) == {
        "none": 1.0,
        "x": 1.5,
    }
    assert latency({"x": [Response("1", "x", "", None, 3.0)]}) == {}
