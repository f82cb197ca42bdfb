"""davsp under Inspect itself: its eval on davsp-mini, and the log read back.

`pip install -c requirements.lock -e '.[inspect]'`, then `python -m pytest tests/test_inspect.py`.
"""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="needs the extra: pip install -c requirements.lock -e '.[inspect]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs to mend

from inspect_ai import eval as inspect_eval  # noqa: E402
from inspect_ai.log import EvalLog, read_eval_log  # noqa: E402
from inspect_ai.model import (  # noqa: E402
    ChatMessageSystem,
    ChatMessageUser,
    ContentAudio,
    ContentImage,
    ContentText,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import SampleScore  # noqa: E402

from davsp import DavspError, Query, VisualSafetyPrompt, embedded, evaluate  # noqa: E402
from davsp.benchmarks import BENCHMARKS  # noqa: E402
from davsp.defenses import Gate, VisualPrompt  # noqa: E402
from davsp.embedded.counterparts import SETS  # noqa: E402
from davsp.judges import keyword  # noqa: E402
from davsp.judges.graders import exact, overlap  # noqa: E402
from davsp.plugins import inspect as plugin  # noqa: E402
from davsp.plugins import inspect_tasks  # noqa: E402
from davsp.query import Response  # noqa: E402
from tiny import picture  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained border for davsp-mini."""
    made = tmp_path_factory.mktemp("prompt")
    prompt = VisualSafetyPrompt.create(embedded.load().canvas, embedded.PADDING, "random", text=embedded.SAFETY_TEXT)
    prompt.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def sets() -> Path:
    """The embedded counterparts."""
    return Path(inspect_tasks._embedded(0).name)


def run(name: str, folder: Path, logs: Path, limit: int = 4, **arguments: Any) -> EvalLog:
    """`inspect eval davsp/NAME --model davsp/davsp-mini -M defense=FOLDER -T limit=...`, and its log as it reads back."""
    (log,) = inspect_eval(
        f"davsp/{name}",
        model="davsp/davsp-mini",
        model_args={"defense": str(folder), "device_map": "cpu"},
        task_args={"limit": limit, "max_new_tokens": 24, **arguments},
        log_dir=str(logs),
        display="none",
    )
    return read_eval_log(log.location)


@pytest.mark.parametrize("name", SETS)
def test_each_benchmark_gives_davsps_own_figures(name: str, folder: Path, sets: Path, tmp_path: Path):
    """The entry points are found, and every rate in the log is the one that `evaluate` makes of the same queries."""
    log = run(name, folder, tmp_path)
    assert log.status == "success", log.error
    queries = BENCHMARKS[name].load(sets / name, "test", 4, 0)
    graders = {"mm_vet": exact, "llava_bench": overlap}
    defense = VisualPrompt(VisualSafetyPrompt.from_pretrained(folder))
    evaluation = evaluate(
        embedded.load(), {"davsp": defense}, queries, judge=keyword, graders=graders, max_new_tokens=24, baseline=""
    )
    (scores,) = log.results.scores
    assert next(iter(scores.metrics)).endswith(
        ("total rsr", "total score", "total score_official", "total relative_score")
    )
    assert name == "vlguard" or not next(iter(scores.metrics)).startswith(f"{queries[0].benchmark} ")
    assert {name: metric.value for name, metric in scores.metrics.items()} == pytest.approx(
        figures_of(evaluation.rows, name)
    )
    answers = {sample.id: sample.output.completion for sample in log.samples}
    assert answers == {response.query_id: response.text for response in evaluation.responses["davsp"]}
    values = {score.value for sample in log.samples for score in sample.scores.values()}
    known = {"safe", "unsafe", "unscored", "refused", "answered", "right", "wrong"}
    assert values <= known or name in graders
    metadata = log.samples[0].output.metadata
    assert metadata["defense"] == "davsp" and log.samples[0].output.usage.input_tokens > 0
    assert log.eval.model == f"davsp/davsp-mini+davsp-{defense.sha256()[:12]}"
    assert log.eval.model_args["defense"] == str(folder) and log.eval.dataset.name == f"{name}_embedded"


def test_a_gate_by_its_name(folder: Path, sets: Path, tmp_path: Path):
    """What it refuses and passes is what `Gate` does with the same queries, in answers and calls."""
    log = run("vlguard", f"gate+{folder}", tmp_path, limit=6)  # type: ignore[arg-type]
    assert log.status == "success", log.error
    gate = Gate(VisualPrompt(VisualSafetyPrompt.from_pretrained(folder)))
    some = BENCHMARKS["vlguard"].load(sets / "vlguard", "test", 6, 0)
    want = {r.query_id: (r.text, r.calls) for r in gate.respond(embedded.load(), some, max_new_tokens=24)}
    outputs = {sample.id: sample.output for sample in log.samples}
    assert {i: (one.completion, one.metadata["calls"]) for i, one in outputs.items()} == want
    assert {calls for _, calls in want.values()} == {1, 2}
    assert {one.metadata["defense"] for one in outputs.values()} == {"gate+davsp"}


def figures_of(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
    """As the log names them."""
    found, parts = {}, {row["benchmark"] for row in rows} - {"cost"}
    for row in rows:
        if row["benchmark"] == "cost" or row["value"] is None:
            continue
        where = "" if len(parts) == 1 or row["benchmark"] == f"{name}_embedded" else f"{row['benchmark']} "
        for end, column in (("", "value"), (" low", "low"), (" high", "high")):
            if row[column] is not None:
                found[f"{where}{row['split']} {row['metric']}{end}"] = row[column]
    return found


def test_unscored_is_never_safe(sets: Path):
    """An answer without words: not in the rate, counted, and unsafe in the worst case."""
    queries = BENCHMARKS["figstep"].load(sets / "figstep", "test", 6, 0)[:3]
    texts = ["i am sorry , i cannot help with that .", "...", "here are the steps"]
    scores = [
        inspect_tasks._scored("figstep", q, Response(q.id, "inspect", text), keyword)
        for q, text in zip(queries, texts, strict=True)
    ]
    assert [score.value for score in scores] == ["safe", "unscored", "unsafe"]
    samples = [
        SampleScore(score=score, sample_id=q.id, sample_metadata=inspect_tasks._facts(q))
        for score, q in zip(scores, queries, strict=True)
    ]
    found = inspect_tasks.figures("figstep")(samples)
    assert (
        found["total rsr"] == 0.5 and found["total unscored"] == pytest.approx(1 / 3) == found["total rsr_worst_case"]
    )
    with pytest.raises(DavspError, match="one epoch"):
        inspect_tasks.figures("figstep")(samples * 2)


def test_a_cut_thought_is_unscored(sets: Path):
    """By judges, graders, MME's words and over-refusal alike."""
    for name, judge in {"figstep": keyword, "mm_vet": exact, "mme": None, "vlguard": keyword}.items():
        queries = BENCHMARKS[name].load(sets / name, "test")
        query = next(q for q in queries if q.label == ("malicious" if name == "figstep" else "benign"))
        score = inspect_tasks._scored(name, query, Response(query.id, "inspect", "", thought="i", cut=True), judge)
        assert score.value == "unscored" and score.metadata["cut"], name
    sample = SampleScore(score=score, sample_id=query.id, sample_metadata=inspect_tasks._facts(query))
    found = inspect_tasks.figures("vlguard")([sample])
    assert found["total cut"] == 1.0 and "total over_refusal" not in found


def test_the_provider_tells_thought_and_answer_apart(monkeypatch: pytest.MonkeyPatch):
    import anyio

    api = plugin.DavspAPI("davsp-mini", defense="none", device_map="cpu")
    said = [("<think>i cannot</think> red", "stop"), ("<think>i cannot", "length")]
    monkeypatch.setattr(api.defended.lvlm, "completions", lambda *args, **options: [said.pop(0)])
    asked = [ChatMessageUser(content="what colour is it ?")]
    whole, cut = (anyio.run(api.generate, asked, [], "none", GenerateConfig(max_tokens=99)) for _ in range(2))
    assert whole.completion == "red" and whole.choices[0].message.content[0].reasoning == "i cannot"
    assert whole.stop_reason == "stop" and (cut.completion, cut.stop_reason) == ("", "max_tokens")


def test_a_model_without_a_word_on_its_defense_is_refused(folder: Path):
    with pytest.raises(DavspError, match="-M defense=FOLDER, or -M defense=none"):
        plugin.DavspAPI("davsp-mini")
    with pytest.raises(DavspError, match="neither a folder nor reachable"):
        plugin.DavspAPI("davsp-mini", defense="me/none")
    with pytest.raises(DavspError, match="no kind 'first,ecso'"):  # Inspect parts -M values at commas
        plugin.DavspAPI("davsp-mini", defense=["gate:first", f"ecso+{folder}"])
    with pytest.raises(DavspError, match="takes no model-base-url"):
        plugin.DavspAPI("davsp-mini", base_url="http://x", defense="none")
    undefended, defended = (plugin.DavspAPI("davsp-mini", defense=d) for d in ("none", str(folder)))
    assert undefended.base_url != defended.base_url  # of which Inspect's cache makes its keys
    assert undefended.model_name == "davsp-mini+none"
    again = plugin.DavspAPI(defended.model_name, defense=str(folder))  # as `inspect eval-retry` asks for it
    assert again.model_name == defended.model_name != "davsp-mini"
    with pytest.raises(DavspError, match=r"-M defense=none makes davsp-mini\+none, not davsp-mini\+davsp-"):
        plugin.DavspAPI(defended.model_name, defense="none")


def test_requests_that_wait_are_answered_together(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """To the same answers as alone."""
    import anyio

    api = plugin.DavspAPI("davsp-mini", defense=str(folder), device_map="cpu")
    sizes: list[int] = []
    answer = api._answer
    monkeypatch.setattr(api, "_answer", lambda batch: (sizes.append(len(batch)), answer(batch))[1])
    questions = ["what does the picture show ?", "what colour is it ?", "how many are there ?", "is it red ?"]
    inputs = [
        [ChatMessageUser(content=[ContentImage(image=_url(i)), ContentText(text=question)])]
        for i, question in enumerate(questions)
    ]
    texts: dict[int, str] = {}

    async def one(i: int) -> None:
        texts[i] = (await api.generate(inputs[i], [], "none", GenerateConfig(max_tokens=8))).completion

    async def together() -> None:
        async with anyio.create_task_group() as group:
            for i in range(4):
                group.start_soon(one, i)

    anyio.run(together)
    assert sum(sizes) == 4 and len(sizes) < 4 and not api.waiting
    model = api.defended
    assert [texts[i] for i in range(4)] == model.generate([picture(i) for i in range(4)], questions, max_new_tokens=8)


def _url(seed: int) -> str:
    return inspect_tasks._url(Query("", "", "benign", "", image=picture(seed)))


def test_what_cannot_be_asked_is_refused(tmp_path: Path):
    def user(*parts: Any) -> list[Any]:
        return [ChatMessageUser(content=list(parts))]

    text, shown = ContentText(text="what"), ContentImage(image=_url(1))
    assert plugin.question([ChatMessageUser(content="what")]).question == "what"
    assert plugin.question(user(shown, text)).image.tobytes() == picture(1).tobytes()
    picture(2).save(tmp_path / "p.png")
    assert plugin.question(user(ContentImage(image=str(tmp_path / "p.png")))).image.tobytes() == picture(2).tobytes()
    for messages, says in (
        (user(shown, shown, text), "one picture a question, not 2"),
        (user(ContentImage(image="https://example.org/a.png"), text), "fetches no pictures"),
        (user(ContentImage(image="data:image/png;base64,aGVsbG8="), text), "cannot be read"),
        (user(ContentAudio(audio="a.wav", format="wav"), text), "nothing defends a part of type audio"),
        ([ChatMessageSystem(content="be"), *user(text)], "one message of role user, not system, user"),
    ):
        with pytest.raises(DavspError, match=says):
            plugin.question(messages)
    for config, says in (
        (GenerateConfig(temperature=0.7), "temperature must be 0"),
        (GenerateConfig(num_choices=2), "num_choices must be 1"),
        (GenerateConfig(stop_seqs=["x"]), "know no stop_seqs"),
    ):
        with pytest.raises(DavspError, match=says):
            plugin._check([], config)
    with pytest.raises(DavspError, match="take no tools"):
        plugin._check([1], GenerateConfig())


def test_a_judge_by_name():
    assert inspect_tasks._judge("keyword", None, None, None) is keyword
    with pytest.raises(DavspError, match="there is no judge 'oracle'"):
        inspect_tasks._judge("oracle", None, None, None)
    with pytest.raises(DavspError, match="judge_model is missing"):
        inspect_tasks._judge("davsp", None, None, None)
    asked = inspect_tasks._judge("davsp", "m", "http://127.0.0.1:1/v1", None)
    assert asked.name == "davsp/1:m"


def test_the_provider_is_found_by_its_entry_point(folder: Path):
    model = get_model("davsp/davsp-mini", defense=str(folder), device_map="cpu", memoize=False)
    assert type(model.api).__name__ == "DavspAPI"
