"""What a gate costs while answering, beside no defense, the border alone and ECSO, in one run.

    python perf/gate.py --prompt out/prompt --out results/perf/gate.json

Every query is asked under every defense, in random order, before the next, one at a time, from picture and question to the answer as
text. Answers have the lengths that the model gives them: a gate saves most where it refuses. The figure is the mean CPU time of one
thread (on a GPU wall time) over that of no defense on the same queries: of benign ones, of malicious ones, and of a mixture with 0 to
50 % malicious ones, with a 95 % bootstrap interval over queries. `long` answers go on to 64 tokens, whatever the model would say, as
real models' do: the price of a look is then a smaller share.
"""

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from inference import endless
from rich.console import Console
from rich.progress import track
from rich.table import Table

from davsp import LVLM, Query, VisualSafetyPrompt, embedded
from davsp.defenses import ECSO, Defense, Gate, NoDefense, VisualPrompt
from davsp.embedded.ecso_templates import TEMPLATES
from davsp.lvlm import model_name
from davsp.runtime.files import manifest, write_json

NONE = "none"
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
LONG = 64
TARGETS = {
    ("gate-first", "benign"): 1.7, ("gate-states", "benign"): 1.35, ("gate-first", "long"): 1.35,
    ("gate-first", "malicious"): 0.5, ("gate-states", "malicious"): 0.5,
}  # fmt: skip
CONSOLE = Console(stderr=True)


def defenses(prompt: VisualSafetyPrompt) -> dict[str, Defense]:
    """No defense, the border, the three gates, ECSO, and gates before it."""
    border = VisualPrompt(prompt)
    return {
        NONE: NoDefense(), "davsp": border, "gate-states": Gate(border, "states", prompt.gate),
        "gate-first": Gate(border, "first", prompt.gate), "gate-answer": Gate(border, "answer"), "ecso": ECSO(templates=TEMPLATES),
        "gate-first,ecso": Gate(border, "first", prompt.gate, ECSO(templates=TEMPLATES)),
        "gate-answer,ecso": Gate(border, "answer", else_=ECSO(templates=TEMPLATES)),
    }  # fmt: skip


def measure(
    lvlm: LVLM, forms: Mapping[str, Defense], queries: Sequence[Query], rounds: int, seed: int
) -> dict[str, np.ndarray]:
    """Seconds by defense, (queries,): the median over rounds; a round before the first warms up."""
    rng, clock = random.Random(seed), time.process_time if lvlm.device.type == "cpu" else time.perf_counter
    seconds = {name: np.zeros((rounds, len(queries))) for name in forms}
    for number in range(rounds + 1):
        some = list(enumerate(queries if number else queries[:1]))
        for at, query in track(some, f"round {number} of {rounds}", console=CONSOLE):
            for name in rng.sample(list(forms), len(forms)):
                start = clock()
                forms[name].respond(lvlm, [query])
                if number:
                    seconds[name][number - 1, at] = clock() - start
    return {name: np.median(each, 0) for name, each in seconds.items()}


def longer(lvlm: LVLM, forms: Mapping[str, Defense], queries: Sequence[Query], seed: int) -> dict[str, np.ndarray]:
    """The same of benign queries with answers of `LONG` tokens."""
    before = lvlm.longest
    lvlm.longest = LONG
    try:
        with endless(lvlm):
            return measure(lvlm, forms, queries, 1, seed)
    finally:
        lvlm.longest = before


def ratio(
    mine: Sequence[np.ndarray], plain: Sequence[np.ndarray], weights: Sequence[float], seed: int
) -> dict[str, float]:
    """Mean seconds of a mixture of classes over those of no defense, with an interval; queries are drawn within their class."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(2000):
        at = [rng.integers(0, len(one), len(one)) for one in mine]
        drawn.append(
            sum(w * a[i].mean() for w, a, i in zip(weights, mine, at, strict=True))
            / sum(w * b[i].mean() for w, b, i in zip(weights, plain, at, strict=True))
        )
    value = sum(w * a.mean() for w, a in zip(weights, mine, strict=True)) / sum(
        w * b.mean() for w, b in zip(weights, plain, strict=True)
    )
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"ratio": float(value), "low": float(low), "high": float(high)}


def main(
    prompt: Annotated[Path, typer.Option(help="Folder of a border with gate.json.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("out/perf/gate.json"),
    model: Annotated[str, typer.Option(help="A model that ships.")] = "davsp-mini",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    count: Annotated[int, typer.Option(min=4, help="Queries of a class.")] = 24,
    seed: int = 0,
) -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    lvlm, border = embedded.load(model), VisualSafetyPrompt.from_pretrained(prompt)
    forms = defenses(border)
    test = [q for q in embedded.protocol(seed).test if q.image is not None]
    rng = random.Random(seed)
    classes = {label: rng.sample([q for q in test if q.label == label], count) for label in ("benign", "malicious")}
    seconds = {label: measure(lvlm, forms, queries, rounds, seed) for label, queries in classes.items()}
    seconds["long"] = longer(lvlm, forms, classes["benign"], seed)
    rows = []
    for name in forms:
        for label, of in seconds.items():
            facts = ratio([of[name]], [of[NONE]], [1.0], seed)
            rows.append({"defense": name, "queries": label, "seconds": float(of[name].mean()), **facts})
        for share in SHARES:
            both = [[seconds[label][which] for label in ("benign", "malicious")] for which in (name, NONE)]
            rows.append(
                {
                    "defense": name,
                    "queries": "mixture",
                    "share": share,
                    **ratio(both[0], both[1], [1 - share, share], seed),
                }
            )
    result = {
        "manifest": manifest(device=str(lvlm.device), rounds=rounds, seed=seed), "model": model_name(lvlm), "queries": count,
        "long": LONG, "rows": rows,
    }  # fmt: skip
    show(result)
    write_json(out, result)


def show(result: dict[str, Any]) -> None:
    """Print times of no defense."""
    at = {(r["defense"], r["queries"], r.get("share")): r for r in result["rows"]}
    table = Table(
        "defense",
        "benign",
        "malicious",
        "half and half",
        f"benign, {LONG} tokens",
        title=f"{result['model']}: times no defense",
    )
    for name in dict.fromkeys(r["defense"] for r in result["rows"]):
        cells = [
            at[name, "benign", None],
            at[name, "malicious", None],
            at[name, "mixture", 0.5],
            at[name, "long", None],
        ]
        table.add_row(name, *(f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" for r in cells))
    CONSOLE.print(table)
    for (name, label), most in TARGETS.items():
        r = at[name, label, None]["ratio"]
        CONSOLE.print(f"{name}, {label}: {r:.2f}, aim <= {most}: {'yes' if r <= most else 'no'}")
    ecso = at["ecso", "mixture", 0.5]["ratio"]
    for name in ("gate-states", "gate-first", "gate-answer"):
        CONSOLE.print(f"ECSO over {name}, half and half: {ecso / at[name, 'mixture', 0.5]['ratio']:.2f}, aim >= 2")


if __name__ == "__main__":
    typer.run(main)
