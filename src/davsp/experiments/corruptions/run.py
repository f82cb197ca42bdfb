"""`davsp corruptions`: one border, every change of its canvas, answered and judged by `evaluate`.

out/responses.jsonl, verdicts.jsonl, metrics.json   as `davsp eval` leaves them; a killed run goes on
out/corruptions.json                                a record a row of the table
out/corruptions.md                                  the table
out/../shifts.svg                                   RSR over shifts, of all runs that lie beside this one
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch.nn import Conv2d, Conv3d
from torch.nn.functional import conv2d, cosine_similarity, max_pool2d

from davsp import metrics
from davsp.defenses import Defense, NoDefense, VisualPrompt
from davsp.errors import DavspError
from davsp.evaluation import Evaluation, evaluate
from davsp.experiments.corruptions.changes import UNTOUCHED, Change, changes
from davsp.experiments.corruptions.table import markdown, plot
from davsp.lvlm import LVLM, AnsweringLVLM, model_facts, undefended
from davsp.metrics import Outcome
from davsp.prompts import VisualSafetyPrompt
from davsp.prompts.base import from_picture
from davsp.query import Query
from davsp.report.cells import cut_note
from davsp.runtime import parallel
from davsp.runtime.files import manifest, read_json, write_json, write_text
from davsp.store import queries_hash
from davsp.vector import HarmfulnessVector

NONE, TEXT = "none", "text"
POOL = "pictures"
RECORDS = "corruptions.json"


class Corrupted(Defense):
    """A visual prompt of which the model gets the canvas after a change."""

    def __init__(self, inner: VisualPrompt, change: Change, name: str) -> None:
        self.inner, self.change, self.name = inner, change, name

    def check(self, lvlm: AnsweringLVLM) -> None:
        """Raises DavspError if the prompt is for another canvas."""
        self.inner.check(lvlm)

    def prepare(self, queries: Sequence[Query]) -> list[Query]:
        return [
            q if (canvas := q.picture()) is None else replace(q, image=self.change(canvas))
            for q in self.inner.prepare(queries)
        ]

    def sketch(self, question: str, size: tuple[int, int] | None) -> tuple[str, tuple[int, int] | None]:
        return self.inner.sketch(question, size)

    def describe(self) -> dict[str, Any]:
        return {"kind": "corrupted", "change": self.name, "inner": self.inner.describe()}


def corruptions(
    lvlm: LVLM,
    prompt: VisualSafetyPrompt,
    queries: Sequence[Query],
    out: Path,
    vector: HarmfulnessVector | None = None,
    names: Sequence[str] = (),
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    seed: int = 0,
    console: Console | None = None,
    caveat: str = "",
) -> list[dict[str, Any]]:
    """Answer the queries with the border's canvas under each change, beside no defense and the text alone.

    Args:
        prompt: the border.
        queries: malicious and benign.
        out: the run's folder; a killed run goes on, and changes may be added later.
        vector: if given, the mean projection under each change is in the records.
        names: of the changes; none: all. The untouched canvas is always among them.
        caveat: a sentence on the judge, for below the table.

    Returns:
        The records: one for `none` (no defense), for `text` (the text, the picture in a white border) and for each change. Of several
        processes the first returns them; the others none.

    Raises:
        DavspError: an unknown change, no malicious query, or what `evaluate` raises.
        Interrupted: Ctrl-C; the same call goes on.
    """
    known = changes(lvlm.canvas, patch_of(lvlm), prompt.padding)
    if unknown := [name for name in names if name not in known]:
        raise DavspError(f"change {unknown[0]!r} is not known: choose {', '.join(known)}")
    if not any(q.label == "malicious" for q in queries):
        raise DavspError("there is no malicious query among those given, so no RSR can be measured")
    chosen = {name: change for name, change in known.items() if name in {*(names or known), UNTOUCHED}}
    border = VisualPrompt(prompt)
    white = VisualSafetyPrompt.create(prompt.canvas, prompt.padding, "white")
    plain = VisualPrompt(white.with_texts(prompt.text, prompt.separator, prompt.suffix), TEXT)
    defenses: dict[str, Defense] = {NONE: NoDefense(), TEXT: plain}
    defenses |= {name: Corrupted(border, change, name) for name, change in chosen.items()}
    evaluation = evaluate(
        lvlm, defenses, queries, out, vector, batch_size=batch_size, max_new_tokens=max_new_tokens, baseline=UNTOUCHED,
        redo=True, seed=seed, console=console,
    )  # fmt: skip
    if parallel.rank() > 0:
        return []
    kept = {name: patches_kept(lvlm, prompt, change) for name, change in chosen.items()}
    records = _records(queries, evaluation, kept, seed)
    facts = manifest(
        **model_facts(lvlm), max_new_tokens=max_new_tokens or lvlm.longest, seed=seed, canvas=lvlm.canvas,
        patch=patch_of(lvlm), layer=vector.layer if vector else None, prompt=border.describe(),
        test={"queries": len(queries), "sha256": queries_hash(list(queries))}, undefended=undefended.facts(lvlm, queries),
    )  # fmt: skip
    write_json(out / "manifest.json", facts)
    caveat = " ".join(filter(None, (caveat, undefended.note(facts["undefended"]))))
    written = {key: facts[key] for key in ("model", "canvas", "patch")} | {
        "padding": prompt.padding,
        "records": records,
    }
    write_json(out / RECORDS, written)
    notes = [f"\n{note}\n" for note in (caveat, cut_note(evaluation.rows)) if note]
    write_text(out / "corruptions.md", "".join([markdown(written), *notes]))
    beside = [read_json(path) for path in sorted(out.parent.glob(f"*/{RECORDS}"))]
    write_text(out.parent / "shifts.svg", plot(beside))
    return records


def patch_of(lvlm: LVLM) -> int:
    """Side of the patches in which the model's tower cuts the canvas, in pixels."""
    return int(lvlm.model.config.vision_config.patch_size)


@torch.no_grad()
def patches_kept(lvlm: LVLM, prompt: VisualSafetyPrompt, change: Change) -> float:
    """Cosine of the border's patches before and after a change, as the tower's first convolution gives them, around their mean.

    1: nothing changed for the model; 0: as if it were another border. The picture inside is mid grey.
    """
    weight = next(m.weight for m in lvlm.model.modules() if isinstance(m, (Conv2d, Conv3d))).float()
    weight = weight if weight.ndim == 4 else weight.sum(2)  # one picture is two equal frames (Qwen2-VL)
    canvas = prompt.image(Image.new("RGB", (prompt.canvas, prompt.canvas), (128, 128, 128)))
    both = torch.stack([from_picture(image) for image in (canvas, change(canvas))]).to(weight.device)
    size = weight.shape[-1]
    patches = conv2d((both - lvlm.mean.float()) / lvlm.std.float(), weight, stride=size)  # (2, d, n, n)
    on = max_pool2d(prompt.mask, size)[0] > 0
    before, after = patches[:, :, on.to(weight.device)]
    centre = before.mean(-1, keepdim=True)
    return float(cosine_similarity((before - centre).flatten(), (after - centre).flatten(), dim=0))


def _records(
    queries: Sequence[Query], evaluation: Evaluation, kept: Mapping[str, float], seed: int
) -> list[dict[str, Any]]:
    label = {q.id: q.label for q in queries}
    outcomes = {
        name: _pooled(metrics.outcomes(queries, answers, evaluation.verdicts[name]))
        for name, answers in evaluation.responses.items()
    }
    records = []
    for name, answers in evaluation.responses.items():
        rates = metrics.rows("", name, outcomes[name], seed=seed)
        record: dict[str, Any] = {"change": name}
        if name in kept:
            record["patches"] = kept[name]
        projections = [(label[r.query_id], r.projection) for r in answers if r.projection is not None]
        for kind in ("malicious", "benign"):
            if values := [s for its, s in projections if its == kind]:
                record[f"projection_{kind}"] = float(np.mean(values))
        record |= {"rsr": {r["benchmark"]: _figure(r) for r in rates if r["metric"] == "rsr"}}
        for metric in ("over_refusal", "accuracy"):
            record[metric] = {r["benchmark"]: _figure(r) for r in rates if r["metric"] == metric}
        for other in (UNTOUCHED, TEXT):
            if name != other:
                rows = metrics.rows("", name, outcomes[name], outcomes[other], seed)
                record[f"against_{other}"] = {
                    f"{r['benchmark']} {r['metric'].removesuffix('_difference')}": _figure(r) | {"p": r["p"]}
                    for r in rows
                    if "p" in r
                }
        records.append(record)
    return records


def _pooled(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """RSR of each set and over all of them, over-refusal, and accuracy in total."""
    kept = [o for o in outcomes if o.split == "total" and o.metric in ("rsr", "over_refusal", "accuracy")]
    return kept + [replace(o, benchmark=POOL) for o in kept if o.metric == "rsr"]


def _figure(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("value", "low", "high", "n")}
