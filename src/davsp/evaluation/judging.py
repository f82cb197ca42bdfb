"""From answers to verdicts, grades and the rows of metrics.json: of custom queries, and of the published sets.

Custom queries have one rule for all (`davsp.metrics.outcomes`). The published sets are scored each as its authors do
(`davsp.benchmarks.score`): harmful ones by a judge, MM-Vet and LLaVA-Bench by a grader, MME by its words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from davsp import benchmarks, metrics
from davsp.benchmarks import scoring
from davsp.benchmarks.scoring import Scores
from davsp.judges import Judge
from davsp.judges.graders import Grader
from davsp.judges.verdicts import verdicts_of
from davsp.metrics import Row
from davsp.query import Grade, Query, Response, Verdict

GRADED = ("mm_vet", "llava_bench")
"""The sets that are scored by a grader."""


@dataclass(frozen=True)
class Judgement:
    """Of a run: by defense the verdicts of answers to malicious queries and the grades of helpful ones; and the rows."""

    verdicts: dict[str, list[Verdict]]
    rows: list[Row]
    grades: dict[str, list[Grade]] = field(default_factory=dict)


def judge_custom(
    queries: Sequence[Query],
    responses: Mapping[str, Sequence[Response]],
    judge: Judge,
    model: str,
    baseline: str = "none",
    seed: int = 0,
) -> Judgement:
    """RSR, over-refusal and accuracy of custom queries.

    Args:
        queries: malicious and benign.
        responses: by defense, an answer to each.
        judge: of the answers to malicious queries.
        model: name for the rows.
        baseline: the defense that paired differences start from; if it is not there, there are none.
        seed: of the bootstrap.
    """
    verdicts = {name: verdicts_of(queries, answers, judge) for name, answers in responses.items()}
    outcomes = {name: metrics.outcomes(queries, responses[name], verdicts[name]) for name in responses}
    return Judgement(verdicts, rows_of(model, outcomes, baseline, seed))


def judge_published(
    queries: Sequence[Query],
    responses: Mapping[str, Sequence[Response]],
    judge: Judge | None,
    graders: Mapping[str, Grader],
    model: str,
    baseline: str = "none",
    seed: int = 0,
    mode: str = "sound",
) -> Judgement:
    """The scores of the published sets, each by its own scorer.

    Args:
        queries: of any of the sets.
        responses: by defense, an answer to each.
        judge: of the harmful sets; None leaves these out.
        graders: set -> its grader; of a graded set without one only over-refusal is given.
        model: name for the rows.
        baseline: the defense that paired differences start from; if it is not there, there are none.
        seed: of the bootstrap.
        mode: of these scorers; another than "sound" adds its rows to the sound ones. Nothing is asked again.
    """
    by_set = benchmarks.by_set(queries)
    if judge is None:
        by_set = {name: part for name, part in by_set.items() if name in graders}
    judges: dict[str, Any] = {**{name: judge for name in by_set if name not in GRADED}, **graders}
    ungraded = {name: by_set.pop(name) for name in GRADED if name in by_set and name not in graders}
    scored = list(chain.from_iterable(by_set.values()))
    before: dict[str, Scores] | None = None
    scores_of: dict[str, dict[str, Scores]] = {}
    for name in sorted(responses, key=lambda name: name != baseline):  # the baseline first
        answers = responses[name]
        scores_of[name] = benchmarks.score(scored, answers, judges, model=model, baseline=before, seed=seed)
        if mode != "sound":
            for set_name, rows in _quirks(by_set, answers, scores_of[name], model, before, seed, mode).items():
                scores_of[name][set_name].rows.extend(rows)
        for set_name, part in ungraded.items():
            mine, then = scoring.of_these(part, answers), (before or {}).get(set_name)
            scores_of[name][set_name] = Scores(scoring.over_refusal(part, mine, model, then, seed), [], mine)
        before = scores_of[name] if name == baseline else before
    judgements = {name: list(chain.from_iterable(s.judgements for s in scores_of[name].values())) for name in responses}
    return Judgement(
        {name: [v for v in one if isinstance(v, Verdict)] for name, one in judgements.items()},
        [row for name in responses for scores in scores_of[name].values() for row in scores.rows],
        {name: [g for g in one if isinstance(g, Grade)] for name, one in judgements.items()},
    )


def _quirks(
    by_set: Mapping[str, Sequence[Query]],
    answers: Sequence[Response],
    sound: Mapping[str, Scores],
    model: str,
    before: Mapping[str, Scores] | None,
    seed: int,
    mode: str,
) -> dict[str, list[Row]]:
    """The rows that carry a mode's name, from the verdicts and grades of the sound ones; MME has no mode."""
    scored = [q for name, part in by_set.items() if name != benchmarks.mme.NAME for q in part]
    judgements = {name: scores.judgements for name, scores in sound.items()}
    quirks = benchmarks.score(scored, answers, judgements, model=model, baseline=before, mode=mode, seed=seed)
    return {name: [row for row in scores.rows if mode in row["metric"]] for name, scores in quirks.items()}


def apart(queries: Sequence[Query]) -> list[Query]:
    """Queries of several published sets with the set before an id that is a bare number: two of them count from 0."""
    return [replace(q, id=f"{q.benchmark}/{q.id}") if q.id.isdecimal() else q for q in queries]


def rows_of(model: str, outcomes: Mapping[str, list[metrics.Outcome]], baseline: str, seed: int = 0) -> list[Row]:
    """The rows of metrics.json from each defense's outcomes, paired with those of `baseline` if it is among them."""
    before = outcomes.get(baseline)
    per_defense = (
        metrics.rows(model, name, o, None if name == baseline else before, seed) for name, o in outcomes.items()
    )
    return list(chain.from_iterable(per_defense))
