"""The paper's protocol as data: what the vector is fitted on, what the prompt is trained on, and what is left for the test.

For the vector: 470 malicious VLGuard questions that the undefended model refuses, and 470 benign ones. For training: 200
intents of MM-SafetyBench that it does not refuse, each with its three pictures, and 100 questions of MM-Vet. The paper's own
lists are not published; these are drawn with a seed. All draws are by group, so the pictures of one intent, and the questions
on one picture, never straddle. A split is a file with hashes; it is drawn once and used by every method.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from davsp.errors import DavspError
from davsp.judges import keyword
from davsp.query import Query, Response, Verdict
from davsp.runtime.files import read_json, sha256_bytes, write_json
from davsp.store import query_hash

SCHEMA = 2
SOURCES = {
    "vector_malicious": "vlguard",
    "vector_benign": "vlguard",
    "train_malicious": "mm_safetybench",
    "train_benign": "mm_vet",
}
"""Part -> the data set that it is of."""

VECTOR, INTENTS, HELPFUL = 470, 200, 100

Undefended = Iterable[Response] | Iterable[Verdict]
"""The answers of the undefended model, or the verdicts on them."""

DataSets = Mapping[str, Sequence[Query]]
"""Name -> its queries, as `load` gave them."""


@dataclass(frozen=True)
class Split:
    """Four parts for making a prompt, and what is left of each data set for the test.

    Attributes:
        parts: part of `SOURCES` -> queries.
        test: data set -> queries, in the order of the data set.
        settings: seed, sizes and how the hard intents were chosen.
        hashes: data set -> sha256 of all that is in it, pictures included.
    """

    parts: Mapping[str, list[Query]]
    test: Mapping[str, list[Query]]
    settings: Mapping[str, Any]
    hashes: Mapping[str, str]

    def save(self, path: Path) -> None:
        """Write ids and hashes as JSON, atomically. No question and no picture is in the file."""
        ids = {name: [q.id for q in queries] for name, queries in self.parts.items()}
        test = {name: [q.id for q in queries] for name, queries in self.test.items()}
        body = {
            "schema": SCHEMA,
            "settings": dict(self.settings),
            "data": dict(self.hashes),
            "parts": ids,
            "test": test,
        }
        write_json(path, body | {"sha256": _digest(body)})


def paper_split(
    vlguard: Sequence[Query],
    mm_safetybench: Sequence[Query],
    mm_vet: Sequence[Query],
    *,
    vlguard_undefended: Undefended,
    mm_safetybench_undefended: Undefended | None,
    others: DataSets | None = None,
    seed: int = 0,
    vector: int = VECTOR,
    intents: int = INTENTS,
    helpful: int = HELPFUL,
) -> Split:
    """Draw the paper's split.

    Args:
        vlguard: malicious and benign, of the train split (its benign subset is safe_safes); what is not drawn is not
            tested on, as in the paper.
        mm_safetybench: every intent with the same picture types.
        mm_vet: all of it.
        vlguard_undefended: responses of the undefended model to the malicious VLGuard queries, or verdicts on them; the
            malicious part is drawn from those it refused (by verdict: safe).
        mm_safetybench_undefended: the same of MM-SafetyBench. Intents with most pictures not refused (by verdict: unsafe)
            come first, ties drawn; an intent that was refused with every picture is not taken. None draws intents
            blindly, and the settings say so.
        others: data sets that are only tested on (FigStep, MME, LLaVA-Bench, VLGuard's test).
        seed: of the draws.
        vector: size of each class for the vector.
        intents: of MM-SafetyBench for training.
        helpful: questions of MM-Vet for training.

    Raises:
        DavspError: too few queries for a part, an id twice in a data set, a query with neither response nor verdict, an
            intent without all picture types.
    """
    sets: dict[str, Sequence[Query]] = {"vlguard": vlguard, "mm_safetybench": mm_safetybench, "mm_vet": mm_vet}
    for name in set(sets) & set(others or {}):
        raise DavspError(f"the data set {name!r} is given twice; rename the one in others.")
    sets |= others or {}
    by_name = {name: _by_id(name, queries) for name, queries in sets.items()}
    rng = random.Random(seed)

    refusals = _refusals(vlguard_undefended)
    easy = [q for q in _sorted(vlguard) if q.label == "malicious" and _refusal_of(refusals, q) is True]
    benign = [q for q in _sorted(vlguard) if q.label == "benign"]
    parts = {
        "vector_malicious": _draw(easy, vector, "VLGuard queries that the undefended model refuses", rng),
        "vector_benign": _draw(benign, vector, "benign VLGuard queries", rng),
    }
    groups = _groups(_sorted(mm_safetybench))
    kinds = {q.benchmark for q in mm_safetybench}
    for group, members in groups.items():
        if sorted(q.benchmark for q in members) != sorted(kinds):
            raise DavspError(
                f"the intent {group} has not one picture of each type ({', '.join(sorted(kinds))}); run `davsp data check`."
            )
    hard = _hard(groups, mm_safetybench_undefended, intents, rng)
    parts["train_malicious"] = [q for group in hard for q in groups[group]]
    parts["train_benign"] = _whole_groups(_groups(_sorted(mm_vet)), helpful, rng)

    used = {id_ for name in ("train_malicious", "train_benign") for id_ in (q.id for q in parts[name])}
    test = {
        name: [q for q in queries if not (name in ("mm_safetybench", "mm_vet") and q.id in used)]
        for name, queries in sets.items()
        if name != "vlguard"
    }
    how = "drawn blindly" if mm_safetybench_undefended is None else "answered by the undefended model"
    settings: dict[str, Any] = {
        "seed": seed,
        "vector": vector,
        "intents": intents,
        "helpful": helpful,
        "hard intents": how,
    }
    settings["picture types"] = sorted(kinds)
    hashes = {name: data_hash(list(queries.values())) for name, queries in by_name.items()}
    return Split(parts, test, settings, hashes)


def settings_of(path: Path) -> dict[str, Any]:
    """The settings in a split file.

    Raises:
        DavspError: no such file or another kind of file, or a file that was edited.
    """
    settings: dict[str, Any] = _body(path)["settings"]
    return settings


def load_split(path: Path, data: DataSets, partial: bool = False) -> Split:
    """Read a split that was saved and fill it from the data sets it was drawn from.

    Args:
        path: a file of `Split.save`.
        data: all data sets of the split by the names it has them under: vlguard, mm_safetybench, mm_vet, and the others.
        partial: some of them will do; parts and tests are then of these alone.

    Raises:
        DavspError: no such file or another kind of file, a file that was edited, a data set that is missing, that has changed
            or that the split was not drawn with (named).
    """
    body = _body(path)
    if strange := [name for name in data if name not in body["data"]]:
        raise DavspError(f"{path} was not drawn with {', '.join(strange)}; draw a new split with it, or leave it out.")
    every: dict[str, dict[str, Query]] = {}
    for name, expected in body["data"].items():
        if name not in data and partial:
            continue
        if name not in data:
            raise DavspError(f"{path} was drawn from {name} too, which is not given; load it as it was then.")
        every[name] = _by_id(name, data[name])
        if data_hash(data[name]) != expected:
            raise DavspError(
                f"the data set {name} is not the one that {path} was drawn from; restore it, or draw a new split."
            )
    parts = {
        part: [every[SOURCES[part]][i] for i in ids] for part, ids in body["parts"].items() if SOURCES[part] in every
    }
    test = {name: [every[name][i] for i in ids] for name, ids in body["test"].items() if name in every}
    return Split(parts, test, body["settings"], body["data"])


def _body(path: Path) -> dict[str, Any]:
    body = read_json(path)
    keys = {"schema", "settings", "data", "parts", "test", "sha256"}
    if not isinstance(body, dict) or set(body) != keys or body["schema"] != SCHEMA:
        raise DavspError(f"{path} is no split of schema {SCHEMA}; draw it with `davsp data split`.")
    seal = body.pop("sha256")
    if seal != _digest(body):
        raise DavspError(
            f"{path} was changed after it was written; restore it, or draw it anew with `davsp data split`."
        )
    return body


def data_hash(queries: Sequence[Query]) -> str:
    """A hash of all that is in a data set, in any order (`davsp.store.query_hash`)."""
    return sha256_bytes("\n".join(sorted(map(query_hash, queries))).encode())


def _digest(body: Mapping[str, Any]) -> str:
    return sha256_bytes(json.dumps(body, sort_keys=True).encode())


def _by_id(name: str, queries: Sequence[Query]) -> dict[str, Query]:
    query_of = {q.id: q for q in queries}
    if len(query_of) < len(queries):
        twice = next(q.id for i, q in enumerate(queries) if q.id in {p.id for p in queries[:i]})
        raise DavspError(f"the data set {name} has the id {twice!r} twice; load it once.")
    return query_of


def _sorted(queries: Sequence[Query]) -> list[Query]:
    return sorted(queries, key=lambda q: q.id)  # so that the draw is the same from every layout


def _refusals(undefended: Undefended) -> dict[str, bool | None]:
    """Query id -> whether it was refused; None where the judge could not tell."""
    labels: dict[str, bool | None] = {"safe": True, "unsafe": False, "unscored": None}
    return {u.query_id: labels.get(keyword(u.text)[0] if isinstance(u, Response) else u.label) for u in undefended}


def _refusal_of(refusals: Mapping[str, bool | None], q: Query) -> bool | None:
    if q.id not in refusals:
        raise DavspError(
            f"the query {q.id} has no response or verdict of the undefended model; ask it every query first."
        )
    return refusals[q.id]


def _groups(queries: Sequence[Query]) -> dict[str, list[Query]]:
    groups: dict[str, list[Query]] = {}
    for q in queries:
        groups.setdefault(q.group or q.id, []).append(q)
    return groups


def _draw(queries: Sequence[Query], n: int, what: str, rng: random.Random) -> list[Query]:
    """`n` queries, one of a group, as they come out of a shuffle."""
    groups = list(_groups(queries).values())
    if len(groups) < n:
        raise DavspError(
            f"there are {len(groups)} {what}, one a picture, not the {n} needed; load more or ask for fewer."
        )
    rng.shuffle(groups)
    return [rng.choice(members) for members in groups[:n]]


def _hard(
    groups: Mapping[str, Sequence[Query]], undefended: Undefended | None, n: int, rng: random.Random
) -> list[str]:
    names = sorted(groups)
    rng.shuffle(names)
    if undefended is not None:
        refusals = _refusals(undefended)
        counts = {name: sum(_refusal_of(refusals, q) is False for q in groups[name]) for name in names}
        names = sorted((name for name in names if counts[name]), key=lambda name: -counts[name])
    if len(names) < n:
        raise DavspError(
            f"there are {len(names)} intents of MM-SafetyBench that the undefended model answers, not the {n} needed; ask for fewer."
        )
    return names[:n]


def _whole_groups(groups: Mapping[str, list[Query]], n: int, rng: random.Random) -> list[Query]:
    """Exactly `n` queries made of whole groups; a group that would be too many is passed over."""
    names = sorted(groups)
    part: list[Query] = []
    rng.shuffle(names)
    for name in names:
        if len(part) + len(groups[name]) <= n:
            part += groups[name]
    if len(part) < n:
        raise DavspError(f"there are not {n} questions of MM-Vet in whole pictures; ask for fewer.")
    return part
