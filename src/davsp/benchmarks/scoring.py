"""What all scorers share: the record they give, whose answers they score, over-refusal, and rows of bootstrapped scores.

All figures leave as the tidy rows of `davsp.metrics`. A compatibility mode reproduces a quirk of a published scorer by
name; its rows carry the name in the metric, so that they are never taken for the sound ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from davsp import metrics
from davsp.benchmarks import bootstrap
from davsp.errors import DavspError
from davsp.judges import withheld
from davsp.judges.base import is_unscored
from davsp.metrics import Outcome, Row
from davsp.query import Grade, Query, Response, Verdict


@dataclass(frozen=True)
class Scores:
    """How one defense does on a benchmark.

    Attributes:
        rows: of metrics.json: model, defense, benchmark, split, metric, value, low, high, n; differences have p too. Where
            a judge is asked, `unscored` is the share that it could not tell, and `<metric>_worst_case` the figure with
            all of these as bad as can be.
        judgements: the judge's verdicts, or the grader's grades, to be kept beside the answers; none of MME.
        responses: the answers that were scored. Another defense's differences start from here.
    """

    rows: list[Row]
    judgements: list[Verdict] | list[Grade]
    responses: list[Response]

    @property
    def unscored(self) -> int:
        """How many answers the judge could not tell, in each run of a grader."""
        return sum(map(is_unscored, self.judgements))


def whose(responses: Sequence[Response]) -> str:
    """The defense under which all these answers were given.

    Raises:
        DavspError: there are none, or they are of several.
    """
    names = sorted({response.defense for response in responses})
    if len(names) != 1:
        raise DavspError(f"the answers are of the defenses {', '.join(names) or 'none'}; score one defense at a time.")
    return names[0]


def of_these(queries: Iterable[Query], responses: Iterable[Response]) -> list[Response]:
    """The responses to these queries, in the order of the queries.

    Raises:
        DavspError: a query has none; a missing answer is an error, not a wrong answer.
    """
    response_of = {response.query_id: response for response in responses}
    for q in queries:
        if q.id not in response_of:
            raise DavspError(f"the query {q.id} has no response; answer every query before scoring.")
    return [response_of[q.id] for q in queries]


def known_mode(name: str, mode: str, modes: Iterable[str]) -> None:
    """Raise DavspError if a scorer has no such mode."""
    if mode not in modes:
        raise DavspError(f"the mode {mode!r} of {name} is not known: choose {', '.join(modes)}.")


def over_refusal(
    queries: Sequence[Query],
    responses: Iterable[Response],
    model: str,
    baseline: Scores | None = None,
    seed: int = 0,
    by_category: bool = False,
) -> list[Row]:
    """How often the questions of each benign set are refused, by the keyword list of `davsp.judges`, or get no word at all.

    An answer whose thought was cut is left out; if there is one, the share of those is `cut`. With `by_category` there is a row
    for each category, too.
    """
    benign = [q for q in queries if q.label == "benign"]

    def splits(q: Query) -> list[str]:
        return ["total", q.category] if by_category and q.category else ["total"]

    def refusals(answers: Iterable[Response]) -> list[Outcome]:
        pairs = list(zip(benign, of_these(benign, answers), strict=True))
        table = [
            Outcome(q.id, q.benchmark, split, "over_refusal", q.group, None if r.cut else float(withheld(r.text)))
            for q, r in pairs
            for split in splits(q)
        ]
        if any(r.cut for _, r in pairs):
            table += [Outcome(q.id, q.benchmark, "total", metrics.LOST, q.group, float(r.cut)) for q, r in pairs]
        return table

    if not benign:
        return []
    before = None if baseline is None else refusals(baseline.responses)
    mine = of_these(benign, responses)
    return metrics.rows(model, whose(mine), refusals(mine), before, seed)


def rate_rows(head: Mapping[str, Any], values: Sequence[float], groups: Sequence[str], seed: int) -> list[Row]:
    """The row of a plain rate of 0 and 1 with the interval of `davsp.metrics`."""
    if not values:
        return [{**head, "value": None, "low": None, "high": None, "n": 0}]
    low, high = metrics.rate_interval(values, groups, seed)
    return [{**head, "value": sum(values) / len(values), "low": low, "high": high, "n": len(values)}]


def rows(
    head: Mapping[str, Any],
    strata: bootstrap.Strata,
    statistic: bootstrap.Statistic,
    n: int,
    before: bootstrap.Strata | None,
    seed: int,
    top: float | None,
) -> list[Row]:
    """The row of one bootstrapped score, and that of its difference from `before` if there is one.

    A bootstrap of clusters that all say the same is a point, which claims too much. It is then widened by Wilson's
    interval of as many clusters, in the score's scale; a score without a highest value has no interval then.

    Args:
        head: model, defense, benchmark, split and metric.
        strata: sums by cluster.
        statistic: from sums to the score.
        n: questions in it; of 0 the value is None.
        before: sums of the same clusters under the baseline defense.
        seed: of the bootstrap.
        top: the score's highest value, the lowest being 0; None if it has none.
    """
    if n == 0:
        return [{**head, "value": None, "low": None, "high": None, "n": 0}]
    groups = sum(len(stratum) for stratum in strata)
    value = bootstrap.value(strata, statistic)
    low, high = bootstrap.interval(strata, statistic, seed)
    ends: tuple[float | None, float | None] = (low, high)
    if high - low < 1e-9:
        ends = (None, None)
        if top is not None:
            wilson = metrics.wilson(round(value / top * groups), groups)
            ends = min(low, wilson[0] * top), max(high, wilson[1] * top)
    table = [{**head, "value": value, "low": ends[0], "high": ends[1], "n": n}]
    if before is not None:
        change, low, high, p = bootstrap.paired_difference(before, strata, statistic, seed)
        ends = (low, high)
        if high - low < 1e-9:
            ends = (None, None)
            if top is not None:
                unseen = metrics.wilson(0, groups)[1] * top
                ends = max(-top, change - unseen), min(top, change + unseen)
        head = {**head, "metric": f"{head['metric']}_difference"}
        table.append({**head, "value": change, "low": ends[0], "high": ends[1], "n": n, "p": p})
    return table
