"""The published recipe on a model of another scale, for `time_to_quality.py`.

What is published (`train/optimize.py` and `scripts/train.sh` of zhangyitonggg/DAVSP, for LLaVA-1.5-13B): batches of 2 of one class,
a coin decides which; sign steps of 1/255; hinge with fixed margins 27 and -2; 0.02 x answer loss on every benign batch and on 5 % of
the malicious ones; the border starts at the mean colour and is never clamped; the batches of the first epoch come again in the same
order. Delta is float32 here, not float16.

How the published numbers read on another model's scale is a guess: here their distance of 29 is the distance between the class means
of the vector's data, with -2 at the benign and 27 at the malicious mean, and the hinge is counted in that unit, so that 0.02 means
what it meant.
"""

from collections.abc import Iterator
from itertools import cycle
from random import Random

import torch

from davsp import HarmfulnessVector, TrainSettings, VisualSafetyPrompt
from davsp.training.batches import Batch
from davsp.training.borders import Run

MARGINS, LAM, SHARE, LR = (27.0, -2.0), 0.02, 0.05, 1 / 255


def published_settings(vector: HarmfulnessVector, settings: TrainSettings) -> TrainSettings:
    """The loss on this model's scale: margins at the class means, the answer's weight in units of the hinge."""
    benign, malicious = (float(mean[vector.layer - 1]) for mean in (vector.mean_benign, vector.mean_malicious))
    unit = (malicious - benign) / (MARGINS[0] - MARGINS[1])
    return TrainSettings(
        steps=settings.steps,
        batch_size=2,
        lam=LAM * unit,
        normalise=False,
        mu_plus=malicious,
        mu_minus=benign,
        refusal=settings.refusal,
    )


def published(run: Run, seed: int) -> Iterator[VisualSafetyPrompt]:
    """Steps of the published recipe on a run's data and loss."""
    rng = Random(f"published {seed}")
    batches = {label: cycle(epoch(run, label, rng)) for label in ("malicious", "benign")}
    delta = run.lvlm.mean.view(3, 1, 1).expand_as(run.prompt.delta) * run.prompt.mask.to(run.lvlm.device)
    while True:
        label = "malicious" if rng.random() < 0.5 else "benign"
        batch = next(batches[label])
        if label == "malicious" and rng.random() >= SHARE:
            batch = Batch(batch.interiors, batch.questions, batch.malicious, [None] * len(batch))
        gradient, _ = run.gradient(delta, batch)
        delta = delta - LR * gradient.sign()
        yield run.prompt.with_delta(delta.clamp(0, 1))


def epoch(run: Run, label: str, rng: Random) -> list[Batch]:
    """One pass over a class in batches of two."""
    examples = run.malicious if label == "malicious" else run.benign
    order = rng.sample(range(len(examples.questions)), len(examples.questions))
    return [
        Batch(
            examples.interiors[rows],
            [examples.questions[i] for i in rows],
            torch.full((len(rows),), label == "malicious"),
            [examples.answers[i] for i in rows],
        )
        for rows in (order[at : at + 2] for at in range(0, len(order), 2))
    ]
