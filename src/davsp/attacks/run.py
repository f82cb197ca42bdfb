"""One run: every attack at every size on every defense, answered, judged and counted.

out/attack.json              the model and the queries
out/DEFENSE/defense.json     the defense
out/DEFENSE/ATTACK-EPS/      attack.json: what else decides the pictures; pictures/ and found.jsonl grow a batch at a time; beside them
                             the answers, as `davsp eval` leaves them; of universal also change.safetensors
out/metrics.json             tidy rows with the fields attack and eps besides (`davsp.attacks.table`)
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from davsp.attacks.apgd import SearchResult
from davsp.attacks.deeds import wanted
from davsp.attacks.possible import check, check_room, slug
from davsp.attacks.records import RECORDS, append, curve_points, picture_file, read_records, save_batch
from davsp.attacks.redraw import REDRAWS
from davsp.attacks.search import losses_of, search
from davsp.attacks.settings import BASELINE, CLEAN, AttackSettings
from davsp.attacks.suffix import random_words, search_suffix, with_words
from davsp.attacks.surface import Target, files, picture_of, surfaces, visual
from davsp.attacks.universal import train_universal
from davsp.defenses import Defense
from davsp.errors import Interrupted
from davsp.evaluation import Evaluation, evaluate
from davsp.evaluation.fitting import fitting
from davsp.judges import Judge, keyword
from davsp.judges.base import PromptJudge
from davsp.lvlm import LVLM, fingerprint
from davsp.lvlm.undefended import in_records
from davsp.query import Query, single
from davsp.runtime import journal, parallel
from davsp.runtime.files import alone, sha256_bytes, sweep
from davsp.runtime.progress import bar
from davsp.store import queries_hash
from davsp.vector import HarmfulnessVector

RECORD, DEFENSE = "attack.json", "defense.json"


@dataclass(frozen=True)
class AttackResult:
    """One attack on one defense.

    Attributes:
        eps: in levels; None where the attack has no size.
        queries: as the attacker sends them, pictures as paths; of redrawn ones without the picture.
        records: one a query: sha256 of the picture's pixels, points of its loss; empty without a search.
        evaluation: answers and verdicts.
    """

    defense: str
    attack: str
    eps: int | None
    queries: list[Query]
    evaluation: Evaluation
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def labels(self) -> dict[str, str]:
        """Query id -> verdict."""
        return {v.query_id: v.label for v in self.evaluation.verdicts[self.defense]}


def attack(
    lvlm: LVLM,
    defenses: Mapping[str, Defense],
    queries: Sequence[Query],
    out: Path,
    settings: AttackSettings,
    vector: HarmfulnessVector | None = None,
    judge: Judge = keyword,
    *,
    training: Sequence[Query] = (),
    max_new_tokens: int | None = None,
    console: Console | None = None,
) -> list[AttackResult]:
    """Attack each defense, with all of its texts and pixels known, and answer what comes of it. A killed run goes on.

    Args:
        defenses: by name; `none` must be among them if `transfer` is asked for.
        queries: malicious ones with a picture are attacked; benign ones are asked once, clean, so that utility stands beside.
        out: the run's folder; more attacks, sizes and defenses may be added to it later.
        vector: the defender's, for hide and both.
        training: malicious queries with pictures that `universal` is trained on, none of which is attacked.
        judge: of the answers. One that sees pictures is shown the queries' own, not what the attack made of them.

    Raises:
        DavspError: no malicious query with a picture, hide or both without a vector, transfer without `none`, deed where a request is
            not known, words or wanted answers that the model has no room for, universal without pictures of its own, a model on a server or in float16, a target that the model has no words
            for, or a folder of another run.
        Interrupted: Ctrl-C; whatever was done is kept.
    """
    console = console or Console(quiet=True)
    single([*queries, *training], "an attack")
    malicious = [q for q in queries if q.label == "malicious" and q.image is not None]
    training = [q for q in training if q.image is not None]
    check(lvlm, defenses, malicious, settings, vector, training)
    if bare := sum(q.label == "malicious" for q in queries) - len(malicious):
        console.print(f"[yellow]{bare} malicious queries have no picture and are left out[/]")
    clean = [*malicious, *(q for q in queries if q.label == "benign")]
    fitting(lvlm, defenses, clean, max_new_tokens)
    check_room(lvlm, defenses, clean, settings, training, max_new_tokens)
    if isinstance(judge, PromptJudge) and judge.prompt.picture:
        judge = judge.of(malicious)
    with nullcontext() if parallel.rank() > 0 else alone(out):  # the first process writes for all
        _sweep(out)
        identity = {"model": fingerprint(lvlm), "dtype": str(lvlm.dtype), "queries": queries_hash(malicious)}
        identity |= in_records(lvlm, malicious)
        journal.record(out / RECORD, identity)
        run = _Run(lvlm, malicious, out, settings, vector, training, judge, max_new_tokens, console)
        results: list[AttackResult] = []
        try:
            for name in sorted(defenses, key=lambda name: name != BASELINE):  # what transfers is made first
                results += run.all(name, defenses[name], clean)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; what was done is in {out}: give the same command again to go on") from None
        return results


@torch.no_grad()
def probe(lvlm: LVLM, defense: Defense, queries: Sequence[Query], target: str) -> tuple[bool, bool]:
    """Whether a defense is what its attack takes it for, on the first two queries.

    Returns:
        Whether five tries give the same losses, all of it made anew each time; and whether the attacked canvas and question
        are those that the defense makes of the sent file.
    """
    losses = []
    for _ in range(5):
        places, surface = surfaces(lvlm, defense, queries[:2], target)[0]
        losses.append(surface.comply(surface.pictures))
    attacked = [queries[i] for i in places]
    sent = [replace(q, image=image) for q, image in zip(attacked, files(surface.pictures), strict=True)]
    prepared = defense.prepare(sent)
    canvas = lvlm.preprocess([picture_of(q) for q in prepared])
    attacked_canvas = surface.canvas(surface.pictures).cpu()
    same_canvas = isinstance(canvas, torch.Tensor) and torch.equal(attacked_canvas, canvas.cpu())
    return (
        all(torch.equal(losses[0], one) for one in losses[1:]),
        same_canvas and surface.questions == [q.question for q in prepared],
    )


@dataclass(frozen=True)
class _Run:
    lvlm: LVLM
    queries: list[Query]
    out: Path
    settings: AttackSettings
    vector: HarmfulnessVector | None
    training: list[Query]
    judge: Judge
    max_new_tokens: int | None
    console: Console

    def all(self, name: str, defense: Defense, clean: list[Query]) -> Iterator[AttackResult]:
        """All attacks on one defense, the clean pictures first."""
        folder = self.out / slug(name)
        _sweep(folder)
        journal.record(folder / DEFENSE, {"name": name, "defense": defense.describe()})
        yield self._answer(name, defense, CLEAN, None, clean)
        for attack in self.settings.attacks:
            if attack == "redraw":
                for kind, redraw in REDRAWS.items():
                    sent = [replace(q, image=redraw(picture_of(q), visual(defense))) for q in self.queries]
                    result = self._answer(name, defense, f"redraw-{kind}", None, sent)
                    yield replace(result, queries=[replace(q, image=None) for q in sent])  # many, and easily made again
            elif attack == "random-words":
                self._open(name, attack, None)
                sent = random_words(self.lvlm, clean, self.settings.words, self.settings.seed)
                yield self._answer(name, defense, attack, None, sent)
            elif attack == "suffix":
                yield self._answer(name, defense, attack, None, self._with_words(name, defense))
            elif attack != "transfer" or name != BASELINE:
                for eps in self.settings.eps:
                    queries = self._with_words(name, defense) if attack == "joint" else self.queries
                    source = (BASELINE, "comply") if attack == "transfer" else (name, attack)
                    records, sent = self._with_pictures(queries, *source, defense, eps)
                    yield self._answer(name, defense, attack, eps, sent, records)

    def _answer(
        self,
        name: str,
        defense: Defense,
        attack: str,
        eps: int | None,
        queries: list[Query],
        records: Sequence[dict[str, Any]] = (),
    ) -> AttackResult:
        folder = self._folder(name, attack, eps)
        self.console.print(f"[dim]{name}: {folder.name}[/]", highlight=False)
        evaluation = evaluate(
            self.lvlm, {name: defense}, queries, folder, None, self.judge, batch_size=self.settings.batch_size,
            max_new_tokens=self.max_new_tokens, seed=self.settings.seed, console=self.console,
        )  # fmt: skip
        return AttackResult(name, attack, eps, queries, evaluation, list(records))

    def _folder(self, name: str, attack: str, eps: int | None) -> Path:
        return self.out / slug(name) / (attack if eps is None else f"{attack}-{eps}")

    def _open(self, name: str, attack: str, eps: int | None) -> tuple[Path, dict[str, dict[str, Any]]]:
        """The folder of an attack, and the records in it, which are of the same settings."""
        folder = self._folder(name, attack, eps)
        _sweep(folder / "pictures")
        identity = self.settings.of(attack, self.vector)
        if attack == "deed":
            identity["deeds"] = sha256_bytes(json.dumps(self._target(attack, self.queries)).encode())
        if attack == "universal":
            identity["training"] = queries_hash(self.training)
        journal.record(folder / RECORD, identity, expected=(folder / RECORDS).exists())
        return folder, read_records(folder, "words" if attack == "suffix" else "sha256")

    def _with_words(self, name: str, defense: Defense) -> list[Query]:
        """The queries with the words of `suffix` after them; those that are there already are read."""
        folder, records = self._open(name, "suffix", None)
        settings = self.settings
        with bar(self.console) as bars:
            total, done = (settings.word_steps * n for n in (len(self.queries), len(records)))
            task = bars.add_task("suffix", total=total, completed=done)
            left = [q for q in self.queries if q.id not in records]

            def found(number: int) -> dict[str, Any]:
                q = left[number]
                best = search_suffix(
                    self.lvlm, defense, q, settings.target, length=settings.words, steps=settings.word_steps,
                    candidates=settings.word_candidates, batch_size=settings.batch_size, seed=settings.seed,
                    progress=lambda n: bars.advance(task, n),
                )  # fmt: skip
                return {"query_id": q.id, "words": best.text, **curve_points(best.curve)}

            for _, record in parallel.work(len(left), found):
                append(folder, [record])
        parallel.wait()
        records = read_records(folder, "words")
        return [with_words(q, records[q.id]["words"]) for q in self.queries]

    def _target(self, attack: str, queries: Sequence[Query]) -> Target:
        """How the answers are to begin."""
        return [wanted(q, self.settings.target) or "" for q in queries] if attack == "deed" else self.settings.target

    def _change(self, defense: Defense, eps: int, folder: Path) -> torch.Tensor:
        """That of `universal`."""
        settings = self.settings
        with bar(self.console) as bars:
            task = bars.add_task(f"universal {eps}, training", total=settings.universal_steps)
            return train_universal(
                self.lvlm, defense, self.training, settings.target, eps / 255, steps=settings.universal_steps,
                batch_size=settings.batch_size, seed=settings.seed, file=folder / "change.safetensors",
                progress=lambda n: bars.advance(task, n),
            )  # fmt: skip

    def _with_pictures(
        self, queries: list[Query], name: str, attack: str, defense: Defense, eps: int
    ) -> tuple[list[dict[str, Any]], list[Query]]:
        """The records of one attack, and the queries with its pictures; those that are there already are read."""
        folder, records = self._open(name, attack, eps)
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        size, passes = self.settings.batch_size, self.settings.passes(attack)
        starts = range(0, len(queries), size)
        left = [at for at in starts if not all(q.id in records for q in queries[at : at + size])]
        delta = self._change(defense, eps, folder) if attack == "universal" and left else None
        with bar(self.console) as bars:
            task = bars.add_task(f"{attack} {eps}", total=passes * len(queries), completed=passes * len(records))

            def found(number: int) -> list[tuple[list[int], SearchResult]]:
                at, results = left[number], []
                batch = queries[at : at + size]
                for places, surface in surfaces(self.lvlm, defense, batch, self._target(attack, batch)):
                    losses = losses_of(attack, surface, self.vector, lambda n: bars.advance(task, n))
                    best = search(attack, losses, surface.pictures, eps / 255, self.settings, at, delta)
                    results.append(
                        ([at + i for i in places], best._replace(pictures=best.pictures.cpu(), curve=best.curve.cpu()))
                    )
                return results

            for _, results in parallel.work(len(left), found):
                for numbers, best in results:
                    save_batch(folder, [queries[i] for i in numbers], numbers, best, records)
        parallel.wait()
        records = read_records(folder, "sha256")
        sent = [replace(q, image=picture_file(folder, records[q.id])) for q in queries]
        return [records[q.id] for q in queries], sent


def _sweep(folder: Path) -> None:
    """As `sweep`, in the process that writes."""
    if parallel.rank() == 0 and folder.exists():
        sweep(folder)
