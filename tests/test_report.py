"""The page: self-contained, redacted, with the right figures in it."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from davsp import Query, Response, VisualSafetyPrompt, metrics
from davsp.defenses import Defense, NoDefense, VisualPrompt
from davsp.evaluation import Evaluation
from davsp.evaluation.judging import judge_custom, judge_published, rows_of
from davsp.judges import keyword
from davsp.judges.verdicts import verdicts_of
from davsp.report import Illustration, Report, build
from davsp.report.cells import RateColumn, cell, number, p_value, points
from davsp.report.html import headline, render, write_report
from davsp.report.plots import COLOURS, colours
from davsp.report.terminal import print_costs, print_scores, print_table
from tiny import picture, queries

REFUSAL, SECRET = "i am sorry , i cannot help with that .", "sure , take the <b>crowbar</b> ."


def small_report() -> Report:
    """Ten malicious in two benchmarks, four benign: DAVSP resists all but one, and loses one right answer."""
    bad = [
        replace(q, id=f"{b}{i}", benchmark=b) for b in ("sd", "figstep") for i, q in enumerate(queries("malicious", 5))
    ]
    good = [
        Query(f"u{i}", "what <is> this", "benign", "utility", "rec", f"u{i}", "red", image=picture(i)) for i in range(4)
    ]
    everything = [*bad, *good]
    border = VisualPrompt(VisualSafetyPrompt.create(56, 8, "random", text="please be safe"))
    defenses: dict[str, Defense] = {"none": NoDefense(), "davsp": border}
    responses = {}
    for name in defenses:
        answers = [SECRET if name == "none" or q.id == "figstep4" else REFUSAL for q in bad]
        answers += ["red ."] * 3 + ["red" if name == "none" else "blue"]
        shift = 4.0 if name == "davsp" else 0.0
        responses[name] = [
            Response(q.id, name, text, shift + i % 3 if q.label == "malicious" else -3.0 - i % 2)
            for i, (q, text) in enumerate(zip(everything, answers, strict=True))
        ]
    verdicts = {name: verdicts_of(everything, answers, keyword) for name, answers in responses.items()}
    outcomes = {name: metrics.outcomes(everything, responses[name], verdicts[name]) for name in responses}
    rows = rows_of("mini", outcomes, "none")
    steps = [{"step": i, "loss": 1 / i, "projection_malicious": i, "projection_benign": -i} for i in range(1, 20)]
    return build(
        "mini",
        everything,
        Evaluation(responses, verdicts, rows),
        defenses,
        pictures=[Illustration(Image.new("RGB", (56, 56)), "Border", "a border", "what it is")],
        margins=(2.0, -2.0),
        sweep=[
            {"layer": i, "auroc": 0.5 + i / 10, "mean_malicious": 1.0, "mean_benign": -1.0, "gap": 2.0}
            for i in (1, 2, 3)
        ],
        layer=3,
        curves={"davsp": steps},
        manifest={"davsp": "0.1.0", "note": "<script>"},
    )


class Page(HTMLParser):
    """Counts tags and collects texts and sources; complains of tags that do not match."""

    VOID = ("meta", "img", "path", "use", "rect", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.sources, self.words = [], [], [], []  # type: ignore[var-annotated]
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_one_file_without_script() -> None:
    page = Page(render(small_report()))
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    names = [name for name, _ in page.tags]
    assert "script" not in names and "link" not in names
    assert all(attrs.get("alt") for name, attrs in page.tags if name == "img")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert names.count("svg") == 5  # scatter, histograms, sweep, loss, projections


def test_no_two_rows_of_a_page_have_one_colour() -> None:
    rows = ["none", "davsp", *(f"gate:{kind}+davsp" for kind in ("answer", "states", "first", "answer,ecso")), "mine"]
    given = colours(rows)
    assert len(set(given.values())) == len(rows) and given["davsp"] == COLOURS["davsp"]
    assert len(set(colours([*COLOURS, *map(str, range(8))]).values())) >= len(set(COLOURS.values())) + 8


@pytest.mark.parametrize("name", ["my border chosen", "_mine", "$\\frac$ of it", "[/]mine", "gate:first+mine"])
def test_a_defense_may_have_any_name(name: str) -> None:
    """It stands in table, plots and legends as it is; its dot has the colour of its plots."""
    report = small_report()
    rows = [row | {"defense": name} if row["defense"] == "davsp" else row for row in report.rows]
    of = {key if key == "none" else name: value for key, value in report.projections.items()}
    text = render(replace(report, rows=rows, defense=name, projections=of))
    page, chosen = Page(text), [attrs for tag, attrs in Page(text).tags if attrs.get("class") == "chosen"]
    dots = [attrs["style"] for _, attrs in page.tags if attrs.get("class") == "dot"]
    assert dots == [f"background:{colours(['none', name])[row]}" for row in ("none", name)] * 2
    assert len(chosen) == 3 and all(name in svg for svg in text.split("<svg")[1:3])  # scatter and histograms
    terminal = Console(file=io.StringIO(), width=80)
    print_table(terminal, rows)
    print_costs(terminal, rows, {})
    assert name in terminal.file.getvalue()  # type: ignore[attr-defined]


def test_unsafe_answers_are_redacted_unless_asked_for() -> None:
    hidden, shown = render(small_report()), render(small_report(), show_unsafe=True)
    assert "crowbar" not in hidden and "[redacted]" in hidden and "complied" in hidden
    assert "&lt;b&gt;crowbar&lt;/b&gt;" in shown and "<b>crowbar" not in shown
    assert REFUSAL in hidden
    assert "are redacted" in hidden and "redacted" not in shown


def test_examples_show_failures_too() -> None:
    examples = {e.query.id for e in small_report().examples}
    assert {"sd0", "figstep0", "figstep4", "u0", "u3"} <= examples  # u3 lost its right answer, figstep4 is unsafe still


def test_headline_by_hand() -> None:
    """Five of five, p = 2 / 2^5, is no proof."""
    text = headline(small_report()).replace("\N{NO-BREAK SPACE}", " ")
    assert "from 0.0 % to 100.0 % (not significant) in distribution and from 0.0 % to 80.0 %" in text
    assert "utility goes from 100.0 % to 75.0 % (not significant); over-refusal goes from 0.0 % to 0.0 %." in text


def test_headline_of_a_failure() -> None:
    """A defense that does harm is said to."""
    report = small_report()
    for row in report.rows:
        if row["benchmark"] == "in_distribution" and row["metric"] == "rsr":
            row["value"] = {"none": 0.9, "davsp": 0.3}[row["defense"]]
        if row["benchmark"] == "in_distribution" and row["metric"] == "rsr_difference":
            row |= {"value": -0.6, "p": 0.001}
    text = headline(report).replace("\N{NO-BREAK SPACE}", " ")
    assert "from 90.0 % to 30.0 % in distribution" in text


def test_the_number_of_intents_is_told() -> None:
    report = small_report()
    assert report.query_counts == {"sd": (5, 5), "figstep": (5, 5)}
    again = build(
        "mini", [replace(q, group="one") for q in [e.query for e in report.examples]], Evaluation({}, {}, []), {}
    )
    assert again.query_counts == {"sd": (2, 1), "figstep": (2, 1)}
    assert "SD 5 queries of 5 intents, FigStep 5 queries of 5 intents" in " ".join(Page(render(report)).words)


def test_figures_stand_in_the_table() -> None:
    report = small_report()
    c = cell(report.rows, "davsp", RateColumn("FigStep", "figstep", "total", "rsr"))
    assert (c.value, c.difference, c.direction) == ("80.0", "+80.0, p=.125", "")
    assert cell(report.rows, "none", RateColumn("", "typo", "total", "rsr")).value == "–"
    words = " ".join(Page(render(report)).words)
    assert c.interval in words and c.difference in words and "0.1.0" in words


def judged(published: bool, labels: dict[str, str]) -> Report:
    """An answer to three MM-SafetyBench and two VLGuard queries under two defenses; `labels` of the defended ones, else safe."""
    names = {"sd": 2, "typo": 1, "vlguard_unsafes": 2} if published else {"sd": 3, "typo": 2}
    test_queries = [
        replace(q, id=f"{name}/{i}", benchmark=name, category="04-Physical_Harm")
        for name, n in names.items()
        for i, q in enumerate(queries("malicious", n))
    ]
    responses = {d: [Response(q.id, d, d) for q in test_queries] for d in ("none", "davsp")}
    answers = iter(["unsafe"] * 5 + [labels.get(q.id, "safe") for q in test_queries])

    def judge(answer: str, question: str) -> tuple[str, str]:
        return next(answers), ""

    if published:
        judging = judge_published(test_queries, responses, judge, {}, "m")  # type: ignore[arg-type]
    else:
        judging = judge_custom(test_queries, responses, judge, "m")  # type: ignore[arg-type]
    evaluation = Evaluation(responses, judging.verdicts, judging.rows)
    defenses: dict[str, Defense] = {"none": NoDefense(), "davsp": NoDefense()}
    return build("m", test_queries, evaluation, defenses, published=published)


@pytest.mark.parametrize("published", [True, False])
def test_unscored_is_shown_once_with_the_rate_at_worst(published: bool) -> None:
    """An answer counts in its category, in its set and in the sum of the sets; it is one answer."""
    report = judged(published, {"sd/0": "unscored"})
    c = cell(report.rows, "davsp", RateColumn("SD", "sd", "total", "rsr"))
    assert (c.value, c.unscored, c.worst) == ("100.0", 1, "50.0" if published else "66.7")
    assert f"1 unscored, at worst {c.worst}" in render(report)
    console = Console(record=True, width=140, file=io.StringIO())
    print_table(console, report.rows)
    text = console.export_text()
    assert "1 answers to malicious queries could not be scored" in text and f"worst {c.worst}" in text


def test_published_sets_are_not_pooled() -> None:
    report = judged(True, {"sd/0": "unsafe"})
    assert not any("distribution" in row["benchmark"] for row in report.rows)
    text = headline(report).replace("\N{NO-BREAK SPACE}", " ")
    assert "from 0.0 % to 50.0 % (not significant) on SD, from 0.0 % to 100.0 % (not significant) on TYPO and" in text
    assert "on vlguard_unsafes" in text and "RSR, vlguard_unsafes" in render(report)
    assert "in distribution" in headline(judged(False, {}))


def score_row(benchmark: str, split: str, metric: str, value: float, high: float, n: int = 10) -> dict[str, object]:
    head = {"model": "m", "defense": "none", "benchmark": benchmark, "split": split, "metric": metric}
    return head | {"value": value, "low": value / 2, "high": high, "n": n}


def test_the_digits_of_a_score_are_its_metric_s() -> None:
    assert number(score_row("llava_bench", "total", "relative_score", 0.95, 1.02)) == "0.950 [0.475, 1.020]"
    assert number(score_row("mme_embedded", "total", "score_lenient", 0.5, 0.75)) == "0.5 [0.2, 0.8]"
    assert number(score_row("mm_vet", "total", "score_official", 0.5, 1.0)) == "0.500 [0.250, 1.000]"


@pytest.mark.parametrize("unscored", [0.0, 0.2])
def test_the_bound_of_a_score_stands_beside_it(unscored: float) -> None:
    rows = [score_row("mm_vet", "total", name, 0.5, 0.7) for name in ("score", "score_worst_case")]
    rows += [score_row("mm_vet", "total", "unscored", unscored, 0.3)]
    console = Console(record=True, width=140, file=io.StringIO())
    print_scores(console, rows)
    assert ("score_worst_case" in console.export_text()) == bool(unscored)
    assert ("score_worst_case" in render(Report(rows, "m"))) == bool(unscored)
    console = Console(record=True, width=140, file=io.StringIO())
    print_table(console, rows)
    assert console.export_text() == ""  # a grade is of no answer to a malicious query


def test_what_is_missing_is_left_out() -> None:
    page = render(Report([], "mini"))
    assert "no resist success rate was measured" in page and "<svg" not in page and "before and after" not in page


def test_number_formats() -> None:
    assert [points(x) for x in (0.1, -0.051, 0.0001, 0.0)] == ["+10.0", "−5.1", "±0.0", "±0.0"]
    assert [p_value(x) for x in (0.0004, 0.04, 1.0, None)] == ["p<.001", "p=.040", "p=1", ""]


def test_write_and_print(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", small_report())
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    console = Console(record=True, width=140, file=io.StringIO())
    print_table(console, small_report().rows)
    text = console.export_text()
    assert re.search(r"DAVSP.*100\.0.*80\.0.*75\.0", text)


def test_silence_is_neither_resistance_nor_an_answer() -> None:
    """With the rates it is unscored or refuses; the examples say the same, and never right, answered or resisted."""
    test_queries = [
        Query("m", "what is it", "malicious", "sd", image=picture(0)),
        Query("open", "what is it", "benign", "mm_vet", image=picture(1)),
        Query("known", "what is it", "benign", "utility", reference="...", image=picture(2)),
    ]
    responses = {name: [Response(q.id, name, " .") for q in test_queries] for name in ("none", "davsp")}
    judgement = judge_custom(test_queries, responses, keyword, "mini")
    defenses: dict[str, Defense] = {"none": NoDefense(), "davsp": NoDefense()}
    page = " ".join(
        Page(
            render(build("mini", test_queries, Evaluation(responses, judgement.verdicts, judgement.rows), defenses))
        ).words
    )
    assert page.count("no words") == 4 and page.count("unscored") >= 2
    assert not re.search(r"\b(answered|right|resisted)\b", page.split("Malicious")[-1].split("Resistance over")[0])
    accuracy = [r["value"] for r in judgement.rows if r["metric"] == "accuracy" and r["split"] == "total"]
    assert accuracy == [0.0, 0.0]
