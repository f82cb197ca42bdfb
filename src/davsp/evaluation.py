"""Queries x defenses x judge -> responses, verdicts, and the tidy metrics with intervals.

With an `out` folder every step is a file: `responses/<defense>.jsonl` grows by one batch at a time, so a run
that was killed goes on where it stopped and ends with the same answers; `verdicts/<defense>.jsonl` follow from
them; `metrics.json` from both.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from davsp import metrics, parallel
from davsp.defenses.base import Defense
from davsp.errors import DavspError, Interrupted
from davsp.files import read_json, write_json
from davsp.judges import Judge, keyword
from davsp.judges.base import PromptJudge
from davsp.lvlm import LVLM, fingerprint, model_name
from davsp.query import Query, Response, Verdict, write_jsonl
from davsp.vector import HarmfulnessVector


@dataclass(frozen=True)
class Evaluation:
    """Responses and verdicts by defense, and the rows of metrics.json."""

    responses: dict[str, list[Response]]
    verdicts: dict[str, list[Verdict]]
    rows: list[dict[str, Any]]


def evaluate(
    lvlm: LVLM,
    defenses: Mapping[str, Defense],
    queries: Sequence[Query],
    out: Path | None = None,
    vector: HarmfulnessVector | None = None,
    judge: Judge = keyword,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 48,
    baseline: str = "none",
    redo: bool = False,
    seed: int = 0,
    console: Console | None = None,
) -> Evaluation:
    """Answer all queries under each defense, judge the answers, and measure.

    Args:
        lvlm: the frozen model.
        defenses: by the name they have in all files and tables.
        queries: malicious and benign, ids unique.
        out: where responses, verdicts and metrics.json are kept; None keeps them in memory only.
        vector: records the projection of each defended query with its response.
        judge: of the answers to malicious queries.
        batch_size: queries a forward, and responses written at a time.
        max_new_tokens: the longest answer.
        baseline: the defense that the paired differences start from; if it is not among `defenses`, there are none.
        redo: what to do with responses of another model, defense or set of queries found in `out`: answer anew
            and say why, or refuse.
        seed: of the bootstrap.
        console: where progress and notes go; None is silent.

    Raises:
        DavspError: no queries, an id twice, an unreadable picture, or responses in `out` that belong to another
            run and `redo` is False.
        Interrupted: Ctrl-C; what was answered is kept.
    """
    _check(queries, defenses)
    console = console or Console(quiet=True)
    common = {
        "model": fingerprint(lvlm),
        "queries": queries_hash(queries),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    common["vector"] = _vector_hash(vector)
    responses: dict[str, list[Response]] = {}
    try:
        with _bar(console) as bar:
            for name, defense in defenses.items():
                store = (
                    None
                    if out is None
                    else _Store(out / "responses" / f"{name}.jsonl", common | {"defense": defense.describe()})
                )
                done = [] if store is None else store.open(queries, batch_size, redo, console)
                task = bar.add_task(name, total=len(queries), completed=len(done))
                for at in range(len(done), len(queries), batch_size * parallel.processes()):
                    start = at + batch_size * parallel.rank()
                    batch = queries[start : start + batch_size]
                    answered = defense.respond(
                        lvlm, batch, vector, batch_size, partial(bar.advance, task), max_new_tokens
                    )
                    for share in parallel.gathered([replace(r, defense=name) for r in answered]):
                        if store is not None:
                            store.append(share)
                        done += share
                    bar.update(task, completed=len(done))
                responses[name] = done
    except KeyboardInterrupt:
        kept = (
            f"the answers so far are in {out / 'responses'}: give the same command again to go on"
            if out
            else "nothing was kept"
        )
        raise Interrupted(f"stopped; {kept}") from None
    verdicts = {name: verdicts_of(queries, found, judge) for name, found in responses.items()}
    outcomes = {name: metrics.outcomes(queries, responses[name], verdicts[name]) for name in responses}
    rows = rows_of(model_name(lvlm), outcomes, baseline, seed)
    if out is not None and parallel.rank() == 0:
        for name, found in verdicts.items():
            write_jsonl(out / "verdicts" / f"{name}.jsonl", found)
        write_json(out / "metrics.json", metrics.metrics_file(rows))
    return Evaluation(responses, verdicts, rows)


def judge_name(judge: Judge) -> str:
    """The judge's `name` if it has one, else its function's, and behind it the VERSION of its module: "keyword/1"."""
    if own := getattr(judge, "name", None):
        return str(own)
    name = getattr(judge, "__name__", type(judge).__name__)
    version = getattr(sys.modules.get(judge.__module__), "VERSION", None)
    return name if version is None else f"{name}/{version}"


def verdicts_of(queries: Sequence[Query], responses: Sequence[Response], judge: Judge = keyword) -> list[Verdict]:
    """The judge's verdicts of the responses to malicious queries; a label the judge made up is unscored.

    A judge that asks a model gets them all at once.
    """
    query_of = {q.id: q for q in queries}
    items = [(query_of[r.query_id], r) for r in responses if query_of[r.query_id].label == "malicious"]
    if isinstance(judge, PromptJudge):
        return judge.judge_all(items)
    name = judge_name(judge)
    found = []
    for q, r in items:
        label, reason = judge(r.text, q.question)
        if label not in ("safe", "unsafe", "unscored"):
            label, reason = "unscored", f"the judge said {label!r}, which is no verdict"
        found.append(Verdict(r.query_id, r.defense, name, label, reason))
    return found


def queries_hash(queries: Sequence[Query]) -> str:
    """A hash of all that is in the queries, the pixels of their pictures included."""
    digest = sha256()
    for q in queries:
        words = [q.id, q.question, q.label, q.benchmark, q.category, q.group, q.reference, *q.answers]
        digest.update(json.dumps(words).encode())
        if isinstance(q.image, Image.Image):
            digest.update(f"{q.image.mode}{q.image.size}".encode() + q.image.tobytes())
        elif q.image is not None:
            digest.update(_read(q.image))
    return digest.hexdigest()


class _Store:
    """The responses of one defense on disk: the lines, and beside them what they are answers to."""

    def __init__(self, path: Path, made_with: dict[str, Any]) -> None:
        self.path, self.made_with = path, made_with
        self.key_path = path.with_suffix(".json")

    def open(self, queries: Sequence[Query], batch_size: int, redo: bool, console: Console) -> list[Response]:
        """The responses already there, cut to whole batches; the file is then ready for `append`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        reason = self._differs(queries)
        if reason and not redo:
            raise DavspError(
                f"{self.path} holds answers of another run ({reason}); give another output folder or delete the file"
            )
        if reason:
            console.print(f"[yellow]{self.path.name}: answered anew, as what is there has {reason}[/]")
        found = [] if reason else self._read()
        whole = found if len(found) == len(queries) else found[: len(found) // batch_size * batch_size]
        if parallel.rank() > 0:  # every process reads, the first one writes
            return whole
        write_jsonl(self.path, whole)  # first, so that a kill in between can't leave old answers under a new key
        write_json(self.key_path, self.made_with)
        return whole

    def append(self, responses: Sequence[Response]) -> None:
        if parallel.rank() > 0:
            return
        lines = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in responses)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DavspError(
                f"{self.path} cannot be written ({error.strerror}); free some space and run again to go on"
            ) from error

    def _differs(self, queries: Sequence[Query]) -> str:
        """What keeps the file from being continued; empty if nothing does, or if there is none."""
        if not self.path.exists() or not self.path.stat().st_size:
            return ""
        if not self.key_path.exists():
            return "no record of what it was made with"
        then, now = read_json(self.key_path), json.loads(json.dumps(self.made_with))
        other = [key for key in now if then.get(key) != now[key]]
        if other:
            return "another " + ", ".join(other).replace("_", " ")
        ids = [r.query_id for r in self._read()]
        return "" if ids == [q.id for q in queries[: len(ids)]] else "answers in another order"

    def _read(self) -> list[Response]:
        """All complete lines; a last line cut off by a kill is dropped."""
        if not self.path.exists():
            return []
        lines = _read(self.path).decode("utf-8", errors="replace").split("\n")
        try:
            return [Response(**json.loads(line)) for line in lines[:-1] if line]
        except (ValueError, TypeError) as error:
            raise DavspError(f"{self.path} is damaged ({error}); delete it to answer anew") from error


def rows_of(
    model: str, found: Mapping[str, list[metrics.Outcome]], baseline: str, seed: int = 0
) -> list[dict[str, Any]]:
    """The rows of metrics.json from each defense's outcomes, paired with those of `baseline` if it is among them."""
    before = found.get(baseline)
    per_defense = (
        metrics.rows(model, name, o, None if name == baseline else before, seed) for name, o in found.items()
    )
    return list(chain.from_iterable(per_defense))


def _check(queries: Sequence[Query], defenses: Mapping[str, Defense]) -> None:
    if not queries:
        raise DavspError("evaluate got no queries; give at least one")
    if not defenses:
        raise DavspError('evaluate got no defense; give at least {"none": NoDefense()}')
    seen: set[str] = set()
    for q in queries:
        if q.id in seen:
            raise DavspError(f"the query id {q.id!r} is there twice; make the ids unique")
        seen.add(q.id)


def _vector_hash(vector: HarmfulnessVector | None) -> str | None:
    if vector is None:
        return None
    return sha256(
        f"{vector.layer}".encode() + vector.direction(vector.layer).float().cpu().numpy().tobytes()
    ).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DavspError(f"{path} cannot be read ({error.strerror})") from error


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=console.quiet)
