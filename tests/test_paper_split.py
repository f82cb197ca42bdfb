"""The road of the paper's split from the command line: drawn from runs of the undefended model, and taken by every command."""

import json
from collections import Counter
from pathlib import Path

import pytest

from command import run as davsp
from davsp import LVLM, DavspError
from davsp.benchmarks import mm_safetybench, mm_vet
from davsp.benchmarks.protocol import for_making, for_test
from davsp.benchmarks.splits import settings_of
from davsp.embedded.counterparts import write
from judge_server import judge_server

FEW = {"mm_safetybench": 6, "figstep": 4, "vlguard": 6, "mm_vet": 16, "mme": 2, "llava_bench": 2}
SIZES = ("--vector", 4, "--intents", 2, "--helpful", 5)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sets"), **FEW)


@pytest.fixture(scope="module")
def runs(sets: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The undefended model refuses what belongs to VLGuard and answers all of MM-SafetyBench."""
    top = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name, split, reply in (
            ("vlguard", "train", "i am sorry ."),
            ("mm_safetybench", "all", "item 3: here are the steps"),
        ):
            patch.setattr(
                LVLM,
                "completions",
                lambda self, canvas, questions, _said=(reply, "stop"), **_: [_said] * len(questions),
            )
            command = ("eval", "--model", tiny_folder, "--benchmark", f"{name}={sets / name}", "--split", split)
            assert davsp(*command, "--defense", "none", "--out", top / name) == 0
    return top / "vlguard", top / "mm_safetybench"


def set_options(sets: Path, *names: str) -> list[str]:
    return [part for name in names for part in ("--benchmark", f"{name}={sets / name}")]


@pytest.fixture(scope="module")
def file(sets: Path, runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("split") / "split.json"
    options = set_options(sets, "vlguard", "mm_safetybench", "mm_vet", "figstep")
    assert davsp("data", "split", out, *options, *SIZES, "--run", runs[0], "--run", runs[1]) == 0
    return out


def test_a_split_is_drawn_from_runs(file: Path, sets: Path, runs: tuple[Path, Path]) -> None:
    body = json.loads(file.read_text())
    assert {part: len(ids) for part, ids in body["parts"].items()} == {
        "vector_malicious": 4, "vector_benign": 4, "train_malicious": 6, "train_benign": 5,
    }  # fmt: skip
    assert {name: len(ids) for name, ids in body["test"].items()} == {"mm_safetybench": 12, "mm_vet": 11, "figstep": 4}
    settings = settings_of(file)
    assert settings["hard intents"] == "answered by the undefended model" and len(settings["undefended"]) == 2
    assert [run["judges"] for run in settings["undefended"]] == [["keyword/1"]] * 2 and settings["rebuild"] is False


def test_eval_and_judge_take_exactly_its_test(file: Path, sets: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", (*set_options(sets, "mm_safetybench", "mm_vet"), "--split", file)
    common = ("--model", tiny_folder, "--max-new-tokens", 2, "--max-unscored", 1, "--defense", "none")
    assert davsp("eval", *options, *common, "--out", out) == 0
    ids = {name: json.loads(file.read_text())["test"][name] for name in ("mm_safetybench", "mm_vet")}
    assert list(json.loads((out / "queries.json").read_text())) == [*ids["mm_safetybench"], *ids["mm_vet"]]
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    n = {r["benchmark"]: r["n"] for r in rows if (r["split"], r["metric"]) == ("total", "rsr_worst_case")}
    assert n == {"sd_embedded": 4, "sd_typo_embedded": 4, "typo_embedded": 4, "mm_safetybench_embedded": 12}
    assert davsp("judge", out, *options, "--judge", "keyword-gcg", "--max-unscored", 1) == 0


def test_the_papers_numbers_reach_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,480 intents of each type and 118 questions, of sets as large as the published ones."""
    from davsp.benchmarks import mm_safetybench, protocol
    from davsp.benchmarks.splits import paper_split
    from test_benchmarks_splits import answers_of, easy, guard, safety, vet

    whole = {"vlguard": guard(), "mm_safetybench": safety(1680), "mm_vet": vet()}
    split = paper_split(*whole.values(), vlguard_undefended=answers_of(guard(), easy), mm_safetybench_undefended=None)
    split.save(tmp_path / "split.json")
    monkeypatch.setattr(protocol, "read", lambda roots, *_: {name: whole[name] for name in roots})
    counts = Counter(
        q.benchmark for q in for_test(tmp_path / "split.json", {"mm_safetybench": tmp_path, "mm_vet": tmp_path})
    )
    assert counts == dict.fromkeys(mm_safetybench.TYPES, 1480) | {"mm_vet": 118}


def test_vector_and_training_take_their_parts(file: Path, sets: Path, tiny_folder: Path, tmp_path: Path) -> None:
    vector, model = tmp_path / "vector", ("--model", tiny_folder, "--split", file)
    assert davsp("vector", *model, *set_options(sets, "vlguard"), "--out", vector) == 0
    few = ("--steps", 1, "--batch-size", 2, "--vector", vector, "--padding", 1)
    assert (
        davsp("train", *model, *set_options(sets, "mm_safetybench", "mm_vet"), *few, "--out", tmp_path / "prompt") == 0
    )
    assert (tmp_path / "prompt/vsp.png").exists()
    benign = for_making(file, {name: sets / name for name in ("mm_safetybench", "mm_vet")}, "train")[1]
    assert len(benign) == 5 and not any("<" in q.reference for q in benign)
    assert [mm_vet.one_answer(text) for text in ("5<OR>five", "x <AND> y<OR>z")] == ["5", "x, y"]


@pytest.mark.parametrize(
    ("command", "names", "options", "words"),
    [
        ("eval", ["vlguard"], [], "leaves nothing of vlguard to test on"),
        ("eval", ["mme"], [], "was not drawn with mme"),
        ("eval", ["mm_vet"], ["--limit", 3], "do not go with a split file"),
        ("vector", ["mm_vet"], [], "the vector part of a split is of vlguard"),
        ("train", ["mm_vet"], [], "the train part of a split is of mm_safetybench and mm_vet"),
        ("vector", [], [], "--split FILE.json (of davsp data split) and --benchmark NAME=FOLDER go together"),
        ("vector", ["vlguard"], ["--malicious", "x", "--benign", "y"], "--split takes the place of --malicious"),
        ("eval", ["mm_vet", "mm_vet"], [], "--benchmark names mm_vet twice"),
    ],
)
def test_mistakes(
    command, names, options, words, file: Path, sets: Path, tiny_folder: Path, tmp_path: Path, capsys
) -> None:
    command_options = ("--model", tiny_folder, *set_options(sets, *names), "--split", file, "--out", tmp_path / "out")
    assert davsp(command, *command_options, *options) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_runs_that_do_not_fit(sets: Path, runs: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    options = ("data", "split", tmp_path / "s.json", *set_options(sets, "vlguard", "mm_safetybench", "mm_vet"), *SIZES)
    guard, safety = runs
    for more, words in (
        (("--run", tmp_path), "is no finished run"),
        (("--run", guard), "has no response or verdict of the undefended model"),
        (("--run", guard, "--run", guard), "is in two of the runs"),
    ):
        assert davsp(*options, *more) == 2
        assert words in capsys.readouterr().err
    assert davsp(*options, "--run", guard, "--blind") == 0
    assert settings_of(tmp_path / "s.json")["hard intents"] == "drawn blindly"
    assert davsp("data", "split", tmp_path / "s", *set_options(sets, "vlguard")) == 2
    assert "to be called FILE.json" in capsys.readouterr().err
    other = write(tmp_path / "other", 1, **FEW)
    assert davsp(*("data", "split", tmp_path / "s.json", *set_options(other, "vlguard", "mm_safetybench", "mm_vet"), *SIZES),
                 "--run", guard, "--run", safety) == 2  # fmt: skip
    assert "answers another query" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ other options of eval and judge


def test_rebuilt_pictures_are_in_the_name(sets: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    common = ("--model", tiny_folder, "--max-new-tokens", 2, "--max-unscored", 1, "--defense", "none", "--rebuild")
    options = (*set_options(sets, "mm_safetybench"), "--type", "typo", *common)
    assert davsp("eval", *options, "--out", tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out/metrics.json").read_text())["rows"]
    assert {r["benchmark"] for r in rows} == {
        mm_safetybench.rebuilt_as(mm_safetybench.find_font(sets)) + "_embedded",
        "cost",
    }
    assert davsp("eval", *set_options(sets, "mm_vet"), *common, "--out", tmp_path / "x") == 2
    assert "--rebuild goes with --benchmark figstep" in capsys.readouterr().err
    assert davsp("eval", *set_options(sets, "mm_vet"), "--type", "sd", "--out", tmp_path / "x") == 2
    assert "--type goes with" in capsys.readouterr().err


def test_a_judge_without_the_category_is_refused_at_once(sets: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    options = (
        "eval",
        "--model",
        tiny_folder,
        *set_options(sets, "vlguard"),
        "--out",
        tmp_path / "out",
        "--judge",
        "mm-safetybench",
    )
    assert davsp(*options, "--judge-model", "m", "--judge-url", "http://127.0.0.1:9/v1") == 2
    assert "is no scenario of MM-SafetyBench" in capsys.readouterr().err
    assert not (tmp_path / "out/responses.jsonl").exists()


def test_davsp_judge_adds_a_mode(sets: Path, runs: tuple[Path, Path], capsys, monkeypatch) -> None:
    """Our reading of "unsafe." is unsafe; for MM-SafetyBench's script it is not exactly the word, so safe. Asked once."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    run = runs[1]
    with judge_server() as server:
        server.say = lambda n: "unsafe."
        options = ("judge", run, *set_options(sets, "mm_safetybench"), "--split", "all", "--judge-model", "m",
                 "--base-url", server.url)  # fmt: skip
        assert davsp(*options, "--judge", "davsp", "--mode", "vlmevalkit") == 2
        assert "reads the replies of mm-safetybench, not of davsp/1:m" in capsys.readouterr().err
        assert davsp(*options, "--judge", "davsp", "--mode", "kind") == 2
        assert "the mode 'kind' of RSR is not known" in capsys.readouterr().err and not server.requests
        assert davsp(*options, "--judge", "mm-safetybench", "--mode", "mm_safetybench_official") == 0
        assert server.requests.total() == 1  # equal answers of one kind of scenario
    assert "rsr_mm_safetybench_official 100.0 % of 6" in capsys.readouterr().out
    rows = json.loads((run / "metrics-mm-safetybench-1-m.json").read_text())["rows"]
    value = {r["metric"]: r["value"] for r in rows if (r["benchmark"], r["split"]) == ("sd_embedded", "total")}
    assert value == {"rsr": 0.0, "unscored": 0.0, "rsr_worst_case": 0.0, "rsr_mm_safetybench_official": 1.0}


def test_published_and_embedded_are_not_one_set(sets: Path) -> None:
    from dataclasses import replace

    from davsp import benchmarks

    queries = mm_vet.load(sets / "mm_vet")
    with pytest.raises(DavspError, match="mm_vet is there as published and as its embedded counterpart"):
        benchmarks.by_set([*queries, replace(queries[0], id="x", benchmark="mm_vet")])
