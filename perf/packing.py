"""Answers a second while training davsp-mini: five questions packed behind one picture, against a row each.

Both ways in one run, on one model, alternating; the ratio is what counts. `python perf/packing.py [rounds]`
"""

import random
import sys
import time
from statistics import median

import torch

from davsp.embedded import losses
from davsp.embedded.architecture import new_model, see
from davsp.embedded.questions import Lesson, picture_lesson

TURNS = 5  # questions behind a picture


def seconds(model: torch.nn.Module, packer: losses.Packer, batch: list[Lesson]) -> float:
    """Forward and backward of a batch through tower, projector and decoder."""
    start = time.perf_counter()
    rows = packer.rows(batch, "cpu")
    features = see(model, [x.picture for x in batch if x.picture]).tokens
    losses.lesson_loss(model, rows, features.flatten(0, 1))[0].backward()
    model.zero_grad()
    return time.perf_counter() - start


def main(rounds: int) -> None:
    model, packer, rng = new_model().train(), losses.Packer(), random.Random(0)
    ratios = []
    for number in range(rounds + 1):
        packed = [Lesson(x.picture, x.turns[:TURNS]) for x in (picture_lesson(rng) for _ in range(4))]
        apart = [Lesson(x.picture, [turn]) for x in packed for turn in x.turns]
        a, b = seconds(model, packer, packed), seconds(model, packer, apart)
        if number:  # the first round warms up
            ratios.append(b / a)
            print(f"{len(apart)} answers: packed {a:.2f} s, apart {b:.2f} s, {b / a:.2f} times")
    print(f"median {median(ratios):.2f} times as many answers a second, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
