"""The files of a run that decide whether it can go on: whom it asked what, and the answers so far.

manifest.json     what made the run, if it is given: versions, machine, command line
run.json          model, defenses and settings: all that decides the answers
queries.json      query id -> sha256 of everything in the query, the pixels of its picture included
responses.jsonl   the answers; grows by a batch at a time and is put into the queries' order at the end
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import PIL
from PIL import Image
from rich.console import Console

from davsp.errors import DavspError
from davsp.query import Query, Response, json_line, unpacked, write_jsonl
from davsp.runtime import journal, parallel
from davsp.runtime.files import read_bytes, read_json, sha256_bytes, sweep, to_json, write_all

RUN, QUERIES, RESPONSES, MANIFEST = "run.json", "queries.json", "responses.jsonl", "manifest.json"
VERDICTS, GRADES, METRICS = "verdicts.jsonl", "grades.jsonl", "metrics.json"
"""Files that are made of the answers (`davsp.evaluation`)."""
FOLLOWS = ("verdicts*.jsonl", "grades*.jsonl", "metrics*.json", "agreement.json", "report.html")
"""What is made of the answers; of answers that are gone none of it stays, so that no figure is of another run than its folder."""

Answers = dict[str, list[Response]]
"""By defense."""


class Store:
    """Answers on disk under each of some defenses.

    Args:
        folder: of the run.
        settings: what decides the answers under every defense, as JSON: model, longest answer, ...
        defenses: name -> what it says of itself.
        plan: the queries in the order in which they are answered.
        queries: the same in the order in which the finished file lists them.
        batch_size: answers that are added at a time.
        manifest: for manifest.json, as JSON; how many queries there are and their hash are added.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        defenses: Mapping[str, Mapping[str, Any]],
        plan: Sequence[Query],
        queries: Sequence[Query],
        batch_size: int,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        self.manifest = manifest
        self.folder, self.path, self.batch_size = folder, folder / RESPONSES, batch_size
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as it will be read back
        self.defenses: dict[str, Any] = json.loads(json.dumps(defenses))
        self.plan, self.queries = [q.id for q in plan], {q.id: query_hash(q) for q in queries}

    def open(self, redo: bool, console: Console) -> Answers:
        """The answers that are already there, cut to whole batches; the file is then ready for `append`.

        Args:
            redo: what to do with answers of another model, defense or set of queries: drop them and say why, or refuse.
            console: where that is said.

        Raises:
            DavspError: such answers without `redo`, or a file that is damaged.
        """
        stored = self._read()
        wrong = self._foreign(stored) if stored else {}
        if wrong and not redo:
            raise DavspError(
                f"{self.folder} holds answers of another run ({next(iter(wrong.values()))}); "
                "give another folder, or delete this one to answer anew."
            )
        for name, reason in wrong.items():
            console.print(f"[yellow]{name}: answered anew, as what is there has {reason}[/]")
        if stored and (note := other_pillow(self.folder)):
            console.print(f"[yellow]note: {note}[/]")
        if stored and self.manifest is not None and (notes := pillow_notes(self.folder)):
            self.manifest = {**self.manifest, "notes": [*self.manifest.get("notes", []), *notes]}
        usable = {name: [] if name in wrong else self._whole(stored.get(name, [])) for name in self.defenses}
        if parallel.rank() == 0:  # every process reads, the first one writes
            sweep(self.folder)
            if (self.folder / RUN).exists() and (wrong or not any(usable.values())):
                for path in (path for pattern in FOLLOWS for path in self.folder.glob(pattern)):
                    path.unlink()
            # the answers first, so that a kill in between can't leave old answers under a new record
            write_jsonl(self.path, [r for answers in usable.values() for r in answers])
            files = {QUERIES: self.queries, RUN: {**self.settings, "defenses": self.defenses}}
            if self.manifest is not None:
                files = {MANIFEST: {**self.manifest, "queries": self._summary()}, **files}
            write_all(self.folder, {name: to_json(value).encode() for name, value in files.items()})
        return usable

    def _summary(self) -> dict[str, Any]:
        """How many queries there are, and one hash of all (`queries_hash`)."""
        return {"count": len(self.queries), "sha256": _joined(self.queries.values())}

    def append(self, responses: Sequence[Response]) -> None:
        """Add a batch; when this returns, it is on the disk.

        Raises:
            DavspError: the disk is full.
        """
        if parallel.rank() == 0:
            journal.append(self.path, "".join(json_line(r) for r in responses))

    def finish(self, answers: Answers) -> None:
        """Write all answers, in the order that they are to stay in."""
        if parallel.rank() == 0:
            write_jsonl(self.path, [r for responses in answers.values() for r in responses])

    def _foreign(self, stored: Answers) -> dict[str, str]:
        """Defense -> what keeps its answers from being used."""
        record = recorded(self.folder)
        everywhere = "no record of what it was made with" if record is None else self._other(record)
        if record is None or everywhere:
            return dict.fromkeys(stored, everywhere)
        wrong = {}
        for name, answers in stored.items():
            if name not in self.defenses:
                wrong[name] = f"answers under {name!r}, which is not among the defenses now"
            elif record["defenses"].get(name) != self.defenses[name]:
                wrong[name] = f"another defense {name!r}"
            elif not self._complete(answers) and [r.query_id for r in answers] != self.plan[: len(answers)]:
                wrong[name] = f"answers under {name!r} in another order"
        return wrong

    def _other(self, record: Mapping[str, Any]) -> str:
        """Which settings or queries are not the same; empty if all are."""
        settings = [key for key in self.settings if record.get(key) != self.settings[key]]
        if settings:
            numbers = {key: (record.get(key), self.settings[key]) for key in settings}
            told = [
                key.replace("_", " ")
                + (f" ({then} there, {now} here)" if type(then) is type(now) is int else "")
                + (" (see --undefended)" if key == "undefended_picture" else "")
                for key, (then, now) in numbers.items()
            ]
            return "another " + ", ".join(told)
        then = hashes(self.folder)
        if then == self.queries and list(then) == list(self.queries):
            return ""
        changed = next((i for i in {**then, **self.queries} if then.get(i) != self.queries.get(i)), None)
        if changed is None:
            return "its queries in another order"
        what = "not there" if changed not in then else "not here" if changed not in self.queries else "another"
        return f"other queries, {changed!r} is {what}"

    def _whole(self, answers: list[Response]) -> list[Response]:
        """Without the last batch, if that is not all there."""
        if self._complete(answers):
            return answers
        return answers[: len(answers) // self.batch_size * self.batch_size]

    def _complete(self, answers: Sequence[Response]) -> bool:
        return len(answers) == len(self.plan) and {r.query_id for r in answers} == set(self.plan)

    def _read(self) -> Answers:
        """All complete lines; a last line cut off by a kill is dropped."""
        return by_defense(self.path) if self.path.exists() else {}


def by_defense(path: Path) -> Answers:
    """The answers in a responses.jsonl; a last line without an end, as a kill leaves it, is dropped.

    Raises:
        DavspError: no such file, or another line is damaged.
    """
    answers: Answers = {}
    for number, line in enumerate(journal.lines(path), 1):
        try:
            response = Response(**json.loads(line.decode("utf-8", errors="replace")))
            texts = (response.query_id, response.defense, response.text, response.thought)
            if not all(isinstance(text, str) for text in texts):
                raise TypeError("no text where one should be")
        except (ValueError, TypeError) as error:
            raise DavspError(f"{path}, line {number} is damaged ({error}); delete the file to answer anew") from error
        answers.setdefault(response.defense, []).append(response)
    return answers


def other_pillow(folder: Path) -> str:
    """A sentence if a run was made with a Pillow of another generation; empty if not, or if it does not say."""
    path = folder / MANIFEST
    facts = read_json(path) if path.exists() else {}
    then = facts.get("pillow") if isinstance(facts, dict) else None
    if not isinstance(then, str) or then.split(".")[0] == PIL.__version__.split(".")[0]:
        return ""
    return (
        f"answers in {folder} were made with Pillow {then}, this is {PIL.__version__}: pictures that are resized may differ by "
        "up to 22 of 255 levels, so undefended answers may be others"
    )


def pillow_notes(folder: Path) -> list[str]:
    """What `other_pillow` says of a run, and what it said when the run was gone on with before, as its manifest has it."""
    path = folder / MANIFEST
    facts = read_json(path) if path.exists() else {}
    kept = facts.get("notes") if isinstance(facts, dict) else None
    before = [note for note in kept if "were made with Pillow" in str(note)] if isinstance(kept, list) else []
    return [*before, *filter(None, [other_pillow(folder)])]


def recorded(folder: Path) -> dict[str, Any] | None:
    """What run.json says; None without one.

    Raises:
        DavspError: it is damaged, or queries.json beside it.
    """
    path = folder / RUN
    if not path.exists():
        return None
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("defenses"), dict):
        raise DavspError(f"{path} is no record of a run; delete {folder} to answer anew")
    hashes(folder)
    return record


def hashes(folder: Path) -> dict[str, str]:
    """Query id -> hash, as queries.json has it.

    Raises:
        DavspError: it is not there or damaged.
    """
    by_id = read_json(folder / QUERIES)
    if not isinstance(by_id, dict) or not all(isinstance(value, str) for value in by_id.values()):
        raise DavspError(f"{folder / QUERIES} holds no hash by query id; delete {folder} to answer anew")
    return by_id


def query_hash(query: Query) -> str:
    """A hash of all that is in a query, its picture's pixels (or its file's bytes) included."""
    words = {f.name: getattr(query, f.name) for f in fields(query) if f.name not in ("image", "turns")}
    if query.turns:  # older runs know of none
        words["turns"] = query.turns
    digest = sha256(json.dumps(words, sort_keys=True).encode())
    if isinstance(query.image, Image.Image):
        image = unpacked(query.image)
        digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    elif query.image is not None:
        digest.update(read_bytes(query.image))
    return digest.hexdigest()


def queries_hash(queries: Sequence[Query]) -> str:
    """One hash of all queries in their order."""
    return _joined(map(query_hash, queries))


def fields_hash(queries: Sequence[Query], *names: str) -> str:
    """One hash of some fields of all queries, and of their pictures as RGB: of what a training reads, and no more."""
    facts = []
    for query in queries:
        picture = query.picture()
        facts.append([*(getattr(query, name) for name in names), picture and sha256_bytes(picture.tobytes())])
    return sha256_bytes(json.dumps(facts).encode())


def _joined(parts: Iterable[str]) -> str:
    return sha256("".join(parts).encode()).hexdigest()
