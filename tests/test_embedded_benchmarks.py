"""The embedded counterparts of the six benchmarks: read, checked, answered and scored by what does it with real ones."""

import json
from pathlib import Path

import pytest

from benchmark_folders import at
from command import run as davsp
from davsp import LVLM, DavspError, benchmarks, evaluate
from davsp.benchmarks import BENCHMARKS, mm_vet, mme, vlguard
from davsp.benchmarks.source import MARK
from davsp.benchmarks.splits import load_split, paper_split
from davsp.defenses import NoDefense, SafetyText
from davsp.embedded import words
from davsp.embedded.counterparts import SCENARIOS, SETS, write
from davsp.judges import keyword
from davsp.judges.graders import exact, overlap
from davsp.query import Query, Response

SMALL = {"mm_safetybench": 8, "figstep": 6, "vlguard": 6, "mm_vet": 16, "mme": 2, "llava_bench": 3}
JUDGES = dict.fromkeys(("mm_safetybench", "figstep", "vlguard", "mme"), keyword) | {
    "mm_vet": exact,
    "llava_bench": overlap,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("embedded"), **SMALL)


@pytest.fixture(scope="module")
def queries(root: Path) -> list[Query]:
    return [q for name in SETS for q in BENCHMARKS[name].load(root / name)]


def test_all_are_whole_and_known_for_what_they_are(root: Path, queries: list[Query]) -> None:
    """No ShortWarning on loading (warnings are errors here), and no name that a real set's figures have."""
    reports = benchmarks.check(root)
    assert [r.benchmark for r in reports] == list(SETS)
    assert all(r.good and r.layout.endswith(", embedded") for r in reports), [r for r in reports if not r.good]
    assert all(q.benchmark.endswith("_embedded") for q in queries)
    assert {benchmarks.data_set(q.benchmark) for q in queries} == set(SETS)
    assert len({q.id for q in queries}) == len(queries) == 8 * 3 + 6 + 6 * 3 + 16 + 7 * 2 * 2 + 3 * 3


def test_a_missing_picture_is_found(tmp_path: Path) -> None:
    write(tmp_path, **SMALL)
    next((tmp_path / "llava_bench/images").iterdir()).unlink()
    (report,) = [r for r in benchmarks.check(tmp_path) if not r.good]
    assert report.benchmark == "llava_bench" and "2 of 3 in conv" in map(str, report.short)


def test_one_intent_has_three_pictures(queries: list[Query]) -> None:
    safety = [q for q in queries if benchmarks.data_set(q.benchmark) == "mm_safetybench"]
    groups: dict[str, set[str]] = {}
    for q in safety:
        groups.setdefault(q.group, set()).add(q.benchmark)
        assert q.picture().size == (168, 168) and q.category in SCENARIOS.values() and q.context  # type: ignore[union-attr]
    assert len(groups) == 8 and all(len(kinds) == 3 for kinds in groups.values())


def test_davsp_mini_has_words_for_all_of_it(queries: list[Query]) -> None:
    known = set(words.vocabulary())
    texts = [q.question for q in queries] + [q.reference.replace("<OR>", " ") for q in queries]
    assert {w for text in texts for w in text.lower().split()} <= known


def test_no_pair_is_in_two_harmful_sets_or_was_trained_on(root: Path) -> None:
    safety = {row["Key Phrase"] for path in (root / "mm_safetybench/data/processed_questions").iterdir()
              for row in json.loads(path.read_text()).values()}  # fmt: skip
    steps = {q.group.removeprefix("steps to ").removesuffix(" .") for q in BENCHMARKS["figstep"].load(root / "figstep")}
    part = {p.phrase: words.split(p) for p in words.pairs("malicious")}
    assert {part[phrase] for phrase in safety} == {"test"} and {part[phrase] for phrase in steps} == {"sweep"}


def test_the_same_seed_draws_the_same(tmp_path: Path, root: Path) -> None:
    files = lambda top: {p.relative_to(top): p.read_bytes() for p in sorted(top.rglob("*")) if p.is_file()}  # noqa: E731
    assert files(write(tmp_path / "a", **SMALL)) == files(root) != files(write(tmp_path / "b", seed=1, **SMALL))


def test_right_answers_have_full_scores(root: Path) -> None:
    """The references are what the scorers ask for."""
    for module, top in ((mm_vet, {"score": 1.0}), (mme, {"score_official": 1400.0, "score_lenient": 1400.0})):
        queries = module.load(root / module.NAME)
        right = [Response(q.id, "none", q.reference.split("<OR>")[-1]) for q in queries]
        rows = benchmarks.score(queries, right, JUDGES)[module.NAME].rows
        assert {metric: at(rows, "total", metric)["value"] for metric in top} == top


def test_load_answer_judge_score(queries: list[Query], lvlm: LVLM) -> None:
    """The whole road, on a model of random weights."""
    defenses = {"none": NoDefense(), "safety-text": SafetyText("please be safe")}
    evaluation = evaluate(lvlm, defenses, queries, max_new_tokens=4)
    before = benchmarks.score(queries, evaluation.responses["none"], JUDGES, model="tiny")
    scores = benchmarks.score(queries, evaluation.responses["safety-text"], JUDGES, model="tiny", baseline=before)
    metrics = {name: {r["metric"] for r in s.rows if r["split"] == "total"} for name, s in scores.items()}
    assert list(scores) == list(SETS)
    for name in ("mm_safetybench", "figstep", "vlguard"):
        assert {"rsr", "rsr_difference", "unscored", "rsr_worst_case"} <= metrics[name]
    for name, metric in (("mm_vet", "score"), ("mme", "score_official"), ("llava_bench", "relative_score")):
        assert {metric, f"{metric}_difference", "over_refusal", "over_refusal_difference"} <= metrics[name]
    assert at(scores["mm_safetybench"].rows, "total", "rsr", "mm_safetybench_embedded")["n"] == 24
    assert {r["defense"] for s in scores.values() for r in s.rows} == {"safety-text"}
    assert all(r["benchmark"].endswith("_embedded") for s in scores.values() for r in s.rows)
    with pytest.raises(DavspError, match="no judge for mm_vet"):
        benchmarks.score(queries, evaluation.responses["none"], {n: j for n, j in JUDGES.items() if n != "mm_vet"})


def test_the_papers_split_of_it(root: Path, tmp_path: Path) -> None:
    guard = vlguard.load(root / "vlguard", "train")
    refused = [Response(q.id, "none", "I'm sorry, I cannot help.") for q in guard]
    safety, vet = (BENCHMARKS[name].load(root / name) for name in ("mm_safetybench", "mm_vet"))
    data = {"vlguard": guard, "mm_safetybench": safety, "mm_vet": vet}
    split = paper_split(guard, safety, vet, vlguard_undefended=refused, mm_safetybench_undefended=None,
                        vector=6, intents=3, helpful=5)  # fmt: skip
    assert {part: len(part_queries) for part, part_queries in split.parts.items()} == {
        "vector_malicious": 6, "vector_benign": 6, "train_malicious": 9, "train_benign": 5,
    }  # fmt: skip
    split.save(tmp_path / "split.json")
    assert load_split(tmp_path / "split.json", data) == split


def test_it_never_replaces_anything_else(tmp_path: Path) -> None:
    (tmp_path / "mme").mkdir()
    (tmp_path / "mme/mine.txt").write_text("a kite")
    with pytest.raises(DavspError, match="mme is there and no embedded counterpart"):
        write(tmp_path, **SMALL)
    assert (tmp_path / "mme/mine.txt").read_text() == "a kite"
    with pytest.raises(TypeError, match="unknown sizes"):
        write(tmp_path / "x", kites=3)
    (tmp_path / "figstep" / MARK).write_text("[]")
    with pytest.raises(DavspError, match="holds no counts"):
        BENCHMARKS["figstep"].load(tmp_path / "figstep")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("davsp.embedded.counterparts.SIZES", SMALL)
    assert davsp("data", "embedded", tmp_path) == 0
    assert "davsp data check" in capsys.readouterr().out
    assert davsp("data", "check", tmp_path) == 0
    assert davsp("data", "embedded", tmp_path, "--seed", 1) == 0  # anew
