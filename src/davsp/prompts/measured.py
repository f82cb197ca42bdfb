"""What a finished run says of a prompt: the table on its card, and the hashes that lead back to the run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from davsp.errors import DavspError
from davsp.lvlm.undefended import note
from davsp.runtime.files import read_json, sha256

RECORDS = (
    "manifest.json",
    "run.json",
    "queries.json",
    "responses.jsonl",
    "verdicts.jsonl",
    "grades.jsonl",
    "metrics.json",
)
BASELINE = "none"

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class Figure(BaseModel):
    """One line of the table: a metric under the prompt, under no defense, and the paired difference; each [value, low, high].

    Intervals are 95 %; low and high are None where there is none. `n` counts what was scored.
    """

    model_config = _STRICT

    benchmark: str
    metric: str
    n: int
    value: tuple[float, float | None, float | None]
    without: tuple[float, float | None, float | None] | None = None
    difference: tuple[float, float | None, float | None] | None = None


class Measurement(BaseModel):
    """A run's figures under one prompt.

    Attributes:
        model, revision: that answered; `weights` is the run's own hash of it.
        pixels: `Prompt.pixels_sha256` of the prompt that was measured; of another one the figures are not.
        judges: of all verdicts and grades; none where answers were scored by their words alone.
        queries: how many were asked.
        undefended: which pictures "no defense" saw, in a sentence; "" if all were square, or if the run did not say.
        max_new_tokens: where answers were cut; None if the run did not say.
        files: SHA-256 of the run's files, by name.
    """

    model_config = _STRICT

    model: str
    revision: str | None = None
    weights: str | None = None
    pixels: str
    judges: list[str] = []
    queries: int
    undefended: str = ""
    max_new_tokens: int | None = None
    time: str | None = None
    commit: str | None = None
    files: dict[str, str]
    figures: list[Figure]


def measurement(run: str | Path, pixels: str, text: str) -> Measurement:
    """Read the figures of the prompt with these pixels out of a run of `davsp eval` or `davsp demo`.

    Args:
        run: its folder.
        pixels: `Prompt.pixels_sha256()`.
        text: the prompt's safety text.

    Raises:
        DavspError: no finished run, or one that did not measure this prompt.
    """
    run = Path(run)
    record, table, facts = (read_json(run / name) for name in ("run.json", "metrics.json", "manifest.json"))
    try:
        prompts = {
            name: (description.get("delta"), description.get("text"))
            for name, description in record["defenses"].items()
        }
        rows = [row for row in table["rows"] if row["split"] == "total" and row["benchmark"] != "cost"]
        defense = next((name for name, prompt in prompts.items() if prompt == (pixels, text)), None)
        if defense is None:
            raise DavspError(
                f"{run / 'run.json'} names no defense with this prompt's pixels and text; give the run that measured it"
            )
        figures = _figures(rows, defense)
        undefended = note(facts.get("undefended"))
    except (KeyError, TypeError, AttributeError) as error:
        raise DavspError(f"{run} holds no run of davsp eval or demo ({error!r}); give another folder") from error
    if not figures:
        raise DavspError(f"{run / 'metrics.json'} has no row of the defense {defense!r}; let the run finish")
    return Measurement(
        model=rows[0]["model"],
        revision=facts.get("revision"),
        weights=record.get("model"),
        pixels=pixels,
        judges=_judges(run),
        queries=len(read_json(run / "queries.json")),
        undefended=undefended,
        max_new_tokens=facts.get("max_new_tokens"),
        time=facts.get("time"),
        commit=facts.get("commit"),
        files={name: sha256(run / name) for name in RECORDS if (run / name).exists()},
        figures=figures,
    )


def _figures(rows: Sequence[Mapping[str, Any]], defense: str) -> list[Figure]:
    at = {(row["defense"], row["benchmark"], row["metric"]): row for row in rows}

    def of(defense: str, benchmark: str, metric: str) -> tuple[float, float | None, float | None] | None:
        row = at.get((defense, benchmark, metric))
        return None if row is None or row["value"] is None else (row["value"], row["low"], row["high"])

    figures = []
    for (name, benchmark, metric), row in at.items():
        value = of(name, benchmark, metric)
        if name != defense or value is None or metric.endswith("_difference"):
            continue
        without, difference = of(BASELINE, benchmark, metric), of(name, benchmark, f"{metric}_difference")
        figures.append(
            Figure(benchmark=benchmark, metric=metric, n=row["n"], value=value, without=without, difference=difference)
        )
    return figures


def _judges(run: Path) -> list[str]:
    from davsp.query import Grade, Verdict, read_jsonl

    records: list[Any] = []
    for name, kind in (("verdicts.jsonl", Verdict), ("grades.jsonl", Grade)):
        records += read_jsonl(run / name, kind) if (run / name).exists() else []
    return list(dict.fromkeys(record.judge for record in records))


def with_interval(value: tuple[float, float | None, float | None] | None, sign: bool = False) -> str:
    """A figure with its interval: `0.958 [0.900, 0.991]`; "" for none."""
    if value is None:
        return ""
    format_ = "{:+.3f}" if sign else "{:.3f}"
    middle, low, high = (None if v is None else format_.format(v) for v in value)
    return f"{middle}" if low is None else f"{middle} [{low}, {high}]"
