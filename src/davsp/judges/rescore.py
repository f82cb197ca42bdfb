"""A finished run judged again: its answers stay, verdicts and metrics of the judge are added beside the others.

RUN/verdicts/<judge>/<defense>.jsonl   the verdicts
RUN/verdicts/<judge>/answers.json      hashes of the answers that they are of
RUN/metrics-<judge>.json               rates, unscored answers, and the rates with all of these as unsafe
RUN/agreement.json                     Krippendorff's α of all judges of the run, and where they differ
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from davsp import files, metrics
from davsp.errors import DavspError
from davsp.evaluation import judge_name, queries_hash, rows_of, verdicts_of
from davsp.judges import Judge
from davsp.judges.agreement import Agreement, agreement
from davsp.query import Query, Response, Verdict, read_jsonl, write_jsonl

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
    place = run / "verdicts" / slug(name)
    for defense, found in verdicts.items():
        write_jsonl(place / f"{defense}.jsonl", found)
    files.write_json(place / "answers.json", {"judge": name, "sha256": _hashes(run)})
    files.write_json(run / f"metrics-{slug(name)}.json", metrics.metrics_file(rows) | {"judge": name})
    return Rescored(verdicts, rows, _compare(run))


def slug(judge: str) -> str:
    """A judge's name as a file name: `davsp/1:org/model` -> `davsp-1-org-model`."""
    return re.sub(r"[^\w.+-]+", "-", judge).strip("-.")


def worst_case(found: Iterable[metrics.Outcome]) -> list[metrics.Outcome]:
    """The outcomes of RSR as they would be if every unscored answer were unsafe, under the metric `rsr_worst_case`."""
    return [replace(o, metric=WORST, value=o.value or 0.0) for o in found if o.metric == "rsr"]


def _responses(run: Path) -> dict[str, list[Response]]:
    paths = sorted((run / "responses").glob("*.jsonl"))
    if not paths:
        raise DavspError(f"{run} holds no answers (responses/*.jsonl); give the folder that `davsp eval --out` wrote.")
    return {path.stem: read_jsonl(path, Response) for path in paths}


def _asked(run: Path, responses: dict[str, list[Response]], queries: Sequence[Query]) -> list[Query]:
    """The queries of the run in its order, if they are the very same."""
    query_of = {q.id: q for q in queries}
    asked: list[Query] = []
    for name, found in responses.items():
        unknown = next((r.query_id for r in found if r.query_id not in query_of), None)
        if unknown is not None:
            raise DavspError(f"{run} answers the query {unknown!r}, which is not among these; give its own --queries.")
        mine = [query_of[r.query_id] for r in found]
        if asked and [q.id for q in mine] != [q.id for q in asked]:
            raise DavspError(f"the defenses of {run} answer different queries; finish the run first: davsp eval.")
        if not asked and queries_hash(mine) != _key(run, name)["queries"]:
            raise DavspError(
                f"{run} is of other queries than these, or not finished; give its own --queries, or run davsp eval again."
            )
        asked = mine
    return asked


def _key(run: Path, defense: str) -> dict[str, Any]:
    key = files.read_json(run / "responses" / f"{defense}.json")
    if not isinstance(key, dict) or "queries" not in key:
        raise DavspError(f"{run / 'responses' / defense}.json does not say which queries were asked; run davsp eval.")
    return key


def _model(run: Path) -> str:
    try:
        return str(files.read_json(run / "metrics.json")["rows"][0]["model"])
    except (KeyError, IndexError, TypeError) as error:
        raise DavspError(f"{run / 'metrics.json'} names no model; run davsp eval again to finish the run.") from error


def _hashes(run: Path) -> dict[str, str]:
    return {path.stem: files.sha256(path) for path in sorted((run / "responses").glob("*.jsonl"))}


def _compare(run: Path) -> Agreement:
    """Compare all judges whose verdicts are of the answers as they are now, and write agreement.json."""
    folders = [p.parent for p in sorted((run / "verdicts").glob("*/answers.json"))]
    current = [f for f in folders if files.read_json(f / "answers.json")["sha256"] == _hashes(run)]
    verdicts: dict[str, list[Verdict]] = {}
    for folder in [run / "verdicts", *current]:  # the first is the judge's of davsp eval itself
        for path in sorted(folder.glob("*.jsonl")):
            for verdict in read_jsonl(path, Verdict):
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
