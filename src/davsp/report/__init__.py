"""The report of an evaluation: what goes in it (here), how it is drawn (`plots`) and written (`html`, `terminal`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from davsp import metrics
from davsp.defenses import Defense
from davsp.evaluation import Evaluation
from davsp.query import Query, Response, Verdict
from davsp.report.cells import OUT_OF_DISTRIBUTION, POOLED

EXAMPLES_PER_BENCHMARK = 2


@dataclass(frozen=True)
class Example:
    """One query side by side: as it came and as the defense hands it on."""

    query: Query
    defended: Query
    before: Response
    after: Response
    before_verdict: Verdict | None
    after_verdict: Verdict | None


@dataclass(frozen=True)
class Illustration:
    """A picture of the report, shown enlarged and pixel by pixel."""

    image: Image.Image
    title: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Report:
    """All that a report shows; what is empty is left out of the page.

    Attributes:
        rows: those of metrics.json; of custom queries also RSR pooled over the benchmarks in and out of distribution.
        model: the LVLM.
        defense, baseline: the two that headline, examples and histograms compare.
        projections: defense -> label -> projections.
        margins: (mu_plus, mu_minus) that the prompt was trained with.
        sweep: one dict a layer: layer, auroc, mean_malicious, mean_benign, gap.
        curves: defense -> records of its training's metrics.jsonl.
        query_counts: malicious benchmark -> how many queries it has, and of how many distinct intents they are.
        latency: defense -> seconds over those of the baseline.
        caveat: a sentence on the judge, below the table that it made.
    """

    rows: list[dict[str, Any]]
    model: str
    defense: str = "davsp"
    baseline: str = "none"
    pictures: list[Illustration] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    projections: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    margins: tuple[float, float] | None = None
    sweep: list[dict[str, Any]] = field(default_factory=list)
    layer: int | None = None
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    query_counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    latency: dict[str, float] = field(default_factory=dict)
    caveat: str = ""


def build(
    model: str,
    queries: Sequence[Query],
    evaluation: Evaluation,
    defenses: Mapping[str, Defense],
    *,
    defense: str = "davsp",
    baseline: str = "none",
    published: bool = False,
    **rest: Any,
) -> Report:
    """A report of an evaluation.

    Args:
        model: the LVLM's name.
        queries: those that were evaluated.
        evaluation: what `evaluate` returned.
        defenses: those that were evaluated; the examples show what `defense` makes of a query.
        defense, baseline: the two to compare.
        published: the queries are of the published sets, each with a rate of its own: nothing is pooled.
        rest: the other fields of `Report`.
    """
    rows = evaluation.rows + ([] if published else _pooled(model, queries, evaluation, baseline))
    examples = []
    if defense in evaluation.responses and baseline in evaluation.responses:
        examples = _examples(queries, evaluation, defenses[defense], defense, baseline)
    projections = projections_by_label(queries, evaluation)
    return Report(
        rows, model, defense, baseline, examples=examples, projections=projections, query_counts=_query_counts(queries),
        latency=metrics.latency(evaluation.responses, baseline), **rest,
    )  # fmt: skip


def _query_counts(queries: Sequence[Query]) -> dict[str, tuple[int, int]]:
    """Malicious benchmark -> queries, distinct intents; a query without a group is an intent of its own."""
    intents: dict[str, list[str]] = {}
    for q in queries:
        if q.label == "malicious":
            intents.setdefault(q.benchmark, []).append(q.group or f"\0{q.id}")
    return {benchmark: (len(names), len(set(names))) for benchmark, names in intents.items()}


def _pooled(model: str, queries: Sequence[Query], evaluation: Evaluation, baseline: str) -> list[dict[str, Any]]:
    """RSR over all benchmarks in distribution, and over all others; clustered on the intents they share."""
    attacks = [
        replace(q, benchmark=POOLED["out" if q.benchmark in OUT_OF_DISTRIBUTION else "in"])
        for q in queries
        if q.label == "malicious"
    ]
    outcomes = {
        d: metrics.outcomes(attacks, evaluation.responses[d], evaluation.verdicts[d]) for d in evaluation.responses
    }
    before = outcomes.get(baseline)
    return [row for d, o in outcomes.items() for row in metrics.rows(model, d, o, None if d == baseline else before)]


def projections_by_label(queries: Sequence[Query], evaluation: Evaluation) -> dict[str, dict[str, list[float]]]:
    """Defense -> label -> projections of the defended inputs; defenses without any are left out."""
    label_of = {q.id: q.label for q in queries}
    projections: dict[str, dict[str, list[float]]] = {}
    for name, responses in evaluation.responses.items():
        for r in responses:
            if r.projection is not None:
                projections.setdefault(name, {}).setdefault(label_of[r.query_id], []).append(r.projection)
    return projections


def _examples(
    queries: Sequence[Query], evaluation: Evaluation, shown: Defense, defense: str, baseline: str
) -> list[Example]:
    """Pictured queries by a fixed rule, so that the page shows what does not work as well.

    Of each malicious benchmark: the first query that the defense put right and the first that it did not (else
    the first ones). Of each benign benchmark and category: the first query; and one whose right answer the
    defense took away, if there is any.
    """
    before, after = (_outcome_of(queries, evaluation, name) for name in (baseline, defense))
    shelves: dict[tuple[str, str, str], list[Query]] = {}
    for q in queries:
        if q.image is not None:
            category = q.category if q.label == "benign" else ""
            shelves.setdefault((q.label, q.benchmark, category), []).append(q)
    chosen: list[Query] = []
    for (kind, _, _), shelf in shelves.items():
        gained = [q for q in shelf if before.get(q.id) == 0 and after.get(q.id) == 1]
        failed = [q for q in shelf if after.get(q.id) == 0]
        picks = [*gained[:1], *failed[:1], *shelf] if kind == "malicious" else shelf[:1]
        chosen += list({q.id: q for q in picks}.values())[:EXAMPLES_PER_BENCHMARK]
    lost = (q for q in queries if q.label == "benign" and q.image and before.get(q.id) == 1 and after.get(q.id) == 0)
    chosen += [q for q in list(lost)[:1] if q not in chosen]
    return [_example(q, evaluation, shown, defense, baseline) for q in chosen]


def _outcome_of(queries: Sequence[Query], evaluation: Evaluation, name: str) -> dict[str, float | None]:
    """Query id -> 1 if the answer is safe or right, 0 if not."""
    outcomes = metrics.outcomes(queries, evaluation.responses[name], evaluation.verdicts[name])
    return {o.query_id: o.value for o in outcomes if o.metric in ("rsr", "accuracy")}


def _example(query: Query, evaluation: Evaluation, shown: Defense, defense: str, baseline: str) -> Example:
    def pick(records: Sequence[Any]) -> Any:
        return next((r for r in records if r.query_id == query.id), None)

    before, after = pick(evaluation.responses[baseline]), pick(evaluation.responses[defense])
    verdicts = pick(evaluation.verdicts[baseline]), pick(evaluation.verdicts[defense])
    return Example(query, shown.shown([query])[0], before, after, *verdicts)
