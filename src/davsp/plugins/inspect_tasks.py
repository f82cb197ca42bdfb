"""The six benchmarks as Inspect tasks, scored by davsp's own scorers.

Each answer is scored by its judge, grader or words as it comes; the figures of the log are those that `davsp eval` would write
of the same answers. What a judge cannot tell has the value "unscored": it counts neither as safe nor as unsafe, its share stands
beside the rate, and so does the rate with all of it unsafe.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import anyio
from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, Content, ContentImage, ContentText, GenerateConfig
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import TaskState, generate

from davsp.benchmarks import BENCHMARKS
from davsp.benchmarks.mme import PARSERS
from davsp.errors import DavspError
from davsp.judges import keyword, withheld
from davsp.judges.graders import exact, grades_of, overlap
from davsp.judges.keyword_lists import LISTS
from davsp.judges.verdicts import verdicts_of
from davsp.lvlm import answer_length
from davsp.query import Grade, Query, Response, Verdict
from davsp.runtime.pictures import data_url, png
from davsp.runtime.thought import CUT, split_thought

OFFLINE: dict[str, Any] = {"keyword": keyword, **LISTS, "exact": exact, "overlap": overlap}
"""Judges and graders that ask no model."""

USUAL = {"mm_vet": "exact", "llava_bench": "overlap", "mme": ""}
"""Set -> what scores it where nothing is said; the harmful sets: keyword. MME goes by its words."""

WHOSE = "inspect"  # all answers of a log are of one defense, which the model's metadata names


def _task(name: str) -> Callable[..., Task]:
    def make(
        folder: str | None = None,
        split: str = "test",
        limit: int | None = None,
        seed: int = 0,
        judge: str = USUAL.get(name, "keyword"),
        judge_model: str | None = None,
        judge_url: str | None = None,
        judge_key_env: str | None = None,
        max_new_tokens: int | None = None,
    ) -> Task:
        queries = BENCHMARKS[name].load(
            Path(_embedded(seed).name, name) if folder is None else Path(folder), split, limit, seed
        )
        whole = name if folder else f"{name}_embedded"
        alone = len({query.benchmark for query in queries}) == 1
        return Task(
            dataset=MemoryDataset([_sample(query) for query in queries], name=queries[0].benchmark if alone else whole),
            solver=generate(),
            scorer=davsp_scorer(name, judge, judge_model, judge_url, judge_key_env),
            epochs=Epochs(1, "mode"),  # the usual reducer, the mean, would make numbers of verdicts
            config=GenerateConfig(temperature=0, max_tokens=max_new_tokens or answer_length(shipped=folder is None)),
            metadata={"embedded counterpart": folder is None, "split": split, "seed": seed},
        )

    make.__doc__ = f"""{name}: the set in a folder (docs/benchmarks.md), else its embedded counterpart.

    Args:
        folder: of the download; None: the small counterpart that davsp draws, in davsp-mini's words.
        split: of the set, as its loader knows it.
        limit: at most so many, drawn with `seed`, whole groups.
        seed: of the draw.
        judge: a name of docs/judges.md; a guard is asked on a server, never run here.
        judge_model, judge_url, judge_key_env: of a judge that asks a model, as for `davsp eval`.
        max_new_tokens: of an answer; None: 1,024, of the embedded counterpart 48.

    Raises:
        DavspError: no such set there, or no such judge.
    """
    return task(name=name)(make)


mm_safetybench, figstep, vlguard = _task("mm_safetybench"), _task("figstep"), _task("vlguard")
mm_vet, mme, llava_bench = _task("mm_vet"), _task("mme"), _task("llava_bench")


@cache
def _embedded(seed: int) -> tempfile.TemporaryDirectory[str]:
    """A folder with all six counterparts; the cache keeps it until the process ends."""
    from davsp.embedded.counterparts import write

    folder = tempfile.TemporaryDirectory(prefix="davsp-")
    write(Path(folder.name), seed)
    return folder


def _sample(query: Query) -> Sample:
    content: list[Content] = [] if query.image is None else [ContentImage(image=_url(query))]
    facts = {name: value for name, value in _facts(query).items() if name != "question"}
    return Sample(
        id=query.id,
        input=[ChatMessageUser(content=[*content, ContentText(text=query.question)])],
        target=query.reference or query.label,
        metadata=facts | {"question": query.question},
    )


def _url(query: Query) -> str:
    """The picture's file; of one without a file a lossless data URL."""
    if isinstance(query.image, Path):
        return str(query.image)
    picture = query.picture()
    assert picture is not None
    return data_url(png(picture))


def _facts(query: Query) -> dict[str, Any]:
    """The query without its picture, as JSON; those of the published sets have no turns."""
    return {field.name: getattr(query, field.name) for field in fields(query) if field.name not in ("image", "turns")}


def _query(facts: dict[str, Any]) -> Query:
    return Query(**{**facts, "answers": tuple(facts["answers"])})


# ---------------------------------------------------------------------------------------------------------- scoring


@metric
def figures(name: str) -> Metric:
    """The set's own figures, `SPLIT METRIC` with its 95 % interval as `… low` and `… high`; a rate of nothing is left out.

    Where a set has several parts (MM-SafetyBench's forms, VLGuard's subsets), those of a part begin with its name. Totals come first, as
    Inspect's list of logs shows the first figure alone.
    """

    def measure(scores: list[SampleScore]) -> dict[str, float]:
        queries = [_query(dict(score.sample_metadata or {})) for score in scores]
        if len({query.id for query in queries}) < len(queries):
            raise DavspError("a sample is scored twice; davsp's answers are greedy, so ask for one epoch.")
        answers = [
            Response(query.id, WHOSE, score.score.answer or "", cut=bool((score.score.metadata or {}).get("cut")))
            for query, score in zip(queries, scores, strict=True)
        ]
        records = [
            _record(record) for score in scores if (record := (score.score.metadata or {}).get("said")) is not None
        ]
        judgements = {} if name == "mme" else {"judge": records}
        values: dict[str, float] = {}
        rows = BENCHMARKS[name].score(queries, answers, **judgements).rows
        alone = len({row["benchmark"] for row in rows}) == 1
        parts = [
            "" if alone or row["benchmark"] in (name, f"{name}_embedded") else f"{row['benchmark']} " for row in rows
        ]
        order = sorted(range(len(rows)), key=lambda i: (parts[i] != "", rows[i]["split"] != "total"))
        for row, where in ((rows[i], parts[i]) for i in order):
            ends = {"": row["value"], " low": row["low"], " high": row["high"]}
            values |= {f"{where}{row['split']} {row['metric']}{end}": v for end, v in ends.items() if v is not None}
        return values

    return measure  # type: ignore[return-value]  # a Metric by its signature


def davsp_scorer(name: str, judge: str, model: str | None, url: str | None, key_env: str | None) -> Scorer:
    """Scores one answer of a set: safe, unsafe or unscored; right or wrong; a grade; of harmless questions refused or answered."""

    @scorer(metrics=[figures(name)], name=f"davsp/{name}")
    def of_set(judge: str = judge, model: str | None = model) -> Scorer:
        judge_of_set = None if name == "mme" else _judge(judge, model, url, key_env)

        async def score(state: TaskState, target: Target) -> Score:
            query = _query(dict(state.metadata))
            thought, text, cut = split_thought(state.output.completion)
            answer = Response(query.id, WHOSE, text, thought=thought, cut=cut)
            return await anyio.to_thread.run_sync(_scored, name, query, answer, judge_of_set)

        return score

    return of_set()


def _judge(name: str, model: str | None, url: str | None, key_env: str | None) -> Any:
    if name in OFFLINE:
        return OFFLINE[name]
    from davsp.judges.chat import ChatJudge
    from davsp.judges.graders import GRADERS
    from davsp.judges.guard import GUARDS
    from davsp.judges.prompts import CHAT
    from davsp.runtime.client import OPENAI

    prompts = CHAT | GUARDS | GRADERS
    if name not in prompts:
        raise DavspError(f"there is no judge {name!r}; choose one of {', '.join([*OFFLINE, *prompts])}.")
    if model is None:
        raise DavspError(f"judge_model is missing: the judge {name} asks a model on a server.")
    return ChatJudge(prompts[name], model, url or OPENAI, key_env or ("OPENAI_API_KEY" if url is None else None))


def _scored(name: str, query: Query, answer: Response, judge: Any) -> Score:
    if answer.cut and (name == "mme" or (name not in USUAL and query.label == "benign")):  # nobody is asked
        return Score(value="unscored", answer=answer.text, explanation=CUT, metadata={"cut": True})
    if name == "mme":
        right = PARSERS["official"](answer.text) == query.reference.lower()
        return Score(value="right" if right else "wrong", answer=answer.text, explanation="by its words")
    records: Sequence[Verdict | Grade]
    records = grades_of([query], [answer], judge) if name in USUAL else verdicts_of([query], [answer], judge)
    if not records:  # a harmless question of a harmful set: no judge is asked
        value = "refused" if withheld(answer.text) else "answered"
        return Score(value=value, answer=answer.text, explanation="by its words")
    record = records[0]
    value = record.label if isinstance(record, Verdict) else ", ".join(f"{s:g}" for s in record.scores) or "unscored"
    return Score(
        value=value,
        answer=answer.text,
        explanation=f"{record.judge}: {record.reason}",
        metadata={"said": asdict(record), "cut": answer.cut},
    )


def _record(facts: dict[str, Any]) -> Verdict | Grade:
    return Grade(**{**facts, "scores": tuple(facts["scores"])}) if "scores" in facts else Verdict(**facts)
