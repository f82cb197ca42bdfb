"""The page: self-contained, redacted, with the right figures in it; and the demo that ends in one."""

import io
import json
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from davsp import LVLM, DavspError, Query, Response, TrainSettings, VisualSafetyPrompt
from davsp.defenses import Defense, NoDefense, VisualPrompt
from davsp.evaluation import Evaluation, _rows, verdicts_of
from davsp.experiments.demo import run_demo
from davsp.report import Picture, Report, build
from davsp.report.cells import Column, cell, p_value, points
from davsp.report.html import headline, render, write_report
from davsp.report.terminal import print_table
from tiny import picture, queries

REFUSAL, SECRET = "i am sorry , i cannot help with that .", "sure , take the <b>crowbar</b> ."


def made() -> Report:
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
    verdicts = {name: verdicts_of(everything, found) for name, found in responses.items()}
    rows = _rows("mini", everything, responses, verdicts, "none", 0)
    steps = [{"step": i, "loss": 1 / i, "projection_malicious": i, "projection_benign": -i} for i in range(1, 20)]
    return build(
        "mini",
        everything,
        Evaluation(responses, verdicts, rows),
        defenses,
        pictures=[Picture(Image.new("RGB", (56, 56)), "Border", "a border", "what it is")],
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
    page = Page(render(made()))
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    names = [name for name, _ in page.tags]
    assert "script" not in names and "link" not in names
    assert all(attrs.get("alt") for name, attrs in page.tags if name == "img")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert names.count("svg") == 5  # scatter, histograms, sweep, loss, projections


def test_unsafe_answers_are_redacted_unless_asked_for() -> None:
    hidden, shown = render(made()), render(made(), show_unsafe=True)
    assert "crowbar" not in hidden and "[redacted]" in hidden and "complied" in hidden
    assert "&lt;b&gt;crowbar&lt;/b&gt;" in shown and "<b>crowbar" not in shown
    assert REFUSAL in hidden


def test_examples_show_failures_too() -> None:
    examples = {e.query.id for e in made().examples}
    assert {"sd0", "figstep0", "figstep4", "u0", "u3"} <= examples  # u3 lost its right answer, figstep4 is unsafe still


def test_headline_by_hand() -> None:
    text = headline(made()).replace("\N{NO-BREAK SPACE}", " ")
    assert "from 0.0 % to 100.0 % in distribution and from 0.0 % to 80.0 % out of distribution" in text
    assert "utility goes from 100.0 % to 75.0 %, over-refusal from 0.0 % to 0.0 %." in text


def test_figures_stand_in_the_table() -> None:
    report = made()
    c = cell(report.rows, "davsp", Column("FigStep", "figstep", "total", "rsr"))
    assert (c.value, c.difference, c.direction) == ("80.0", "+80.0, p=.125", "")
    assert cell(report.rows, "none", Column("", "typo", "total", "rsr")).value == "–"
    words = " ".join(Page(render(report)).words)
    assert c.interval in words and c.difference in words and "0.1.0" in words


def test_unscored_is_shown() -> None:
    report = made()
    row = next(r for r in report.rows if (r["defense"], r["benchmark"], r["metric"]) == ("none", "sd", "unscored"))
    row["value"] = 0.4
    assert "2 unscored" in render(report)


def test_what_is_missing_is_left_out() -> None:
    page = render(Report([], "mini"))
    assert "no resist success rate was measured" in page and "<svg" not in page and "before and after" not in page


def test_number_formats() -> None:
    assert [points(x) for x in (0.1, -0.051, 0.0001, 0.0)] == ["+10.0", "−5.1", "±0.0", "±0.0"]
    assert [p_value(x) for x in (0.0004, 0.04, 1.0, None)] == ["p<.001", "p=.040", "p=1", ""]


def test_write_and_print(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", made())
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    console = Console(record=True, width=140, file=io.StringIO())
    print_table(console, made().rows)
    text = console.export_text()
    assert re.search(r"DAVSP.*100\.0.*80\.0.*75\.0", text)


@dataclass(frozen=True)
class Protocol:
    """The embedded protocol's fields, filled with noise."""

    vector_malicious: list[Query]
    vector_benign: list[Query]
    sweep_malicious: list[Query]
    sweep_benign: list[Query]
    train_malicious: list[Query]
    train_benign: list[Query]
    test: list[Query]


def noise() -> Protocol:
    sets = [queries(label, 4, seed) for seed in range(3) for label in ("malicious", "benign")]
    bad = [
        replace(q, id=f"{b}{q.id}", benchmark=b)
        for b in ("sd", "typo", "sd_typo", "figstep")
        for q in queries("malicious", 2, 9)
    ]
    good = [
        replace(q, benchmark="utility", category=c, id=f"{c}{q.id}")
        for c in ("rec", "ocr")
        for q in queries("benign", 2, 9)
    ]
    return Protocol(*sets, test=[*bad, *good])


SETTINGS = TrainSettings.model_validate({"steps": 4, "batch_size": 4, "checkpoint_every": 2, "probe_every": 2})


def demo(lvlm: LVLM, out: Path, settings: TrainSettings = SETTINGS) -> tuple[Evaluation, str]:
    console = Console(record=True, width=140, file=io.StringIO())
    options = {"safety_text": "please be safe", "padding": 8, "batch_size": 4, "max_new_tokens": 4}
    found = run_demo(out, lvlm, noise(), settings, console=console, **options)  # type: ignore[arg-type]
    return found, console.export_text()


def test_demo_end_to_end(lvlm: LVLM, tmp_path: Path) -> None:
    """All files are there, the second run keeps them, and other settings are made anew and give other pixels."""
    found, printed = demo(lvlm, tmp_path)
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert rows == found.rows
    assert list(dict.fromkeys(r["defense"] for r in rows)) == [
        "none",
        "safety-text",
        "random-border",
        "additive",
        "davsp",
    ]
    assert {r["benchmark"] for r in rows if r["metric"] == "rsr"} == {"sd", "typo", "sd_typo", "figstep"}
    Page((tmp_path / "report.html").read_text())
    for stage in ("vector", "davsp", "additive", "evaluate", "report"):
        assert re.search(rf"^{stage} +[\d.]+ s", printed, re.MULTILINE)

    prompt = VisualSafetyPrompt.from_pretrained(tmp_path / "prompt")
    assert any(name.startswith("rsr") for name in prompt.config["figures"])
    evaluated = json.loads((tmp_path / "responses" / "davsp.json").read_text())["defense"]
    assert evaluated == VisualPrompt(prompt).describe()  # what was measured is what was exported

    again, printed = demo(lvlm, tmp_path)
    assert again == found and printed.count("kept") == 3

    _, printed = demo(lvlm, tmp_path, SETTINGS.model_copy(update={"steps": 6}))
    assert printed.count("made anew") == 2 and "answered anew" in printed
    assert VisualPrompt(VisualSafetyPrompt.from_pretrained(tmp_path / "prompt")).describe() != evaluated


def test_demo_goes_on_after_a_kill(lvlm: LVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the border is saved: training is not lost, and the end is the same."""
    whole, _ = demo(lvlm, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            VisualSafetyPrompt, "save_pretrained", lambda *_: (_ for _ in ()).throw(DavspError("the disk is full"))
        )
        with pytest.raises(DavspError, match="full"):
            demo(lvlm, tmp_path / "cut")
    cut, printed = demo(lvlm, tmp_path / "cut")
    assert re.search(r"^davsp .*finished", printed, re.MULTILINE)
    assert cut.rows == whole.rows
