"""Evaluation: resumable to the same end, fail-closed, and one tidy file."""

import io
import json
from dataclasses import replace
from pathlib import Path

import PIL
import pytest
from rich.console import Console

from davsp import LVLM, DavspError, HarmfulnessVector, Query, Response
from davsp.defenses import Defense, NoDefense, SafetyText
from davsp.errors import Interrupted
from davsp.evaluation.evaluate import Evaluation, evaluate, planned
from davsp.judges.keyword import VERSION as RULES
from davsp.judges.keyword import keyword
from davsp.judges.verdicts import judge_name, verdicts_of
from davsp.lvlm import fingerprint
from davsp.metrics import AT_LENGTH
from davsp.query import COST
from davsp.runtime.files import alone
from davsp.store import fields_hash, pillow_notes, queries_hash
from tiny import queries

DEFENSES: dict[str, Defense] = {"none": NoDefense(), "safety-text": SafetyText("please be safe")}


def some() -> list[Query]:
    """Five malicious, four benign, one of them in words."""
    bad = [replace(q, benchmark="sd", group=f"g{i // 2}") for i, q in enumerate(queries("malicious", 5))]
    good = [replace(q, benchmark="utility", category="rec") for q in queries("benign", 3)]
    return [*bad, *good, Query("w", "what is this", "benign", "utility", "know", reference="red")]


def run(lvlm: LVLM, out: Path | None, **more: object) -> Evaluation:
    options = {"batch_size": 2, "max_new_tokens": 5} | more
    return evaluate(lvlm, DEFENSES, some(), out, **options)  # type: ignore[arg-type]


def texts(evaluation: Evaluation) -> dict[str, list[tuple[str, str, float | None]]]:
    return {d: [(r.query_id, r.text, r.projection) for r in rs] for d, rs in evaluation.responses.items()}


class Kill(BaseException):
    """Stands for a kill: nothing in the program catches it."""


class Fragile(NoDefense):
    """Fails at the third batch."""

    def __init__(self, error: type[BaseException], after: int = 2) -> None:
        super().__init__()
        self.error, self.left = error, after

    def respond(self, *args, **options):  # type: ignore[no-untyped-def]
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().respond(*args, **options)


def test_files_and_rows(lvlm: LVLM, vector: HarmfulnessVector, tmp_path: Path) -> None:
    evaluation = run(lvlm, tmp_path, vector=vector)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == {"schema": 1, "rows": evaluation.rows}
    assert {r["defense"] for r in evaluation.rows} == set(DEFENSES)
    assert {(r["benchmark"], r["split"], r["metric"]) for r in evaluation.rows if r["defense"] == "none"} == {
        ("sd", "total", "rsr"),
        ("sd", "total", "unscored"),
        ("sd", "total", "rsr_worst_case"),
        ("benign", "total", "over_refusal"),
        ("utility", "rec", "accuracy"),
        ("utility", "know", "accuracy"),
        ("utility", "total", "accuracy"),
        *(("cost", "total", what) for what in (*COST, AT_LENGTH)),
    }
    assert any(r["metric"] == "rsr_difference" for r in evaluation.rows if r["defense"] == "safety-text")
    assert all(r["model"] == Path(lvlm.model_id).name for r in evaluation.rows)
    lines = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [(r["defense"], r["query_id"]) for r in lines] == [(d, q.id) for d in DEFENSES for q in some()]
    assert all(r["projection"] is not None for r in lines)
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 2 * 5
    assert list(json.loads((tmp_path / "queries.json").read_text())) == [q.id for q in some()]
    assert texts(run(lvlm, None, vector=vector)) == texts(evaluation)


@pytest.mark.parametrize("cut", [0, 1, 35, 10_000])
def test_a_killed_run_ends_the_same(lvlm: LVLM, tmp_path: Path, cut: int) -> None:
    """Killed in the third batch, and the file cut somewhere in a line as a kill may leave it."""
    whole = run(lvlm, tmp_path / "whole")
    with pytest.raises(Kill):
        fragile: dict[str, Defense] = {"none": Fragile(Kill)}
        evaluate(lvlm, fragile, some(), tmp_path / "cut", batch_size=2, max_new_tokens=5)
    path = tmp_path / "cut" / "responses.jsonl"
    assert path.read_text().count("\n") == 4
    path.write_bytes(path.read_bytes()[: -cut or None])
    again = run(lvlm, tmp_path / "cut")
    assert texts(again) == texts(whole) and again.rows == whole.rows


def test_a_finished_run_is_not_answered_again(lvlm: LVLM, tmp_path: Path) -> None:
    whole = run(lvlm, tmp_path)
    broken: dict[str, Defense] = DEFENSES | {"none": Fragile(Kill, after=0)}
    again = evaluate(lvlm, broken, some(), tmp_path, batch_size=2, max_new_tokens=5)
    assert again.responses == whole.responses and again.rows == whole.rows


def test_a_folder_may_be_given_by_its_name(lvlm: LVLM, tmp_path: Path) -> None:
    evaluation = evaluate(lvlm, DEFENSES, some(), f"{tmp_path}/run", batch_size=2, max_new_tokens=5)
    assert texts(run(lvlm, tmp_path / "run")) == texts(evaluation)
    assert len((tmp_path / "run" / "responses.jsonl").read_text().splitlines()) == len(DEFENSES) * len(some())


def test_ctrl_c_says_how_to_go_on(lvlm: LVLM, tmp_path: Path) -> None:
    fragile: dict[str, Defense] = {"none": Fragile(KeyboardInterrupt)}
    with pytest.raises(Interrupted, match="go on"):
        evaluate(lvlm, fragile, some(), tmp_path, batch_size=2, max_new_tokens=5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_new_tokens": 4}, "max new tokens"),
        ({"queries": "question"}, "other queries, 'malicious-0' is another"),
        ({"queries": "picture"}, "other queries, 'malicious-0' is another"),
        ({"defenses": {"none": SafetyText("be safe")}}, "another defense 'none'"),
    ],
)
def test_answers_of_another_run_are_refused_or_redone(
    lvlm: LVLM, tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    options: dict[str, object] = {
        "defenses": {"none": NoDefense()},
        "queries": some(),
        "batch_size": 2,
        "max_new_tokens": 5,
    }
    evaluate(lvlm, out=tmp_path, **options)  # type: ignore[arg-type]
    first_bytes = (tmp_path / "responses.jsonl").read_bytes()
    if "queries" in change:
        first, *rest = some()
        other = (
            replace(first, question="what is this")
            if change["queries"] == "question"
            else replace(first, image=some()[1].image)
        )
        change = {"queries": [other, *rest]}
    with pytest.raises(DavspError, match=reason):
        evaluate(lvlm, out=tmp_path, **options | change)  # type: ignore[arg-type]
    assert (tmp_path / "responses.jsonl").read_bytes() == first_bytes
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    evaluate(lvlm, out=tmp_path, redo=True, console=console, **options | change)  # type: ignore[arg-type]
    assert "answered anew" in console.export_text()


def test_defenses_may_be_added_but_not_left_out(lvlm: LVLM, tmp_path: Path) -> None:
    evaluate(lvlm, {"none": NoDefense()}, some(), tmp_path, batch_size=2, max_new_tokens=5)
    once: dict[str, Defense] = {"none": Fragile(Kill, after=0), "safety-text": DEFENSES["safety-text"]}
    whole = evaluate(lvlm, once, some(), tmp_path, batch_size=2, max_new_tokens=5)
    assert texts(whole) == texts(run(lvlm, None))
    with pytest.raises(DavspError, match="answers under 'safety-text', which is not among the defenses now"):
        evaluate(lvlm, {"none": NoDefense()}, some(), tmp_path, batch_size=2, max_new_tokens=5)


def test_batches_are_of_like_length() -> None:
    plan = planned(some())
    assert plan[-1].id == "w" and {q.id for q in plan} == {q.id for q in some()}
    lengths = [len(q.question) for q in plan[:-1]]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1


def test_damaged_answers_are_not_skipped(lvlm: LVLM, tmp_path: Path) -> None:
    run(lvlm, tmp_path)
    path = tmp_path / "responses.jsonl"
    path.write_text("{nonsense}\n" + path.read_text())
    with pytest.raises(DavspError, match="damaged"):
        run(lvlm, tmp_path)


def test_a_judge_that_says_something_else_is_unscored() -> None:
    responses = [Response(q.id, "none", "sure") for q in some()]

    def judge(text: str, question: str) -> tuple[str, str]:
        return "probably fine", "no idea"

    verdicts = verdicts_of(some(), responses, judge)  # type: ignore[arg-type]
    assert len(verdicts) == 5 and {v.label for v in verdicts} == {"unscored"}
    assert "probably fine" in verdicts[0].reason


def test_a_verdict_names_its_judge_and_the_version_of_its_rules() -> None:
    responses = [Response(q.id, "none", "a cake") for q in some()]
    assert {v.judge for v in verdicts_of(some(), responses, keyword)} == {f"keyword/{RULES}"} == {judge_name(keyword)}
    assert {v.judge for v in verdicts_of(some(), responses, lambda text, question: ("safe", ""))} == {"<lambda>"}


def test_grades_of_an_earlier_command_do_not_stay(lvlm: LVLM, tmp_path: Path) -> None:
    (tmp_path / "grades.jsonl").write_text("old")
    run(lvlm, tmp_path)
    assert not (tmp_path / "grades.jsonl").exists()


def test_a_second_run_in_the_folder_is_refused_while_the_first_is_there(lvlm: LVLM, tmp_path: Path) -> None:
    with alone(tmp_path):
        (tmp_path / ".responses.jsonl.x.tmp").write_text("under way")
        with pytest.raises(DavspError, match="another davsp is writing"):
            run(lvlm, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".responses.jsonl.x.tmp"]
    assert run(lvlm, tmp_path).rows and run(lvlm, tmp_path).rows


@pytest.mark.parametrize("content", ["[]", '{"malicious-0": 1}'])
def test_a_damaged_list_of_queries_is_named(lvlm: LVLM, tmp_path: Path, content: str) -> None:
    run(lvlm, tmp_path)
    (tmp_path / "queries.json").write_text(content)
    with pytest.raises(DavspError, match=r"queries\.json holds no hash by query id"):
        run(lvlm, tmp_path)


def test_bad_input_is_said(lvlm: LVLM) -> None:
    with pytest.raises(DavspError, match="no queries"):
        evaluate(lvlm, DEFENSES, [])
    with pytest.raises(DavspError, match="no defense"):
        evaluate(lvlm, {}, some())
    with pytest.raises(DavspError, match="twice"):
        evaluate(lvlm, DEFENSES, some() * 2)


def test_fingerprint_and_hash_notice_changes(lvlm: LVLM, tiny_folder: Path) -> None:
    other = LVLM.from_pretrained(tiny_folder, device_map="cpu")
    assert fingerprint(lvlm) == fingerprint(other)
    next(other.model.parameters()).data.flatten()[0] += 1
    assert fingerprint(lvlm) != fingerprint(other)
    assert queries_hash(some()) == queries_hash(some()) != queries_hash(some()[1:])


def test_a_hash_of_fields_knows_pictures_and_these_fields_alone() -> None:
    query, other = queries("malicious", 2)
    first = fields_hash([query], "question")
    assert fields_hash([replace(query, id="x", category="x")], "question") == first
    assert fields_hash([replace(query, question="x")], "question") != first
    assert query.picture() != other.picture() and fields_hash([replace(query, image=other.image)], "question") != first
    assert fields_hash([replace(query, image=None)], "question") != first
    assert fields_hash([query], "question", "id") != first


def test_figures_of_answers_that_are_gone_do_not_stay(lvlm: LVLM, tmp_path: Path) -> None:
    """Answers were deleted, and the new ones are not judged yet: the folder then holds no verdict and no rate of the old ones."""

    def broken(answer: str, question: str) -> tuple[str, str]:
        raise DavspError("the judge is not there")

    run(lvlm, tmp_path)
    follow = [
        "verdicts.jsonl",
        "metrics.json",
        "verdicts-j-1.jsonl",
        "metrics-j-1.json",
        "agreement.json",
        "report.html",
    ]
    for name in follow[2:]:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DavspError, match="not there"):
        run(lvlm, tmp_path, judge=broken)
    assert all((tmp_path / name).exists() for name in follow)  # the answers are the same
    (tmp_path / "responses.jsonl").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DavspError, match="not there"):
        run(lvlm, tmp_path, judge=broken)
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "queries.json", "responses.jsonl", "notes.txt"}


def test_an_answer_that_is_no_text_is_damage(lvlm: LVLM, tmp_path: Path) -> None:
    run(lvlm, tmp_path)
    first, *rest = (tmp_path / "responses.jsonl").read_text().splitlines(keepends=True)
    spoilt = json.dumps(json.loads(first) | {"text": None}) + "\n"
    (tmp_path / "responses.jsonl").write_text("".join([spoilt, *rest]))
    with pytest.raises(DavspError, match="line 1 is damaged"):
        run(lvlm, tmp_path)


OLDER = f"{int(PIL.__version__.split('.')[0]) - 1}.3.0"
"""Of another generation than the Pillow that is here."""


def test_what_pillow_made_the_first_answers_is_never_forgotten(lvlm: LVLM, tmp_path: Path) -> None:
    run(lvlm, tmp_path, manifest={"pillow": OLDER})
    for _ in range(2):
        run(lvlm, tmp_path, manifest={"pillow": PIL.__version__, "notes": ["of the set"]})
        first, second = json.loads((tmp_path / "manifest.json").read_text())["notes"]
        assert first == "of the set" and f"made with Pillow {OLDER}" in second and pillow_notes(tmp_path) == [second]
    console = Console(file=io.StringIO(), width=400)
    (tmp_path / "manifest.json").write_text(json.dumps({"pillow": OLDER}))
    run(lvlm, tmp_path, console=console)  # as demo and reproduce do, which write a manifest of their own
    assert f"made with Pillow {OLDER}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_of_another_generation_of_pillow_says_so(lvlm: LVLM, tmp_path: Path) -> None:
    run(lvlm, tmp_path, manifest={"pillow": OLDER})
    for then, generation in ((OLDER, OLDER.split(".")[0]), (PIL.__version__, PIL.__version__.split(".")[0])):
        (tmp_path / "manifest.json").write_text(json.dumps({"pillow": then}))
        console = Console(file=io.StringIO(), width=400)
        run(lvlm, tmp_path, manifest={"pillow": PIL.__version__}, console=console)
        other = generation != PIL.__version__.split(".")[0]
        assert (f"made with Pillow {then}" in console.file.getvalue()) == other  # type: ignore[attr-defined]
        assert ("notes" in json.loads((tmp_path / "manifest.json").read_text())) == other
