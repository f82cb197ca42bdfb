"""The paper's tables: where their cells come from, how they are written, which claims hold, and a whole small run."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from command import run as davsp
from davsp import cli, embedded
from davsp.cli import reproduce
from davsp.defenses.adashield_a import RefineSettings
from davsp.defenses.adashield_s import DAVSP
from davsp.defenses.ecso import PUBLISHED
from davsp.embedded import recipes
from davsp.embedded.ecso_templates import TEMPLATES
from davsp.errors import DavspError
from davsp.evaluation import Evaluation
from davsp.experiments.paper import baselines, claims, run, tables, write
from davsp.experiments.paper.plan import dry
from davsp.experiments.stages import Stages
from davsp.judges import keyword
from davsp.judges.keyword import AGREEMENT
from davsp.prompts import VisualSafetyPrompt
from davsp.query import Response, Verdict

SMALL = {"vector": 10, "sweep": 6, "train": 96, "harm": 4, "utility": 1, "mme": 2, "llava_bench": 2}


def row(defense: str, benchmark: str, metric: str, value: float | None, split: str = "total") -> dict:
    spread = (None, None) if value is None else (value - 0.02, value + 0.02)
    head = {"model": "m", "defense": defense, "benchmark": benchmark, "split": split, "metric": metric}
    return head | {"value": value, "low": spread[0], "high": spread[1], "n": 50}


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


@pytest.mark.parametrize(("canvas", "padding"), [(192, 16), (168, 14), (84, 7)])
def test_a_border_on_another_canvas_keeps_its_colours_and_its_share(canvas, padding):
    border = VisualSafetyPrompt.create(168, 14, "white", text="look")
    border.delta[0] *= 0.5  # half red everywhere on the border
    other = border.resized(canvas)
    assert (other.canvas, other.padding, other.text) == (canvas, padding, "look")
    on = other.mask[0] > 0
    torch.testing.assert_close(other.delta[0][on], torch.full((int(on.sum()),), 0.5))  # no zeros of the inside mixed in
    torch.testing.assert_close(other.delta[1][on], torch.ones(int(on.sum())))
    assert not other.delta[:, ~on].any()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(["transfer"], id="one table"),
        pytest.param(list(tables.TABLES), id="all tables", marks=pytest.mark.slow),
    ],
)
def made(request, tmp_path_factory):
    """Folder, the run as a function of the tables' names, what it gave, its kit, the names."""
    out, whole = tmp_path_factory.mktemp("reproduce"), len(request.param) > 1
    sizes = SMALL if whole else SMALL | {"train": 12, "harm": 1, "mme": 1, "llava_bench": 1}
    changes = {"steps": 2} if whole else {"steps": 2, "batch_size": 4}
    other = VisualSafetyPrompt.create(192, 16, "random", text="x")
    other.config["template"] = "llava_v1"
    other.save_pretrained(out / "other")
    lvlm, data = embedded.load(device_map="cpu"), embedded.protocol(0, **sizes)

    def again(names, **options):
        kit = run.make_kit(
            lvlm, data, out / "mini", text=embedded.SAFETY_TEXT, settings=embedded.SETTINGS.model_copy(update=changes),
            templates=TEMPLATES, console=Console(quiet=True), borrowed={"other": out / "other"},
        )  # fmt: skip
        return run.reproduce(names, kit, **options), kit

    with pytest.MonkeyPatch.context() as small:
        small.setattr(baselines, "NOISE", {"steps": 2, "batch_size": 2})
        small.setitem(baselines.TOKENS, "steps", 1)
        small.setitem(baselines.TOKENS, "candidates", 2)
        small.setitem(baselines.TOKENS, "behaviours", 2)
        found, kit = again(request.param)
        yield out / "mini", again, found, kit, request.param


def test_a_run_writes_its_tables_in_four_formats(made):
    out, _, found, kit, names = made
    assert list(found.tables) == names
    for name in names:
        assert all((out / f"{name}.{kind}").exists() for kind in ("md", "csv", "tex"))
        assert "not run" not in (out / f"{name}.md").read_text()
    assert set(found.tables["transfer"]) == {"none", "adashield-s", "davsp", "davsp-from-other"}
    papers = {name: [c.paper for c in row] for name, row in found.tables["transfer"].items()}
    assert set(papers["davsp"]) == {None} and None not in papers["davsp-from-other"]  # the paper's are transferred
    for name in ("ecso", "ablation"):
        assert name not in names or set(found.tables[name]) == set(tables.TABLES[name].rows)
    assert "resistance" not in names or set(found.tables["resistance"]) == set(tables.METHODS)
    assert {f.stem for f in (out / "plots").iterdir()} == {"rsr-utility", "projections", "confusions"}
    page = (out / "tables.html").read_text()
    assert page.count("<svg") == 3 and page.count("<h2>Table") == len(names)
    assert "http" not in page.replace("http://www.w3.org", "")
    harmful = sum(q.label == "malicious" for q in kit.data.test)
    assert harmful in (4, 16)
    rows = json.loads((out / "rows.json").read_text())["rows"]
    pooled = {r["defense"]: r for r in rows if (r["benchmark"], r["metric"]) == ("pictures", "rsr")}
    assert set(pooled) >= {"none", "davsp"} and all(r["n"] == harmful for r in pooled.values())
    assert "intervention" not in names or "vector-added" in pooled
    safety = {r["defense"]: r for r in rows if (r["benchmark"], r["metric"]) == ("mm_safetybench", "rsr")}
    assert safety and all(r["n"] == harmful * 3 / 4 for r in safety.values())


def test_a_second_run_answers_and_trains_nothing(made, monkeypatch):
    out, again, first, _, names = made
    monkeypatch.setattr("davsp.lvlm.base.LVLM.completions", lambda *a, **k: pytest.fail("it answered again"))
    monkeypatch.setattr("davsp.experiments.stages.train", lambda *a, **k: pytest.fail("it trained again"))
    name = "resistance" if "resistance" in names else names[0]
    before = (out / f"{name}.csv").read_text()
    second = again([name])[0]
    assert second.tables == first.tables  # one table asked for again leaves the answers of the others where they are
    assert (out / f"{name}.csv").read_text() == before


def test_the_transferred_border_stands_resized_before_the_models_own_text(made):
    out, *_ = made
    told = json.loads((out / "run.json").read_text())["defenses"]["davsp-from-other"]
    assert told["padding"] == 14 and told["text"] == embedded.SAFETY_TEXT
    for table in ("transfer.md", "tables.html"):
        said = "davsp-from-other: its border was trained under the template llava_v1; here it is asked by checkpoint"
        assert said in (out / table).read_text()


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


def test_sweeps_train_what_they_say_and_nothing_else_differs(made, monkeypatch):
    """A border a value; the given setting reaches the training, all others are the table's."""
    from davsp.experiments.paper.sweeps import SWEEPS, sweep

    out, _, _, kit, names = made
    seen = {}
    for name, (_, values) in SWEEPS.items():
        for value, changed in values(kit).items():
            base, now = kit.settings.model_dump(), changed.settings.model_dump()
            other = {k for k in base if base[k] != now[k]}
            other |= {k for k in ("padding", "text") if getattr(kit, k) != getattr(changed, k)}
            other |= {"data"} if changed.data is not kit.data else set()
            seen.setdefault(name, set()).update(other)
            assert len(other) <= 1, (name, value)
    assert seen == {
        "padding": {"padding"}, "layer": {"layer"}, "lam": {"lam"}, "margins": {"mu_plus"}, "data": {"data"},
        "steps": {"steps"}, "text": {"text"},
    }  # fmt: skip
    assert list(SWEEPS["padding"][1](kit)) == ["4", "7", "10", "14", "21", "28"]

    records = sweep(["text"], kit, out / "sweeps", console=Console(quiet=True))
    assert [(r["sweep"], r["value"]) for r in records] == [("none", ""), ("text", "with"), ("text", "without")]
    assert all(r["rsr"]["n"] == sum(q.label == "malicious" for q in kit.data.test) for r in records)
    assert "| text | without | " in (out / "sweeps" / "sweeps.md").read_text()
    assert (out / "sweeps" / "text.svg").read_text().startswith("<svg")
    with pytest.raises(DavspError, match="choose padding, layer"):
        sweep(["size"], kit, out / "sweeps")
    long = replace(kit.data.test[0], id="long", question="red " * 2000)
    monkeypatch.setattr("davsp.experiments.paper.sweeps.trained_prompt", lambda *a, **k: pytest.fail("it trained"))
    with pytest.raises(DavspError, match="'long' cannot be asked under none: prompt and answer take"):
        sweep(["steps"], replace(kit, data=replace(kit.data, test=[*kit.data.test, long])), out / "other")
    monkeypatch.undo()

    if len(names) == 1:
        return
    monkeypatch.setattr("davsp.experiments.paper.sweeps.LAMBDAS", (0.0, 1.0))
    both = sweep(["lam"], kit, out / "sweeps", console=Console(quiet=True))
    assert {(r["sweep"], r["value"]) for r in both} == {
        ("lam", "0"),
        ("lam", "1"),
        *((r["sweep"], r["value"]) for r in records),
    }


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


@pytest.mark.parametrize("shipped", [True, False])
def test_a_pool_starts_from_the_text_of_the_table_in_the_words_of_the_model(made, shipped, monkeypatch):
    *_, kit, _ = made
    calls = []

    def stop(kit, name, inputs, make, load):
        calls.append(inputs)
        raise DavspError("enough")

    monkeypatch.setattr(baselines, "_once", stop)
    with pytest.raises(DavspError, match="enough"):
        baselines.adashield_a(replace(kit, text="be safe", shipped=shipped))
    recipe = recipes.POOL | {"start": "be safe"} if shipped else {}
    assert calls[0][0] == RefineSettings(**recipe, seed=kit.settings.seed).model_dump()


def test_what_other_models_lack_is_left_out_and_said(made):
    """UniGuard's corpus and AdaShield-A's defender are the user's; without them the rows are not run, and the table says so."""
    from davsp.experiments.paper.methods import lacking

    out, _, _, kit, _ = made
    without = lacking(replace(kit, shipped=False))
    assert set(without) == {"uniguard", "adashield-a"} and lacking(kit) == {}
    assert set(lacking(replace(kit, shipped=False, corpus=["x"]))) == {"adashield-a"}
    assert AGREEMENT in run._notes(replace(kit, shipped=False), keyword, [], {})
    assert AGREEMENT not in run._notes(kit, keyword, [], {})
    rows = [row("none", "sd", "rsr", 0.5), row("none", "utility", "accuracy", 0.9)]
    missing = without | dict.fromkeys(("pat", "esiii", "davsp", "adashield-s"), "x")
    answers = [Response(q.id, "none", "no") for q in kit.data.test]
    verdicts = [Verdict(q.id, "none", "t", "safe") for q in kit.data.test if q.label == "malicious"]
    found = Evaluation({"none": answers}, {"none": verdicts}, rows)
    short = replace(kit, stages=Stages(out / "short", Console(quiet=True)))
    run._write(["resistance"], rows, short, found, [], missing)
    assert not (out / "short" / "plots" / "projections.svg").exists()  # no answer has a projection
    text = (out / "short" / "resistance.md").read_text()
    assert "AdaShield-A, as no defender was given (--defender)" in text and "UniGuard, as no corpus was given" in text
