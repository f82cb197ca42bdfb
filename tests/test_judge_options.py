"""Which server, model and key each judge of a command has, and MM-Vet's runs, from the command line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command import run as davsp
from davsp.cli.judges import JudgeSettings, judge_settings
from davsp.cli.options import JudgeOptions, RequestOptions
from davsp.embedded.counterparts import write
from davsp.errors import DavspError
from davsp.query import Grade, Query, read_jsonl
from davsp.runtime.files import write_json
from judge_server import Judge, judge_server
from test_rescore import write_run


def settings(
    names: list[str],
    urls: list[str] | None = None,
    models: list[str] | None = None,
    variables: list[str] | None = None,
    runs: int | None = None,
) -> JudgeSettings:
    return judge_settings(names, JudgeOptions(urls, models, variables), RequestOptions(), Path("c"), None, runs)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    few = {"mm_safetybench": 1, "figstep": 4, "vlguard": 1, "mm_vet": 6, "mme": 1, "llava_bench": 1}
    return write(tmp_path_factory.mktemp("sets"), **few)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with judge_server() as running:
        yield running


@pytest.fixture
def graded(sets: Path, tmp_path: Path) -> tuple[Path, list[Query]]:
    """A finished run over six questions of the MM-Vet-like set, item 0 to 5."""
    from davsp.benchmarks import mm_vet

    queries = mm_vet.load(sets / "mm_vet")
    run = write_run(tmp_path / "run", queries, {"none": [f"item {i}: a kite" for i in range(len(queries))]})
    write_json(run / "run.json", {"model": "?", "defenses": {"none": {}}, "published": True})
    return run, queries


def test_a_value_is_for_all_and_one_of_a_name_for_that_judge() -> None:
    urls = ["http://a/v1?x=1", "davsp=http://b/v1?x=1"]
    several = settings(["davsp", "keyword", "mm-vet"], urls, ["mm-vet=org/m=2", "davsp=d"], runs=5)
    assert several.urls == {"davsp": "http://b/v1?x=1", "mm-vet": "http://a/v1?x=1"}
    assert several.models == {"mm-vet": "org/m=2", "davsp": "d"} and several.variables == {} and several.runs == 5
    assert settings(["harmbench"], models=["/models/a=b"]).models == {"harmbench": "/models/a=b"}


@pytest.mark.parametrize(("names", "options", "says"), [
    (["davsp"], {"models": ["dvsp=m"]}, r"--judge-model .* none of the judges here that ask a model \(davsp\)"),
    (["davsp", "keyword"], {"urls": ["keyword=http://a"]}, r"--judge-url .* none of the judges here .* \(davsp\)"),
    (["keyword"], {"models": ["m"]}, "--judge-model goes with a judge that asks a model; keyword asks none"),
    ([], {"models": ["keyword=m"]}, "there are none"),
    (["davsp"], {"models": ["m", "n"]}, "--judge-model is there twice for all judges; give NAME=VALUE for each of davsp"),
    (["davsp"], {"models": ["davsp=m", "davsp=n"]}, "--judge-model is there twice for davsp"),
    (["davsp"], {"models": ["davsp="]}, "--judge-model has an empty value"),
    (["davsp"], {"urls": [""]}, "--judge-url has an empty value"),
    (["davsp"], {"variables": ["davsp=NO_SUCH_KEY"]}, "the environment variable NO_SUCH_KEY is empty"),
    (["davsp", "keyword", "davsp"], {}, "--judge names davsp twice"),
    (["davsp", "exact"], {"runs": 5}, "--grader-runs goes with --judge mm-vet"),
    (["llava-bench"], {"runs": 1}, "--grader-runs goes with --judge mm-vet"),
])  # fmt: skip
def test_options_that_do_not_fit(names: list[str], options: dict[str, Any], says: str) -> None:
    with pytest.raises(DavspError, match=says):
        settings(names, **options)


@pytest.mark.parametrize("spec", ["sk-secret", "sk-secret==", "davsp=sk-secret"])
def test_a_key_in_place_of_its_variable_is_not_repeated(spec: str) -> None:
    with pytest.raises(DavspError) as error:
        settings(["davsp"], variables=[spec])
    assert "secret" not in str(error.value)


def test_each_judge_has_its_own_server_model_and_key(
    server: Judge, sets: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge on one server with a key, a grader on another without one, in one command."""
    monkeypatch.setenv("MY_KEY", "k-1")
    said = [("item 1: a kite", "stop")]
    monkeypatch.setattr("davsp.LVLM.completions", lambda self, canvas, questions, *_, **__: said * len(questions))
    out, both = tmp_path / "out", [f"{name}={sets / name}" for name in ("figstep", "mm_vet")]
    with judge_server() as other:
        other.say = lambda n: "0.5"
        assert davsp(
            "eval", "--benchmark", both[0], "--benchmark", both[1], "--model", tiny_folder, "--out", out,
            "--defense", "none", "--judge", "davsp", "--judge", "mm-vet", "--judge-model", "j",
            "--judge-model", "mm-vet=g", "--judge-url", server.url, "--judge-url", f"mm-vet={other.url}",
            "--judge-key-env", "davsp=MY_KEY", "--grader-runs", 2,
        ) == 0  # fmt: skip
        assert {b["model"] for b in server.bodies} == {"j"} and {b["model"] for b in other.bodies} == {"g"}
        assert {h.get("Authorization") for h in server.headers} == {"Bearer k-1"}
        assert {h.get("Authorization") for h in other.headers} == {None}
    grades = read_jsonl(out / "grades.jsonl", Grade)
    assert {g.judge for g in grades} == {"mm-vet/1:g"} and sorted({g.run for g in grades}) == [0, 1]
    assert "k-1" not in "".join(path.read_text(errors="replace") for path in out.iterdir())


def test_runs_of_the_grader_are_averaged_kept_and_added_to(
    server: Judge, sets: Path, graded: tuple[Path, list[Query]]
) -> None:
    """Two runs, then five: the first two are in the cache, and the score is the mean over runs."""
    run, queries = graded
    replies = iter(range(1000))
    server.say = lambda n: (
        f"{next(replies) // len(queries) % 2}"
    )  # 0 in the first, third and fifth run, 1 in the others
    command = ("judge", run, "--judge", "mm-vet", "--benchmark", f"mm_vet={sets / 'mm_vet'}", "--judge-url", server.url,
               "--judge-model", "m", "--concurrency", 1)  # fmt: skip

    def total() -> dict[str, Any]:
        rows = json.loads((run / "metrics-mm-vet-1-m.json").read_text())["rows"]
        return next(r for r in rows if (r["split"], r["metric"]) == ("total", "score"))

    assert davsp(*command) == 0
    assert total()["value"] == 0 and "std" not in total()  # one run says nothing of how runs differ
    assert davsp(*command, "--grader-runs", 2) == 0
    assert total()["value"] == 0.5 and total()["std"] == 0.5 and server.requests.total() == 2 * len(queries)
    assert davsp(*command, "--grader-runs", 5) == 0
    assert total()["value"] == pytest.approx(0.4) and server.requests.total() == 5 * len(queries)
    grades = read_jsonl(run / "grades-mm-vet-1-m.jsonl", Grade)
    assert [(g.query_id, g.run) for g in grades] == [(q.id, r) for r in range(5) for q in queries]
    assert davsp(*command, "--grader-runs", 5) == 0 and server.requests.total() == 5 * len(queries)


def test_the_worst_case_takes_a_run_that_could_not_tell_for_0(graded: tuple[Path, list[Query]]) -> None:
    from davsp.benchmarks import mm_vet
    from davsp.query import Response

    _, queries = graded
    grades = [
        Grade(q.id, "none", "g", () if run and q is queries[0] else (1.0,), run=run) for run in (0, 1) for q in queries
    ]
    rows = mm_vet.score(queries, [Response(q.id, "none", "a kite") for q in queries], grades).rows
    value = {r["metric"]: r["value"] for r in rows if r["split"] == "total"}
    assert value["score"] == 1 and value["score_worst_case"] == pytest.approx(5.5 / 6)
    assert value["unscored"] == pytest.approx(0.5 / 6)


@pytest.mark.parametrize("options", [("--judge", "keyword"), ("--judge", "exact"), ("--judge", "llava-bench")])
def test_runs_without_their_grader_are_refused(options: tuple[str, ...], sets: Path, tmp_path: Path, capsys) -> None:
    options_of_set = ("--benchmark", f"mm_vet={sets / 'mm_vet'}", "--grader-runs", 5)
    assert davsp("eval", *options_of_set, *options, "--out", tmp_path / "out") == 2
    assert "--grader-runs goes with --judge mm-vet" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert davsp("judge", tmp_path, *options_of_set, *options) == 2


def test_a_grader_of_a_set_that_is_not_asked_is_refused(sets: Path, tmp_path: Path, capsys) -> None:
    options_of_set = ("--benchmark", f"figstep={sets / 'figstep'}", "--out", tmp_path / "out")
    assert davsp("eval", *options_of_set, "--judge", "exact") == 2
    assert "--judge exact grades mm_vet, which no --benchmark names" in capsys.readouterr().err
