"""`davsp reproduce gate-kinds`: a border and its gate that met two of the four hard kinds of harm, tested on the other two.

out/SEEN/        of each split, named by the kinds it met (`all` met the four): vector, border with its gate, and answers to the test, as
                 `davsp eval` leaves them
out/metrics.json, kinds.md, manifest.json
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from davsp import metrics
from davsp.defenses import Defense, Gate, NoDefense, VisualPrompt
from davsp.embedded import words
from davsp.embedded.data import Protocol, calibration, picture_of, protocol
from davsp.evaluation import evaluate
from davsp.experiments.cells import rate
from davsp.experiments.gate.once import Once
from davsp.experiments.gate.run import with_gate
from davsp.experiments.stages import Stages, fitted_vector, trained_prompt
from davsp.lvlm import LVLM, fingerprint, model_name
from davsp.metrics import Outcome
from davsp.prompts import VisualSafetyPrompt
from davsp.query import Query
from davsp.report.cells import markdown_table
from davsp.runtime import parallel
from davsp.runtime.files import manifest, write_json, write_text
from davsp.store import queries_hash
from davsp.training import TrainSettings

HARD = ("theft", "fraud", "hacking", "poison")
ALL = "all"
SIZES = {"harm": 150, "utility": 30, "mme": 45, "llava_bench": 30}
TRAIN, SWEEP = 480, 48
TITLES = {
    "davsp": "DAVSP",
    "gate-answer": "gate, `answer`",
    "gate-states": "gate, `states`",
    "gate-first": "gate, `first`",
}
PARTS = {"train": ("train", "sweep"), "sweep": ("sweep",)}
"""Splits of the pairs: `train` has none of poison, so the border is trained on those of `sweep` as well."""

Outcomes = dict[str, list[Outcome]]


def kinds_of(split: str) -> tuple[str, ...]:
    """The hard kinds that a split has met."""
    return HARD if split == ALL else tuple(split.split("+"))


SPLITS = (*("+".join(seen) for seen in itertools.combinations(HARD, 2)), ALL)


def seen_only(seed: int, seen: Sequence[str], **sizes: int) -> Protocol:
    """The protocol with malicious training and sweep queries of some hard kinds alone, as many of each, and of no other kind.

    The vector is made of fully covered kinds as ever, and the test has malicious queries of the four hard kinds alone.

    Args:
        sizes: of the test, in place of `SIZES`.

    Raises:
        DavspError: a kind that no pair of a part has.
    """
    data = protocol(seed, train=TRAIN, sweep=SWEEP, **(sizes or SIZES))
    hard = [q for q in data.test if q.label == "benign" or q.category in HARD]
    return replace(
        data, sweep_malicious=of_kinds(seed, "sweep", seen, SWEEP), train_malicious=of_kinds(seed, "train", seen, TRAIN), test=hard
    )  # fmt: skip


def of_kinds(seed: int, part: str, seen: Sequence[str], count: int) -> list[Query]:
    """`count` malicious queries, kinds in turn, each intent in every form; a kind's pairs come round when they run out."""
    forms, queries = ("sd", "typo", "sd_typo"), []
    pools = {kind: [p for x in PARTS[part] for p in words.pairs("malicious", x) if p.kind == kind] for kind in seen}
    for kind, pool in pools.items():
        random.Random(f"kinds {seed} {part} {kind}").shuffle(pool)
    for i in range(count):
        kind, turn = seen[i % len(seen)], i // len(seen)
        pair, form = pools[kind][turn // 3 % len(pools[kind])], forms[turn % 3]
        if form == "sd" and pair.verb in words.HARMFUL_VERBS:
            form = "typo"  # a harmful verb in the question's words is always refused
        picture, question = picture_of(seed, part, form, turn, pair, f" {kind}")
        queries.append(Query(
            id=f"{part}-{kind}-{turn:03d}", question=question, label="malicious", benchmark=part, category=kind,
            group=pair.phrase, image=picture.image() if picture else None,
        ))  # fmt: skip
    return queries


def kinds(
    lvlm: LVLM, out: Path, *, text: str, refusal_text: str, settings: TrainSettings, seed: int = 0, batch_size: int = 32,
    console: Console | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train a border and calibrate its gate for each of `SPLITS`, and answer the test's hard kinds under all of them.

    Args:
        text, refusal_text, settings: as of `davsp.experiments.gate.run.gate`.

    Returns:
        The rows of metrics.json. Of several processes the first returns them; the others none.

    Raises:
        DavspError: what the steps raise.
        Interrupted: Ctrl-C; the same call goes on.
    """
    console, seconds = console or Console(), dict[str, float]()
    none = Once(NoDefense())
    settings = settings.model_copy(update={"seed": seed})
    found: dict[str, Outcomes] = {}
    for split in SPLITS:
        data = seen_only(seed, kinds_of(split))
        stages = Stages(out / split, console)
        border = _border(stages, lvlm, data, split, text, refusal_text, settings, batch_size)
        seconds |= {f"{split}: {name}": took for name, took in stages.seconds.items()}
        davsp = Once(VisualPrompt(border))
        defenses: dict[str, Defense] = {
            "none": none, "davsp": davsp, "gate-answer": Gate(davsp, "answer", None, none, tokens=lvlm.longest),
            "gate-states": Gate(VisualPrompt(border), "states", border.gate, none),
            "gate-first": Gate(VisualPrompt(border), "first", border.gate, none),
        }  # fmt: skip
        evaluation = evaluate(
            lvlm, defenses, data.test, out / split, batch_size=batch_size, redo=True, seed=seed, console=stages.console
        )
        found[split] = {
            name: metrics.outcomes(data.test, evaluation.responses[name], verdicts)
            for name, verdicts in evaluation.verdicts.items()
        }
    if parallel.rank() > 0:
        return []
    table = kind_rows(model_name(lvlm), found, {q.id: q.category for q in data.test})
    parts = ("train", "sweep", "test")
    facts = manifest(
        model=model_name(lvlm), revision=lvlm.revision, weights=fingerprint(lvlm), seed=seed, text=text,
        settings=settings.model_dump(), stages=seconds, test={"queries": len(data.test), "sha256": queries_hash(data.test)},
        pairs={kind: {x: sum(p.kind == kind for p in words.pairs("malicious", x)) for x in parts} for kind in HARD},
    )  # fmt: skip
    write_json(out / "metrics.json", metrics.metrics_file(table))
    write_json(out / "manifest.json", facts)
    write_text(out / "kinds.md", kind_table(table, model_name(lvlm)))
    return table


def _border(
    stages: Stages, lvlm: LVLM, data: Protocol, split: str, text: str, refusal_text: str, settings: TrainSettings,
    batch_size: int,
) -> VisualSafetyPrompt:  # fmt: skip
    """The border of a split with its gate, whose calibration has none of the hard kinds that were not met either.

    The thresholds are of benign queries alone; what is caught of the held-out malicious ones says little, for the border met some of
    their intents.
    """
    vector = fitted_vector(stages, lvlm, data, text)
    start = VisualSafetyPrompt.create(lvlm.canvas, round(lvlm.canvas / 12), text=text)
    saved = stages.out / "prompt"
    border = trained_prompt(stages, "davsp", start, lvlm, data, vector, settings, saved)
    fit_bad, fit_good, held_bad, held_good = calibration(settings.seed)
    unseen = set(HARD) - set(kinds_of(split))
    fit_bad, held_bad = ([q for q in part if q.category not in unseen] for part in (fit_bad, held_bad))
    sets = [fit_bad, fit_good, held_bad, held_good]
    return with_gate(stages, lvlm, border, vector, sets, refusal_text, saved, batch_size)


def kind_rows(model: str, found: Mapping[str, Outcomes], kind_of: Mapping[str, str]) -> list[dict[str, Any]]:
    """RSR on kinds that were met and that were not, over-refusal and accuracy; `split` names the kinds that were met.

    Rows of "DEFENSE, all kinds" stand beside those of each split: the same queries under the border that met the four. The split
    "total" pools the six, so each kind was met in three of them.
    """
    table: list[dict[str, Any]] = []
    total: Outcomes = {}
    for split in SPLITS[:-1]:
        every = found[split] | {f"{n}, {ALL} kinds": rows for n, rows in found[ALL].items() if n != "none"}
        placed = {name: _placed(rows, split, kind_of) for name, rows in every.items()}
        for name, rows in placed.items():
            table += metrics.rows(model, name, rows, None if name == "none" else placed["none"])
            total.setdefault(name, []).extend(replace(o, split="total", query_id=f"{split} {o.query_id}") for o in rows)
    for name, rows in total.items():
        table += metrics.rows(model, name, rows, None if name == "none" else total["none"])
    return table


def _placed(outcomes: Sequence[Outcome], split: str, kind_of: Mapping[str, str]) -> list[Outcome]:
    seen, rows = kinds_of(split), []
    for o in outcomes:
        if o.split != "total" or o.metric not in ("rsr", "over_refusal", "accuracy"):
            continue
        if o.metric == "rsr":
            o = replace(o, benchmark="seen kinds" if kind_of[o.query_id] in seen else "unseen kinds")
        rows.append(replace(o, split=split))
    return rows


def kind_table(rows: Sequence[Mapping[str, Any]], model: str) -> str:
    """RSR on the kinds that were not met, a line a split; the last two lines are of all splits."""
    at = {(r["defense"], r["benchmark"], r["split"], r["metric"]): r for r in rows}
    names = {"none": "*no defense*"}
    for suffix in ("", f", {ALL} kinds"):
        names |= {f"{name}{suffix}": f"{title}{suffix and ', met all'}" for name, title in TITLES.items()}
    heads = ["met", "never met", *names.values()]
    places = [(split.replace("+", ", "), ", ".join(k for k in HARD if k not in kinds_of(split)), "unseen kinds", split, "rsr")
              for split in SPLITS[:-1]]  # fmt: skip
    places += [
        ("all six", "RSR", "unseen kinds", "total", "rsr"),
        ("all six", "RSR on the kinds met", "seen kinds", "total", "rsr"),
    ]
    places += [("all six", "over-refusal", "benign", "total", "over_refusal")]
    lines = [
        [met, what, *(rate(at[name, benchmark, split, metric], 0) for name in names)]
        for met, what, benchmark, split, metric in places
    ]
    title = f"**Kinds of harm that were never met, {model}.** RSR in percent, 95 % intervals by intent."
    return "\n".join([title, "", *markdown_table(heads, lines)]) + "\n"
