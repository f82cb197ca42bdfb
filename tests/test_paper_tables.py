"""The paper's tables and claims beside our figures: cells, formats, verdicts."""

import csv
import io

import pytest

from davsp.errors import DavspError
from davsp.experiments.paper import claims, tables, write
from paper_rows import row


def test_the_papers_figures_are_whole():
    """Every row and column of every table is in paper.json, but for what the paper leaves out."""
    paper = tables.paper()
    assert set(paper) == set(tables.TABLES)
    for name, table in tables.TABLES.items():
        for model, rows in paper[name].items():
            assert set(rows) == set(table.rows), (name, model)
            columns = {column.name for column in table.columns}
            assert all(set(figures) <= columns for figures in rows.values()), (name, model)
    assert paper["resistance"]["LLaVA-1.5-13B"]["davsp"]["figstep"] == 84.2
    assert paper["utility"]["Qwen2-VL-7B-Instruct"]["none"]["mme"] == 2288
    assert paper["ecso"]["LLaVA-1.5-13B"]["ecso+davsp"]["figstep"] == 94.2


def test_a_cell_is_the_row_of_metrics_json_beside_the_papers():
    rows = [row("none", "sd", "rsr", 0.8), row("davsp", "sd", "rsr", 0.975), row("davsp", "figstep", "rsr", None)]
    found = tables.cells(tables.TABLES["resistance"], rows, "LLaVA-1.5-13B")
    assert list(found) == ["none", "davsp"]
    cell = found["davsp"][1]
    assert (cell.value, cell.low, cell.high, cell.n, cell.paper) == pytest.approx((97.5, 95.5, 99.5, 50, 98.45))
    assert cell.difference == pytest.approx(-0.95)
    assert found["davsp"][3].value is None and found["davsp"][3].paper == 84.2
    with pytest.raises(DavspError, match="none of additive-answer"):
        tables.cells(tables.TABLES["ablation"], [row("none", "sd", "rsr", 0.8)], "LLaVA-1.5-13B")


def test_points_of_mme_are_never_compared_with_a_share_of_right_answers():
    table = tables.TABLES["utility"]
    at = [column.name for column in table.columns].index("mme")
    share = tables.cells(table, [row("none", "mme", "accuracy", 0.9)], "LLaVA-1.5-13B")["none"][at]
    assert (share.value, share.paper) == (90.0, None)
    points = tables.cells(table, [row("none", "mme", "score_official", 1700.0)], "LLaVA-1.5-13B")["none"][at]
    assert (points.value, points.paper, points.difference) == (1700.0, 1818.0, -118.0)


@pytest.mark.parametrize(
    ("table", "model", "family", "theirs"),
    [
        ("resistance", "llava-hf/llava-1.5-13b-hf", "llava", "LLaVA-1.5-13B"),
        ("transfer", "llava-hf/llava-1.5-7b-hf", "llava", "LLaVA-1.5-7B"),
        ("resistance", "Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl", "Qwen2-VL-7B-Instruct"),
        ("resistance", "davsp-mini-qwen", "qwen2_vl", "Qwen2-VL-7B-Instruct"),
        ("ablation", "davsp-mini-qwen", "qwen2_vl", "LLaVA-1.5-13B"),
    ],
)
def test_beside_which_of_the_papers_models_a_table_stands(table, model, family, theirs):
    assert tables.paper_model(table, model, family) == theirs


def test_the_formats_say_the_same():
    rows = [
        row(d, b, "rsr", v) for d, v in (("none", 0.5), ("davsp", 0.9)) for b in ("sd_typo", "sd", "typo", "figstep")
    ]
    table = tables.TABLES["resistance"]
    found = tables.cells(table, rows, "LLaVA-1.5-13B")
    text = write.markdown(table, found, "my_model", "LLaVA-1.5-13B", ["a note"])
    assert "| DAVSP | 90.0 [88.0, 92.0] (98.72, −8.7) |" in text and text.endswith("- a note\n")
    lines = list(csv.DictReader(io.StringIO(write.tidy(table, found, "my_model", "LLaVA-1.5-13B"))))
    line = next(x for x in lines if (x["defense"], x["column"]) == ("davsp", "figstep"))
    assert float(line["value"]) == pytest.approx(90) and float(line["paper"]) == 84.2 and line["n"] == "50"
    tex = write.latex(table, found, "my_model", "LLaVA-1.5-13B")
    assert r"my\_model" in tex and r"\textbf{90.0 [88.0, 92.0]} {\color{gray}98.72}" in tex
    assert tex.count(r"\textbf") == 4 and "No Defense & 50.0" in tex


def test_claims_follow_the_figures_and_say_what_is_missing():
    rows = [
        row(d, "pictures", "rsr", v)
        for d, v in (("none", 0.5), ("adashield-s", 0.7), ("uniguard", 0.8), ("davsp", 0.95))
    ]
    rows += [
        row(d, "utility", "accuracy", v)
        for d, v in (("none", 0.9), ("adashield-s", 0.89), ("uniguard", 0.7), ("davsp", 0.85))
    ]
    rows += [row("vector-added", "pictures", "rsr", 0.4), row("davsp-from-other", "pictures", "rsr", 0.7)]
    said = {c.text: c for c in claims.claims(rows)}
    verdict = {text: c.verdict for text, c in said.items()}
    assert verdict["DAVSP resists more than every other method"] == claims.HOLDS
    assert "UniGuard 80.0 [78.0, 82.0]" in said["DAVSP resists more than every other method"].evidence
    assert verdict["no method is better in both RSR and utility"] == claims.HOLDS
    assert verdict["the projection moved up at run time raises RSR"] == claims.FAILS
    assert verdict["a border trained on other helps here, beyond the text alone"] == claims.HOLDS  # as much
    missing = [text for text, v in verdict.items() if v == claims.UNTESTED]
    assert len(missing) == 8 and all("not evaluated" in said[text].evidence for text in missing)
    rows[2] = row("uniguard", "pictures", "rsr", 0.96)
    rows[6] = row("uniguard", "utility", "accuracy", 0.88)
    verdict = {c.text: c.verdict for c in claims.claims(rows)}
    assert verdict["DAVSP resists more than every other method"] == claims.FAILS
    assert verdict["no method is better in both RSR and utility"] == claims.FAILS


def test_differences_within_both_intervals_are_called_noise():
    near = claims._pair(row("a", "x", "rsr", 0.91), row("b", "x", "rsr", 0.9), "b")
    assert near.endswith("(within the noise)")
    assert "noise" not in claims._pair(row("a", "x", "rsr", 0.99), row("b", "x", "rsr", 0.9), "b")
