"""One run: every attack at every size on every defense, answered, judged and counted.

out/attack.json              the model and the queries
out/DEFENSE/defense.json     the defense
out/DEFENSE/ATTACK-EPS/      attack.json: what else decides the pictures; pictures/ and found.jsonl grow a batch at a time; beside them
                             the answers, as `davsp eval` leaves them
out/metrics.json             tidy rows with the fields attack and eps besides (`davsp.attacks.table`)
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from davsp.attacks.apgd import SearchResult
from davsp.attacks.records import RECORDS, append, curve_points, picture_file, read_records, save_batch
from davsp.attacks.redraw import REDRAWS
from davsp.attacks.search import losses_of, search
from davsp.attacks.settings import BASELINE, BY_WORDS, CLEAN, AttackSettings
from davsp.attacks.suffix import search_suffix, with_words
from davsp.attacks.surface import files, picture_of, surfaces, visual
from davsp.defenses import Defense, Gate
from davsp.errors import DavspError, Interrupted
from davsp.evaluation import Evaluation, evaluate
from davsp.evaluation.fitting import fitting
from davsp.judges import Judge, keyword
from davsp.judges.base import PromptJudge
from davsp.lvlm import LVLM, fingerprint
from davsp.lvlm.undefended import in_records
from davsp.query import Query
from davsp.runtime import journal, parallel
from davsp.runtime.files import alone, sweep
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
    max_new_tokens: int | None = None,
    console: Console | None = None,
) -> list[AttackResult]:
    """Attack each defense, with all of its texts and pixels known, and answer what comes of it. A killed run goes on.

    Args:
        defenses: by name; `none` must be among them if `transfer` is asked for.
        queries: malicious ones with a picture are attacked; benign ones are asked once, clean, so that utility stands beside.
        out: the run's folder; more attacks, sizes and defenses may be added to it later.
        vector: the defender's, for hide and both.
        judge: of the answers. One that sees pictures is shown the queries' own, not what the attack made of them.

    Raises:
        DavspError: no malicious query with a picture, hide or both without a vector, transfer without `none`, a model on a server or
            in float16, a target that the model has no words for, or a folder of another run.
        Interrupted: Ctrl-C; whatever was done is kept.
    """
    console = console or Console(quiet=True)
    malicious = [q for q in queries if q.label == "malicious" and q.image is not None]
    _check(lvlm, defenses, malicious, settings, vector)
    if bare := sum(q.label == "malicious" for q in queries) - len(malicious):
        console.print(f"[yellow]{bare} malicious queries have no picture and are left out[/]")
    clean = [*malicious, *(q for q in queries if q.label == "benign")]
    fitting(lvlm, defenses, clean, max_new_tokens)
    if isinstance(judge, PromptJudge) and judge.prompt.picture:
        judge = judge.of(malicious)
    with nullcontext() if parallel.rank() > 0 else alone(out):  # the first process writes for all
        _sweep(out)
        identity = {"model": fingerprint(lvlm), "dtype": str(lvlm.dtype), "queries": queries_hash(malicious)}
        identity |= in_records(lvlm, malicious)
        journal.record(out / RECORD, identity)
        run = _Run(lvlm, malicious, out, settings, vector, judge, max_new_tokens, console)
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

    def _with_pictures(
        self, queries: list[Query], name: str, attack: str, defense: Defense, eps: int
    ) -> tuple[list[dict[str, Any]], list[Query]]:
        """The records of one attack, and the queries with its pictures; those that are there already are read."""
        folder, records = self._open(name, attack, eps)
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        size, passes = self.settings.batch_size, self.settings.passes(attack)
        with bar(self.console) as bars:
            task = bars.add_task(f"{attack} {eps}", total=passes * len(queries), completed=passes * len(records))
            starts = range(0, len(queries), size)
            left = [at for at in starts if not all(q.id in records for q in queries[at : at + size])]

            def found(number: int) -> list[tuple[list[int], SearchResult]]:
                at, results = left[number], []
                for places, surface in surfaces(self.lvlm, defense, queries[at : at + size], self.settings.target):
                    losses = losses_of(attack, surface, self.vector, lambda n: bars.advance(task, n))
                    best = search(attack, losses, surface.pictures, eps / 255, self.settings, at)
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


def slug(name: str) -> str:
    """A defense's name as a folder's, which stays in its own."""
    return re.sub(r"^\.+", "_", re.sub(r"[^\w.+-]+", "_", name))


def _check(
    lvlm: LVLM,
    defenses: Mapping[str, Defense],
    malicious: Sequence[Query],
    settings: AttackSettings,
    vector: HarmfulnessVector | None,
) -> None:
    if lvlm.server is not None:
        raise DavspError("an attack needs the gradients of a model that is loaded here; a server gives none")
    if lvlm.dtype == torch.float16:
        raise DavspError("an attack in float16 loses small gradients: load the model in bfloat16 or float32 (--dtype)")
    if not malicious:
        raise DavspError("there is no malicious query with a picture to attack")
    unknown = lvlm.tokenizer.unk_token_id
    if unknown is not None and unknown in lvlm.tokenizer(settings.target, add_special_tokens=False)["input_ids"]:
        raise DavspError(f"target {settings.target!r} holds words that {lvlm.model_id} does not know; give others")
    if (needs := {"hide", "both"} & set(settings.attacks)) and vector is None:
        raise DavspError(f"the attack {min(needs)!r} needs the defender's vector (--vector), or leave it out")
    if words := [a for a in BY_WORDS if a in settings.attacks and any(isinstance(d, Gate) for d in defenses.values())]:
        raise DavspError(f"the attack {words[0]!r} does not know gates, which ask a question twice; leave it out")
    if "joint" in settings.attacks and "suffix" not in settings.attacks:
        raise DavspError("the attack 'joint' goes on from the words of 'suffix'; name that, too")
    if "transfer" in settings.attacks and not (BASELINE in defenses and "comply" in settings.attacks):
        raise DavspError("the attack 'transfer' needs the defense 'none' and the attack 'comply', by which it is made")
    if len({slug(name) for name in defenses}) < len(defenses):
        raise DavspError("two defenses have names that differ in punctuation alone; rename one")
    if vector is not None:
        vector.check(lvlm)
    for defense in defenses.values():
        defense.check(lvlm)
        visual(defense)
