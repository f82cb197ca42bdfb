"""A finished run judged again: its answers stay, verdicts and metrics of the judge are added beside the others.

RUN/verdicts-<judge>.jsonl   the verdicts (of a grader: grades-<grader>.jsonl)
RUN/metrics-<judge>.json     rates, unscored answers, the rates with all of these as unsafe, and a hash of the answers judged
RUN/agreement.json           Krippendorff's α of all judges of the run, and where they differ
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from davsp import benchmarks, metrics
from davsp.benchmarks import rsr, scoring
from davsp.errors import DavspError
from davsp.evaluation.judging import judge_custom, judge_published
from davsp.judges import Judge
from davsp.judges.agreement import Agreement, agreement
from davsp.judges.graders import Grader
from davsp.judges.verdicts import judge_name
from davsp.query import Grade, Query, Response, Verdict, read_jsonl, write_jsonl
from davsp.runtime import files
from davsp.runtime.thought import TAGS, Tags, split_thought
from davsp.store import METRICS, QUERIES, RESPONSES, VERDICTS, by_defense, query_hash, recorded

_MEND = "give the --queries that it answered, or --benchmark with --split, --type and --rebuild as davsp eval had them"


@dataclass(frozen=True)
class Rescoring:
    """What a judge or grader says of a run, the rows of the metrics file, agreement with the run's other judges."""

    verdicts: dict[str, list[Verdict]]
    rows: list[dict[str, Any]]
    agreement: Agreement
    grades: dict[str, list[Grade]]


def rescore(
    run: str | Path,
    queries: Sequence[Query],
    judge: Judge | None,
    baseline: str = "none",
    seed: int = 0,
    graders: Mapping[str, Grader] | None = None,
    mode: str = "sound",
    reasoning_tags: Tags = TAGS,
) -> Rescoring:
    """Judge or grade the answers in a run folder; nothing is generated and no file of the run is changed.

    Args:
        run: folder written by `davsp.evaluate`.
        queries: those that the run answered, or more; the run knows their hashes.
        judge: of the answers to malicious queries; None with `graders`.
        baseline: the defense that differences start from, if the run has it.
        seed: of the bootstrap.
        graders: published set -> its grader, in place of the judge.
        mode: a published scorer's quirks, by name, whose rows are added to the sound ones; see docs/benchmarks.md.
        reasoning_tags: around thoughts in answers of an older run, which has them in one text.

    Raises:
        DavspError: no such run, one that isn't finished, other queries, a mode that does not go with the judge, or the judge's
            own.
    """
    run = Path(run)
    _check_mode(mode, judge, graders or {})
    responses = _responses(run, reasoning_tags)
    record = recorded(run)
    if record is None:
        raise DavspError(f"{run} does not say which queries were asked (run.json); run davsp eval.")
    if isinstance(record.get("prefill"), str):
        raise DavspError(
            f"{run} is of an older davsp, whose answers hold the beginning that --prefill gave them, and a judge would take it for the "
            "model's own words; run davsp eval anew in another folder."
        )
    run_queries, model = _run_queries(run, record, responses, queries), _model(run)
    if record.get("published"):
        judgement = judge_published(run_queries, responses, judge, graders or {}, model, baseline, seed, mode)
    elif mode != "sound":
        raise DavspError(f"{run} answers custom queries; modes are of the published sets.")
    elif judge is None:
        raise DavspError(
            f"{run} answers custom queries, which have no grader; give a judge, or a run over a published set."
        )
    else:
        judgement = judge_custom(run_queries, responses, judge, model, baseline, seed)
    name = judge_name(judge or next(iter((graders or {}).values())))
    kinds = {"verdicts": judgement.verdicts} if judge is not None else {"grades": judgement.grades}
    for kind, judgements in kinds.items():
        write_jsonl(run / f"{kind}-{slug(name)}.jsonl", chain.from_iterable(judgements.values()))
    of = {"judge": name, "answers": files.sha256(run / RESPONSES)}
    files.write_json(run / f"metrics-{slug(name)}.json", metrics.metrics_file(judgement.rows) | of)
    return Rescoring(judgement.verdicts, judgement.rows, _compare(run), judgement.grades)


def _check_mode(mode: str, judge: Judge | None, graders: Mapping[str, Grader]) -> None:
    """Raise DavspError if a mode does not go with the judge or graders, before any of them is asked."""
    if judge is not None:
        rsr.check_mode(mode, judge_name(judge))
    for name in graders:
        scoring.known_mode(name, mode, benchmarks.BENCHMARKS[name].MODES)


def slug(judge: str) -> str:
    """A judge's name as a file name: `davsp/1:org/model` -> `davsp-1-org--model`, which `org-model` is not."""
    name, _, model = judge.partition(":")
    return re.sub(r"[^\w.+-]+", "-", f"{name}:{model.replace('/', '--')}").strip("-.")


def _responses(run: Path, tags: Tags) -> dict[str, list[Response]]:
    if not (run / RESPONSES).exists():
        raise DavspError(f"{run} holds no answers ({RESPONSES}); give the folder that `davsp eval --out` wrote.")
    return {name: [_apart(r, tags) for r in answers] for name, answers in by_defense(run / RESPONSES).items()}


def _apart(response: Response, tags: Tags) -> Response:
    """The response with its thought apart, where it is not so already."""
    if response.thought or response.cut:
        return response
    thought, answer, cut = split_thought(response.text, tags)
    return replace(response, text=answer, thought=thought, cut=cut)


def _run_queries(
    run: Path, record: Mapping[str, Any], responses: dict[str, list[Response]], queries: Sequence[Query]
) -> list[Query]:
    """The queries of the run in its order, if they are the very same."""
    hashes: dict[str, str] = files.read_json(run / QUERIES)
    query_of = {q.id: q for q in queries}
    for name in hashes:
        if name not in query_of:
            raise DavspError(f"{run} answers the query {name!r}, which is not among these; {_MEND}.")
        if query_hash(query_of[name]) != hashes[name]:
            raise DavspError(f"{run} answers another query {name!r} than the one given; {_MEND}.")
    for defense in record["defenses"]:
        if {r.query_id for r in responses.get(defense, [])} != set(hashes):
            raise DavspError(f"{run} has not all answers under {defense!r}; finish the run first: davsp eval.")
    return [query_of[name] for name in hashes]


def _model(run: Path) -> str:
    try:
        return str(files.read_json(run / METRICS)["rows"][0]["model"])
    except (KeyError, IndexError, TypeError) as error:
        raise DavspError(f"{run / METRICS} names no model; run davsp eval again to finish the run.") from error


def _compare(run: Path) -> Agreement:
    """Compare all judges whose verdicts are of the answers as they are now, and write agreement.json."""
    answers = files.sha256(run / RESPONSES)
    metrics_files = {path: files.read_json(path) for path in sorted(run.glob("metrics-*.json"))}
    others = [path for path, body in metrics_files.items() if isinstance(body, dict) and body.get("answers") == answers]
    verdicts: dict[str, list[Verdict]] = {}
    for path in [run / VERDICTS, *(run / f"verdicts-{p.stem.removeprefix('metrics-')}.jsonl" for p in others)]:
        for verdict in read_jsonl(path, Verdict) if path.exists() else []:  # a grader has none
            verdicts.setdefault(verdict.judge, []).append(verdict)
    comparison = agreement(verdicts)
    files.write_json(
        run / "agreement.json",
        {
            "judges": list(verdicts),
            "alpha": comparison.alpha,
            "n": comparison.n,
            "disagreements": [
                {"defense": defense, "query_id": query_id, "labels": labels}
                for (defense, query_id), labels in comparison.disagreements.items()
            ],
        },
    )
    return comparison
