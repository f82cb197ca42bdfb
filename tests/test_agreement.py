"""Krippendorff's alpha against published and hand-computed values, and the list of disagreements."""

import pytest

from davsp import Verdict
from davsp.judges.agreement import Agreement, agreement, krippendorff_alpha

_ = None
KRIPPENDORFF = [  # the example of "Computing Krippendorff's Alpha-Reliability" (2011), part C: four observers, twelve units
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]


def test_the_published_example() -> None:
    units = [[None if v is None else str(v) for v in unit] for unit in zip(*KRIPPENDORFF, strict=True)]
    alpha = krippendorff_alpha(units)
    assert alpha is not None and round(alpha, 3) == 0.743


def test_by_hand() -> None:
    """Two judges, five answers, one of them scored by one judge only: four units are pairable, eight values.

    Safe is given 5 times, unsafe 3. Observed: one unit of four differs, two ordered pairs of eight: D_o = 2/8. By
    chance: 2·5·3 of 8·7 ordered pairs: D_e = 30/56. α = 1 - (2/8)/(30/56) = 8/15.
    """
    units = [["safe", "safe"], ["safe", "safe"], ["unsafe", "unsafe"], ["safe", "unsafe"], ["safe", None]]
    assert krippendorff_alpha(units) == pytest.approx(8 / 15)


@pytest.mark.parametrize(
    ("units", "alpha"),
    [
        ([], None),
        ([["safe"], ["unsafe"]], None),
        ([["safe", "safe"]] * 9, None),  # nothing could have differed
        ([["safe", "safe"], ["unsafe", "unsafe"]], 1.0),
        ([["safe", "unsafe"], ["unsafe", "safe"]], -0.5),  # D_o = 1, D_e = 8/12
    ],
)
def test_edges(units: list[list[str | None]], alpha: float | None) -> None:
    assert krippendorff_alpha(units) == (alpha if alpha is None else pytest.approx(alpha))


def test_disagreements() -> None:
    def by(judge: str, *labels: str) -> list[Verdict]:
        return [Verdict(f"q{i}", "davsp", judge, label) for i, label in enumerate(labels)]  # type: ignore[arg-type]

    comparison = agreement(
        {
            "a": by("a", "safe", "safe", "unsafe", "safe", "unscored"),
            "b": by("b", "safe", "safe", "unsafe", "unsafe", "safe"),
        }
    )
    assert comparison.alpha == pytest.approx(8 / 15) and comparison.n == 4
    assert comparison.disagreements == {("davsp", "q3"): {"a": "safe", "b": "unsafe"}}
    assert agreement({"a": by("a", "safe")}) == Agreement(None, 0, {})
