"""A run of every table, small: what it writes, goes on with, trains for its sweeps and leaves out."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from davsp import embedded
from davsp.defenses.adashield_a import RefineSettings
from davsp.embedded import recipes
from davsp.embedded.ecso_templates import TEMPLATES
from davsp.errors import DavspError
from davsp.evaluation import Evaluation
from davsp.experiments.paper import baselines, claims, run, tables
from davsp.experiments.stages import Stages
from davsp.judges import keyword
from davsp.judges.keyword import AGREEMENT
from davsp.prompts import VisualSafetyPrompt
from davsp.query import Response, Verdict
from paper_rows import SMALL, row


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


def test_what_deep_alignment_left_beside_the_tables_stands_among_the_claims(made, monkeypatch):
    out, again, _, _, names = made
    asked, claim = [], claims.Claim("it is deep", "said in words", claims.HOLDS, "some figures")
    monkeypatch.setattr(run, "deeper", lambda folder: asked.append(folder) or [claim])
    again([names[0]])
    assert asked == [out.parents[1] / "deep-alignment" / out.name]
    assert "| it is deep | said in words | **holds** | some figures |" in (out / "claims.md").read_text()
    assert "it is deep" in (out / "tables.html").read_text()


def test_the_transferred_border_stands_resized_before_the_models_own_text(made):
    out, *_ = made
    told = json.loads((out / "run.json").read_text())["defenses"]["davsp-from-other"]
    assert told["padding"] == 14 and told["text"] == embedded.SAFETY_TEXT
    for table in ("transfer.md", "tables.html"):
        said = "davsp-from-other: its border was trained under the template llava_v1; here it is asked by checkpoint"
        assert said in (out / table).read_text()


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
