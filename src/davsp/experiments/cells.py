"""Figures of metrics.json as the tables of experiments print them, with their 95 % intervals."""

from collections.abc import Mapping
from typing import Any


def rate(figure: Mapping[str, Any], digits: int = 1) -> str:
    """A rate in percent; – where nothing was scored."""
    if figure["value"] is None:
        return "–"
    value, low, high = (f"{100 * figure[k]:.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} <sub>{low}–{high}</sub>"


def points(figure: Mapping[str, Any] | None) -> str:
    """A difference of rates in points, always with its sign; – where no query was scored both times (there is no row then)."""
    if figure is None or figure["value"] is None:
        return "–"
    value, low, high = _signed(figure)
    return f"{value} <sub>{low} to {high}</sub>"


def signed(figure: Mapping[str, Any]) -> str:
    """The same on one line, where nothing is small: "−1.0 [−2.9, +1.5]"."""
    value, low, high = _signed(figure)
    return f"{value} [{low}, {high}]"


def _signed(figure: Mapping[str, Any]) -> list[str]:
    return [f"{100 * figure[k]:+.1f}".replace("-", "−") for k in ("value", "low", "high")]
