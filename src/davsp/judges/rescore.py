"""A finished run judged again: its answers stay, verdicts and metrics of the judge are added beside the others.

RUN/verdicts-<judge>.jsonl   the verdicts
RUN/metrics-<judge>.json     rates, unscored answers, the rates with all of these as unsafe, and a hash of the answers judged
RUN/agreement.json           Krippendorff's α of all judges of the run, and where they differ
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from davsp import files, metrics
from davsp.errors import DavspError
from davsp.evaluation import METRICS, VERDICTS, rows_of
from davsp.judges import Judge
from davsp.judges.agreement import Agreement, agreement
from davsp.judges.verdicts import judge_name, verdicts_of
from davsp.query import Query, Response, Verdict, read_jsonl, write_jsonl
from davsp.store import QUERIES, RESPONSES, by_defense, query_hash, recorded

WORST = "rsr_worst_case"


@dataclass(frozen=True)
class Rescored:
    """What a judge says of a run: verdicts by defense, rows of the metrics file, agreement with the run's other judges."""

    verdicts: dict[str, list[Verdict]]
    rows: list[dict[str, Any]]
    agreement: Agreement


def rescore(run: str | Path, queries: Sequence[Query], judge: Judge, baseline: str = "none", seed: int = 0) -> Rescored:
    """Judge the answers in a run folder; nothing is generated and no file of the run is changed.

    Args:
        run: folder written by `davsp.evaluate`.
        queries: those that the run answered, or more; the run knows their hash.
        judge: of the answers to malicious queries.
        baseline: the defense that differences start from, if the run has it.
        seed: of the bootstrap.

    Raises:
        DavspError: no such run, one that isn't finished, other queries, or the judge's own.
    """
    run = Path(run)
    responses = _responses(run)
    asked = _asked(run, responses, queries)
    verdicts = {name: verdicts_of(asked, found, judge) for name, found in responses.items()}
    outcomes = {name: metrics.outcomes(asked, responses[name], verdicts[name]) for name in responses}
    rows = rows_of(_model(run), {name: [*o, *worst_case(o)] for name, o in outcomes.items()}, baseline, seed)
    name = judge_name(judge)
    write_jsonl(run / f"verdicts-{slug(name)}.jsonl", chain.from_iterable(verdicts.values()))
    of = {"judge": name, "answers": files.sha256(run / RESPONSES)}
    files.write_json(run / f"metrics-{slug(name)}.json", metrics.metrics_file(rows) | of)
    return Rescored(verdicts, rows, _compare(run))


def slug(judge: str) -> str:
    """A judge's name as a file name: `davsp/1:org/model` -> `davsp-1-org-model`."""
    return re.sub(r"[^\w.+-]+", "-", judge).strip("-.")


def worst_case(found: Iterable[metrics.Outcome]) -> list[metrics.Outcome]:
    """The outcomes of RSR as they would be if every unscored answer were unsafe, under the metric `rsr_worst_case`."""
    return [replace(o, metric=WORST, value=o.value or 0.0) for o in found if o.metric == "rsr"]


def _responses(run: Path) -> dict[str, list[Response]]:
    if not (run / RESPONSES).exists():
        raise DavspError(f"{run} holds no answers ({RESPONSES}); give the folder that `davsp eval --out` wrote.")
    return by_defense(run / RESPONSES)


def _asked(run: Path, responses: dict[str, list[Response]], queries: Sequence[Query]) -> list[Query]:
    """The queries of the run in its order, if they are the very same."""
    record = recorded(run)
    if record is None:
        raise DavspError(f"{run} does not say which queries were asked (run.json); run davsp eval.")
    hashes: dict[str, str] = files.read_json(run / QUERIES)
    query_of = {q.id: q for q in queries}
    for name in hashes:
        if name not in query_of:
            raise DavspError(f"{run} answers the query {name!r}, which is not among these; give its own --queries.")
        if query_hash(query_of[name]) != hashes[name]:
            raise DavspError(f"{run} answers another query {name!r} than the one given; give its own --queries.")
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
    others = [p for p in sorted(run.glob("metrics-*.json")) if files.read_json(p).get("answers") == answers]
    verdicts: dict[str, list[Verdict]] = {}
    for path in [run / VERDICTS, *(run / f"verdicts-{p.stem.removeprefix('metrics-')}.jsonl" for p in others)]:
        for verdict in read_jsonl(path, Verdict) if path.exists() else []:
            verdicts.setdefault(verdict.judge, []).append(verdict)
    found = agreement(verdicts)
    files.write_json(
        run / "agreement.json",
        {
            "judges": list(verdicts),
            "alpha": found.alpha,
            "n": found.n,
            "disagreements": [
                {"defense": defense, "query_id": query_id, "labels": labels}
                for (defense, query_id), labels in found.disagreements.items()
            ],
        },
    )
    return found
