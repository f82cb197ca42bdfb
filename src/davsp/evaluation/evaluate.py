"""Queries x defenses x judge -> responses, verdicts, and the tidy metrics with intervals.

With an `out` folder every step is a file: `responses.jsonl` grows by one batch at a time, so a run that was killed goes
on where it stopped and ends with the same answers (`davsp.store`); `verdicts.jsonl` follows from them; `metrics.json` from both.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from davsp import metrics
from davsp.defenses.base import Defense
from davsp.errors import DavspError, Interrupted
from davsp.evaluation.fitting import fitting
from davsp.evaluation.judging import Judgement, judge_custom, judge_published
from davsp.judges import Judge, keyword
from davsp.judges.graders import Grader
from davsp.judges.guard import end_help, help_judge
from davsp.lvlm import AnsweringLVLM, model_facts, model_name, template_of, undefended
from davsp.lvlm.templates import CHECKPOINT
from davsp.query import Grade, Query, Response, Verdict, turns_fault, write_jsonl
from davsp.runtime import parallel
from davsp.runtime.files import alone, write_json
from davsp.runtime.progress import bar as progress_bar
from davsp.runtime.thought import TAGS
from davsp.store import GRADES, METRICS, RESPONSES, VERDICTS, Answers, Store
from davsp.vector import HarmfulnessVector


@dataclass(frozen=True)
class Evaluation:
    """Responses, verdicts and grades by defense, and the rows of metrics.json."""

    responses: dict[str, list[Response]]
    verdicts: dict[str, list[Verdict]]
    rows: list[dict[str, Any]]
    grades: dict[str, list[Grade]] = field(default_factory=dict)


def evaluate(
    lvlm: AnsweringLVLM,
    defenses: Mapping[str, Defense],
    queries: Sequence[Query],
    out: str | Path | None = None,
    vector: HarmfulnessVector | None = None,
    judge: Judge = keyword,
    *,
    graders: Mapping[str, Grader] | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    baseline: str = "none",
    redo: bool = False,
    seed: int = 0,
    console: Console | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Answer all queries under each defense, judge the answers, and measure.

    Args:
        lvlm: the frozen model.
        defenses: by the name they have in all files and tables.
        queries: malicious and benign, ids unique.
        out: folder of the run; None keeps everything in memory only.
        vector: records the projection of each defended query with its response.
        judge: of the answers to malicious queries.
        graders: None for custom queries. For those of the published sets: set -> its grader, or {}; each set is
            then scored as its authors do (`davsp.evaluation.judging`).
        batch_size: queries a forward, and responses written at a time. Queries of like length share a batch.
        max_new_tokens: the longest answer, in tokens; None: by model, 48 for one that ships, else 1,024.
        baseline: the defense that the paired differences start from; if it is not among `defenses`, there are none.
        redo: what to do with responses of another model, defense or set of queries found in `out`: answer anew
            and say why, or refuse.
        seed: of the bootstrap.
        console: where progress and notes go; None is silent.
        manifest: for manifest.json, which is written as soon as `out` is known to be this run's; the model's facts and the longest
            answer are added.

    Raises:
        DavspError: no queries, an id twice, an unreadable picture, a query that the model has no room for, responses in `out` that belong to another
            run and `redo` is False, another process writes there, or a defense does not go with the model.
        Interrupted: Ctrl-C; what was answered is kept.

    Of several processes only the first judges, but for a guard that runs here, which all do; the others return the responses alone.
    """
    _check(queries, defenses)
    for defense in defenses.values():  # all before the first is asked
        defense.check(lvlm)
    out = None if out is None else Path(out)
    max_new_tokens = max_new_tokens or lvlm.longest
    fitting(lvlm, defenses, queries, max_new_tokens)
    console = console or Console(quiet=True)
    with nullcontext() if out is None or parallel.rank() > 0 else alone(out):
        responses = _answers(
            lvlm,
            defenses,
            queries,
            out,
            vector,
            graders is not None,
            batch_size,
            max_new_tokens,
            redo,
            console,
            manifest,
        )
        if parallel.rank() > 0:
            help_judge(judge)
            return Evaluation(responses, {}, [])
        name = model_name(lvlm)
        if graders is None:
            judgement = judge_custom(queries, responses, judge, name, baseline, seed)
        else:
            judgement = judge_published(queries, responses, judge, graders, name, baseline, seed)
        end_help(judge)
        costs = metrics.cost_rows(name, responses, baseline) + metrics.length_rows(name, responses, max_new_tokens)
        judgement = replace(judgement, rows=judgement.rows + costs)
        if out is not None:
            _write(out, judgement)
    return Evaluation(responses, judgement.verdicts, judgement.rows, judgement.grades)


def _write(out: Path, judgement: Judgement) -> None:
    """What follows from the answers; grades of an earlier command do not stay beside metrics that know nothing of them."""
    write_jsonl(out / VERDICTS, chain.from_iterable(judgement.verdicts.values()))
    if any(judgement.grades.values()):
        write_jsonl(out / GRADES, chain.from_iterable(judgement.grades.values()))
    else:
        (out / GRADES).unlink(missing_ok=True)
    write_json(out / METRICS, metrics.metrics_file(judgement.rows))


def _answers(
    lvlm: AnsweringLVLM,
    defenses: Mapping[str, Defense],
    queries: Sequence[Query],
    out: Path | None,
    vector: HarmfulnessVector | None,
    published: bool,
    batch_size: int,
    max_new_tokens: int,
    redo: bool,
    console: Console,
    manifest: Mapping[str, Any] | None,
) -> Answers:
    """The answers under each defense in the order of the queries, kept in `out` while they come."""
    plan = planned(queries)
    facts = model_facts(lvlm)
    settings = {
        "model": facts["weights"],
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "vector": _vector_hash(vector),
        "published": published,
        "template": None if template_of(lvlm) == CHECKPOINT else template_of(lvlm),  # older runs know of none
        "reasoning_tags": None if lvlm.reasoning_tags == TAGS else lvlm.reasoning_tags,  # older runs know of none
        "prefill": (begun := facts.get("prefill"))
        and {"text": begun, "kept": "what follows"},  # older runs know of none
        "barred": facts.get("barred"),  # older runs know of none
        "undefended_picture": None,
    } | undefended.in_records(lvlm, queries)
    described = {name: defense.describe() for name, defense in defenses.items()}
    if manifest is not None:
        seen = undefended.facts(lvlm, queries)
        manifest = {**facts, "max_new_tokens": max_new_tokens, "undefended": seen, **manifest}
    store = None if out is None else Store(out, settings, described, plan, queries, batch_size, manifest)
    responses = {name: [] for name in defenses} if store is None else store.open(redo, console)
    try:
        _answer(lvlm, defenses, plan, responses, store, vector, batch_size, max_new_tokens, console)
        responses = parallel.shared(responses)
    except KeyboardInterrupt:
        kept = out and f"the answers so far are in {out / RESPONSES}: give the same command again to go on"
        raise Interrupted(f"stopped; {kept or 'nothing was kept'}") from None
    responses = _ordered(queries, responses)
    if store is not None:
        store.finish(responses)
    return responses


def planned(queries: Sequence[Query]) -> list[Query]:
    """The order in which queries are answered: with a picture before those without, the longest question (or conversation) first.

    So a batch has little padding, and what takes most memory comes at once. The same for every model and defense.
    """
    return sorted(queries, key=lambda q: (q.image is None, -len(q.told)))


def _answer(
    lvlm: AnsweringLVLM,
    defenses: Mapping[str, Defense],
    plan: Sequence[Query],
    done: Answers,
    store: Store | None,
    vector: HarmfulnessVector | None,
    batch_size: int,
    max_new_tokens: int,
    console: Console,
) -> None:
    """Answer what is not done yet and add it to `done` and to the store, batch by batch in the order of the plan.

    Of several processes each takes the next batch that nobody has, under whatever defense, so a long answer holds nobody else.
    """
    batches = [(name, at) for name in defenses for at in range(len(done[name]), len(plan), batch_size)]
    with progress_bar(console) as bar:
        tasks = {
            name: bar.add_task(name, total=len(plan), completed=len(done[name]), visible=False) for name in defenses
        }

        def answers(number: int) -> list[Response]:
            name, at = batches[number]
            bar.update(tasks[name], visible=True)
            advance = partial(bar.advance, tasks[name])
            responses = defenses[name].respond(
                lvlm, plan[at : at + batch_size], vector, batch_size, advance, max_new_tokens
            )
            return [replace(response, defense=name) for response in responses]

        for number, responses in parallel.work(len(batches), answers):
            name, _ = batches[number]
            if store is not None:
                store.append(responses)
            done[name] += responses
            bar.update(tasks[name], completed=len(done[name]), visible=len(done[name]) < len(plan))


def _ordered(queries: Sequence[Query], responses: Mapping[str, Sequence[Response]]) -> dict[str, list[Response]]:
    """The responses in the order of the queries."""
    place = {q.id: i for i, q in enumerate(queries)}
    return {name: sorted(answers, key=lambda r: place[r.query_id]) for name, answers in responses.items()}


def _check(queries: Sequence[Query], defenses: Mapping[str, Defense]) -> None:
    if not queries:
        raise DavspError("evaluate got no queries; give at least one")
    if not defenses:
        raise DavspError('evaluate got no defense; give at least {"none": NoDefense()}')
    seen: set[str] = set()
    for q in queries:
        if q.id in seen:
            raise DavspError(f"the query id {q.id!r} is there twice; make the ids unique")
        seen.add(q.id)
        if q.turns:
            _check_turns(q, defenses)


def _check_turns(query: Query, defenses: Mapping[str, Defense]) -> None:
    if why := turns_fault(query.turns):
        raise DavspError(f"query {query.id!r}: {why}; mend them")
    if name := next((name for name, defense in defenses.items() if not defense.conversations), None):
        raise DavspError(
            f"query {query.id!r} has turns before its question, and {name} takes single questions; leave one of the two out"
        )


def _vector_hash(vector: HarmfulnessVector | None) -> str | None:
    if vector is None:
        return None
    return sha256(
        f"{vector.layer}".encode() + vector.direction(vector.layer).float().cpu().numpy().tobytes()
    ).hexdigest()
