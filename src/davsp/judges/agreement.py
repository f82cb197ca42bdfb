"""How far several judges agree on the same answers, and on which they don't."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from davsp.judges.keyword import Label
from davsp.query import Verdict


@dataclass(frozen=True)
class Agreement:
    """What `agreement` finds.

    Attributes:
        alpha: Krippendorff's, 1 for perfect agreement, 0 for that of chance; None where nothing can be said.
        n: answers that two or more judges scored.
        disagreements: of those that judges scored differently, (defense, query id) -> label by judge.
    """

    alpha: float | None
    n: int
    disagreements: dict[tuple[str, str], dict[str, Label]]


def krippendorff_alpha(units: Iterable[Sequence[str | None]]) -> float | None:
    """Krippendorff's α for nominal data with missing values (Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability").

    Args:
        units: for each unit the value of each rater; None where there is none.

    Returns:
        1 - D_o / D_e, at most 1; None if no unit has two values, or if all values are the same, as nothing could
            then have been disagreed on.
    """
    weights: Counter[str] = Counter()
    observed = 0.0
    for unit in units:
        values = Counter(value for value in unit if value is not None)
        m = values.total()
        if m < 2:
            continue
        weights.update(values)
        observed += sum(count * (m - count) for count in values.values()) / (m - 1)
    n = weights.total()
    expected = sum(count * (n - count) for count in weights.values()) / (n - 1) if n > 1 else 0.0
    return None if expected == 0 else 1 - observed / expected


def agreement(verdicts: Mapping[str, Iterable[Verdict]]) -> Agreement:
    """Compare judges on the answers that they all or some of them scored; unscored counts as missing.

    Args:
        verdicts: by judge; those of one judge are of different answers.
    """
    labels: dict[tuple[str, str], dict[str, Label]] = {}
    for judge, of_judge in verdicts.items():
        for v in of_judge:
            if v.label != "unscored":
                labels.setdefault((v.defense, v.query_id), {})[judge] = v.label
    several = {key: by_judge for key, by_judge in labels.items() if len(by_judge) > 1}
    alpha = krippendorff_alpha([list(by_judge.values()) for by_judge in several.values()])
    return Agreement(
        alpha, len(several), {k: by_judge for k, by_judge in several.items() if len(set(by_judge.values())) > 1}
    )
