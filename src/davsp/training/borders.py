"""DAVSP's training: both classes in every batch, the hinge on their projections and the cross-entropy of answers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.lvlm import LVLM
from davsp.lvlm.onehot import answer_losses
from davsp.prompts.base import P, Prompt
from davsp.query import Query
from davsp.runtime.files import sha256_bytes
from davsp.training.adversary import goals, worst
from davsp.training.augment import Change, changed, draw
from davsp.training.batches import Batch, pixels, prepare, reference
from davsp.training.checkpoint import TrainState
from davsp.training.loop import Asked, Loop, complete, rows_of_step
from davsp.training.objectives import answer_cross_entropy, projection_hinge
from davsp.training.settings import DEED, TrainSettings, resolve
from davsp.vector import HarmfulnessVector, check_classes

__all__ = ["Run", "TrainSettings", "train"]


def train(
    lvlm: LVLM,
    prompt: P,
    malicious: Sequence[Query],
    benign: Sequence[Query],
    vector: HarmfulnessVector,
    settings: TrainSettings,
    out: str | Path,
    resume: bool = True,
    progress: bool = True,
    probe: Sequence[Query] | None = None,
    deeds: Sequence[str] | None = None,
) -> P:
    """Train a prompt; checkpoints and `metrics.jsonl` are in `out`.

    Args:
        prompt: where to start; left as it is.
        malicious: training queries, each with a picture.
        benign: the same; `reference` is the answer they are to get.
        vector: the harmfulness vector of this model.
        resume: go on from the checkpoint in `out`, if there is one; False starts anew.
        progress: show a bar with loss and the mean projections of both classes.
        probe: held-out queries (those without a picture are left out); every `probe_every` steps `probe_rsr`, the share
            of the malicious ones above mu_plus, and `probe_benign`, the share of the benign ones below mu_minus, are
            logged.
        deeds: of each malicious query the answer that does what it asks for; for an `adversarial_target` of "deed".

    Returns:
        A new prompt with float32 delta, and how it was trained in `config`; `save_pretrained` makes it 8-bit.

    Raises:
        DavspError: bad data or settings; a checkpoint of other settings; a full disk.
        Interrupted: Ctrl-C; the state has been saved.
    """
    run = Run(lvlm, prompt, malicious, benign, vector, settings, Path(out), probe or [], deeds or [])
    return cast(P, complete(run, resume, progress))


class Run(Loop):
    """A run of DAVSP."""

    settings: TrainSettings

    def __init__(
        self,
        lvlm: LVLM,
        prompt: Prompt,
        malicious: Sequence[Query],
        benign: Sequence[Query],
        vector: HarmfulnessVector,
        settings: TrainSettings,
        out: Path,
        probe: Sequence[Query],
        deeds: Sequence[str] = (),
    ):
        check_classes(malicious, benign)
        super().__init__(lvlm, prompt, settings)
        self.vector = vector
        self.settings, self.layer, self.mu_plus, self.mu_minus = resolve(settings, lvlm, vector)
        self.weight_hinge, self.weight_answer = self.settings.weights
        if self.settings.normalise:
            self.weight_hinge /= vector.half_gap(self.layer)
        self.goals = goals(lvlm, self.settings, malicious, deeds)
        coin = Random(f"{settings.seed} classes")
        self.turns = [
            coin.random() < 1 - settings.benign_share for _ in range(settings.steps)
        ]  # whether a batch is malicious, where it is of one class
        answered = self.weight_answer > 0
        self.malicious = prepare(prompt, malicious, lambda query: self.settings.refusal)
        self.benign = prepare(prompt, benign, reference if answered else lambda query: "")
        self.probes = {
            label: prepare(prompt, held_out, lambda query: "")
            for label in ("malicious", "benign")
            if (held_out := [query for query in probe if query.label == label and query.image is not None])
        }
        data = {
            "train_malicious": self.malicious.digest(),
            "train_benign": self.benign.digest(),
            "vector": sha256_bytes(vector.direction(self.layer).numpy().tobytes()),
        }
        if self.goals and self.settings.adversarial_target == DEED:
            data["deeds"] = sha256_bytes("\n".join(self.goals).encode())
        self.checkpoint = self._checkpoint(out, data)

    def _losses(
        self, delta: Float[Tensor, "3 s s"], part: Batch, whole: Batch
    ) -> tuple[Float[Tensor, " b"], dict[str, Tensor]]:
        """Projections of a part of the batch, and what it adds to the losses, which are means over the whole batch."""
        canvas = self._canvas(delta, self._interiors(delta.detach(), part), part)
        answers = part.answers if part.answered else None
        output = self.lvlm.step(canvas, part.questions, self.layer, answers, self.settings.end_token)
        s = self.vector.project(output.state, self.layer)
        hinge = projection_hinge(s, part.malicious.to(s.device), self.mu_plus, self.mu_minus)
        losses = {"hinge": hinge * (len(part) / len(whole))}
        loss = self.weight_hinge * losses["hinge"]
        if output.answer_loss is not None:
            answered = torch.tensor([answer is not None for answer in part.answers], device=s.device)
            mean = answer_cross_entropy(output.answer_loss, answered)
            losses["answer_loss"] = mean * (part.answered / whole.answered)
            loss = loss + self.weight_answer * losses["answer_loss"]
        return s, losses | {"loss": loss}

    def _canvas(
        self, delta: Float[Tensor, "3 s s"], interiors: Float[Tensor, "b 3 s s"], part: Batch
    ) -> Float[Tensor, "b 3 s s"]:
        """What the model sees of a part."""
        canvas = self.prompt.with_delta(delta).apply(interiors)
        return changed(canvas, part.changes) if part.changes else canvas

    def _interiors(self, delta: Float[Tensor, "3 s s"], part: Batch) -> Float[Tensor, "b 3 s s"]:
        """The pictures of a part, those of the attacker as he makes them against delta."""
        interiors = pixels(part.interiors, delta.device)
        rows, attacked = part.attacked()
        if not rows:
            return interiors
        settings, border = self.settings, getattr(self.prompt, "mask", torch.zeros_like(delta[:1])).to(delta)
        found = worst(
            lambda pictures: self._resistance(delta, pictures, attacked), interiors[rows], 1 - border,
            settings.adversarial / 255, settings.adversarial_steps, [key or "" for key in attacked.starts],
        )  # fmt: skip
        interiors[rows] = found
        return interiors

    def _resistance(
        self, delta: Float[Tensor, "3 s s"], pictures: Float[Tensor, "b 3 s s"], part: Batch
    ) -> Float[Tensor, " b"]:
        """What the attacker raises."""
        settings, canvas = self.settings, self._canvas(delta, pictures, part)
        if part.goals:
            return -answer_losses(self.lvlm, canvas, part.questions, [goal or "" for goal in part.goals])
        refusals = [settings.refusal] * len(part) if self.weight_answer > 0 else None
        output = self.lvlm.step(canvas, part.questions, self.layer, refusals, settings.end_token)
        below = self.weight_hinge * (self.mu_plus - self.vector.project(output.state, self.layer))
        return below if output.answer_loss is None else below + self.weight_answer * output.answer_loss

    def _batch(self, step: int) -> Batch:
        """Malicious and benign by their share; or all of one class."""
        if self.settings.mixed:
            bad, good = self._rows("malicious", step), self._rows("benign", step)
        else:
            turn = self.turns[step]
            rows = self._rows("malicious" if turn else "benign", self.turns[:step].count(turn))
            bad, good = (rows, []) if turn else ([], rows)
        return Batch(
            torch.cat([self.malicious.interiors[bad], self.benign.interiors[good]]),
            [self.malicious.questions[i] for i in bad] + [self.benign.questions[i] for i in good],
            torch.tensor([True] * len(bad) + [False] * len(good)),
            self._answers(step, bad, good) if self.weight_answer > 0 else [None] * (len(bad) + len(good)),
            self._changes(step, len(bad) + len(good)),
            self._starts(step, len(bad), len(good)),
            [*(self.goals[i] for i in bad), *[None] * len(good)] if self.goals else [],
        )

    def _rows(self, label: str, turn: int) -> list[int]:
        """Which examples of a class are in its batch number `turn`: epoch after epoch, each in an order of its own."""
        count, size = len(getattr(self, label).questions), self.settings.batch_size
        if self.settings.mixed:
            size = self.settings.benign_rows if label == "benign" else size - self.settings.benign_rows
        return rows_of_step(f"{self.settings.seed} {label}", count, size, turn)

    def _answers(self, step: int, bad: list[int], good: list[int]) -> list[str | None]:
        """Every benign row carries its reference, a share of the malicious ones the refusal."""
        settings, coin = self.settings, Random(f"{self.settings.seed} answers {step}")
        share = 1.0 if settings.objective == "answer" else settings.malicious_answer_share
        draws = [coin.random() < share for _ in bad]
        drawn = draws if settings.mixed else [draws[0]] * len(bad) if bad else []
        refusals = [settings.refusal if one else None for one in drawn]
        return [*refusals, *(self.benign.answers[i] for i in good)]

    def _changes(self, step: int, count: int) -> list[Change | None]:
        """What each row's canvas goes through on its way to the model."""
        kinds = self.settings.augment
        return [draw(kinds, f"{self.settings.seed} augment {step} {row}") for row in range(count)] if kinds else []

    def _starts(self, step: int, bad: int, good: int) -> list[str | None]:
        """Where the attacker begins on each malicious row."""
        if not self.settings.adversarial:
            return []
        return [*(f"{self.settings.seed} adversary {step} {row}" for row in range(bad)), *[None] * good]

    @torch.no_grad()
    def _probe(self, state: TrainState) -> dict[str, Any]:
        """Now and then the share of held-out queries on the right side of their margin; a cheap stand-in for RSR."""
        if state.step % self.settings.probe_every and state.step < self.settings.steps:
            return {}
        prompt, size = self.prompt.with_delta(state.delta), self.settings.batch_size
        shares: dict[str, Any] = {}
        for label, examples in self.probes.items():
            projections = []
            for start in range(0, len(examples.questions), size):
                canvas = prompt.apply(pixels(examples.interiors[start : start + size], state.delta.device))
                output = self.lvlm.step(canvas, examples.questions[start : start + size], self.layer)
                projections.append(self.vector.project(output.state, self.layer))
            s = torch.cat(projections)
            name, right = (
                ("probe_rsr", s > self.mu_plus) if label == "malicious" else ("probe_benign", s < self.mu_minus)
            )
            shares[name] = float(right.float().mean())
        return shares

    def _questions(self) -> Iterator[Asked]:
        bad, good, carried = self.malicious, self.benign, self.weight_answer > 0
        for examples, whose in ((bad, "the refusal (--refusal)"), (good, "its reference answer")):
            answered = (examples.answers, whose) if carried else ()
            yield Asked(examples.names, examples.questions, *answered)
        if self.goals:
            yield Asked(
                bad.names, bad.questions, self.goals, "the answer that its attacker wants (--adversarial-target)"
            )
        for held_out in self.probes.values():
            yield Asked(held_out.names, held_out.questions)

    def finish(self, state: TrainState) -> Prompt:
        prompt = super().finish(state)
        prompt.config["data"] |= {
            "train_malicious_queries": len(self.malicious.questions),
            "train_benign_queries": len(self.benign.questions),
        }
        prompt.config |= {"layer": self.layer, "mu_plus": self.mu_plus, "mu_minus": self.mu_minus}
        return prompt
