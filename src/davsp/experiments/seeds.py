"""Seeds that lie in one folder are pooled, so all of them must be of one model, text and settings."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from davsp.errors import DavspError
from davsp.metrics import Outcome
from davsp.runtime.files import read_json, write_json

MANIFEST, OUTCOMES = "manifest.json", "outcomes.json"
ALIKE = ("weights", "text", "settings", "part", "beginning", "barred", "follow_ups", "curves")
"""Fields of a seed's manifest that are the same in all seeds of a folder; what else it has differs by nature (seed, layer, time, ...)."""


def keep(folder: Path, facts: Mapping[str, Any], outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    """Write what a seed gave; the outcomes last, and earlier ones go first, so that the outcomes in a folder are those of its manifest."""
    (folder / OUTCOMES).unlink(missing_ok=True)
    write_json(folder / MANIFEST, facts)
    write_json(folder / OUTCOMES, {name: [asdict(o) for o in rows] for name, rows in outcomes.items()})


def manifests(out: Path) -> list[dict[str, Any]]:
    """Facts of all seeds in a folder that have outcomes, in the order of their names."""
    return [read_json(path.with_name(MANIFEST)) for path in sorted(out.glob(f"seed-*/{OUTCOMES}"))]


def check_alike(out: Path, seeds: Sequence[Mapping[str, Any]]) -> None:
    """Raise DavspError if not all of these seeds can be pooled. A field that one of two does not have, as of an earlier version, is
    not compared."""
    for i, one in enumerate(seeds):
        for other in seeds[i + 1 :]:
            if found := _difference(_written(one), _written(other)):
                field, here, there = found
                raise DavspError(
                    f"seeds of one folder are pooled, and in {out} seed {one['seed']} has {field} {here!r}, seed {other['seed']} {there!r}: "
                    "choose another --out, or remove the folder of one of them and make it anew as the other."
                )


def check_beside(out: Path, seed: int, facts: Mapping[str, Any]) -> None:
    """Raise DavspError if a seed that is to be made of `facts` could not be pooled with the others in a folder: before hours of work."""
    for other in manifests(out):
        if other["seed"] != seed:
            check_alike(out, [other, {**facts, "seed": seed}])


def _written(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that count, as they read back from a file."""
    read: dict[str, Any] = json.loads(json.dumps({name: facts[name] for name in ALIKE if name in facts}))
    return read


def _difference(one: Any, other: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first field that differs, and both values; of those that both have, but for the seed."""
    if isinstance(one, dict) and isinstance(other, dict):
        shared = [key for key in one if key in other and key != "seed"]
        found = (_difference(one[key], other[key], f"{name}.{key}" if name else key) for key in shared)
        return next(filter(None, found), None)
    return None if one == other else (name, one, other)


# -- seeds that write their figures while they are made ------------------------------------------------------------------


def lacks(facts: Mapping[str, Any]) -> bool:
    """Whether a seed is under way: its manifest wants more than is done. One without these fields is whole."""
    return not set(facts.get("wanted", ())) <= set(facts.get("done", ()))


def under_way(seeds: Iterable[Mapping[str, Any]]) -> list[str]:
    """What those of the seeds that are under way have: "seed 0 has 1 of 6 (theft+fraud)"."""
    return [
        f"seed {one['seed']} has {len(one['done'])} of {len(one['wanted'])} ({'; '.join(one['done'])})"
        for one in seeds
        if lacks(one)
    ]


def notes(out: Path, pooled: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines below a table of the pooled seeds: which seeds of the folder are under way."""
    apart = [one for one in manifests(out) if one["seed"] not in [each["seed"] for each in pooled]]
    return [
        *(f"- Under way: {one}. The figures are of that." for one in under_way(pooled)),
        *(f"- Under way, and in none of the figures: {one}." for one in under_way(apart)),
    ]
