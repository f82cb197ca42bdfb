"""The one loop: optimise a prompt against an objective on a frozen model.

The order of the data is a pure function of seed and step, so a checkpoint needs no cursor and no generator state,
and a run that was killed goes on to the very same bits.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, UInt8
from pydantic import BaseModel, ConfigDict, Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from davsp.checkpoint import Checkpoint, State
from davsp.errors import DavspError, Interrupted
from davsp.files import sha256_bytes
from davsp.lvlm import LVLM, fingerprint
from davsp.objectives import answer_cross_entropy, projection_hinge
from davsp.prompts.base import P, Prompt
from davsp.query import Query
from davsp.vector import HarmfulnessVector, check_classes


class TrainSettings(BaseModel):
    """How a prompt is trained.

    Attributes:
        steps, batch_size: half of a batch is malicious, half benign.
        optimizer: "sign" (published: delta -= lr * sign of the gradient) or "adam".
        lr: step in pixel units, where white is 1; 1/255 is one 8-bit level.
        schedule: "constant", or "cosine" down to zero.
        objective: "projection" (hinge alone), "answer" (cross-entropy alone: every benign row its reference, every
            malicious row the refusal), or "both" (hinge + lam * cross-entropy, as published).
        lam: weight of the cross-entropy in "both".
        malicious_answer_share: share of malicious rows that carry the refusal in "both"; published 0.05.
        normalise: divide the hinge by half the distance between the class means, so that `lam` means the same for
            every model and layer; False is the raw sum of the slides.
        layer, mu_plus, mu_minus: None: the vector's.
        refusal: the answer wanted for malicious queries.
        seed: of data order and choice of rows that carry an answer.
        checkpoint_every, probe_every: in steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(150, ge=1)
    batch_size: int = Field(16, ge=2, multiple_of=2)
    optimizer: Literal["sign", "adam"] = "sign"
    lr: float = Field(1 / 255, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    objective: Literal["projection", "answer", "both"] = "both"
    lam: float = Field(0.2, ge=0)
    malicious_answer_share: float = Field(0.05, ge=0, le=1)
    normalise: bool = True
    layer: int | None = None
    mu_plus: float | None = None
    mu_minus: float | None = None
    refusal: str = Field(min_length=1, default="I am sorry, I cannot help with that.")
    seed: int = 0
    checkpoint_every: int = Field(25, ge=1)
    probe_every: int = Field(25, ge=1)


@dataclass(frozen=True)
class Examples:
    """One class of training data, prepared once: pictures resized to the canvas as 8-bit levels."""

    interiors: UInt8[Tensor, "n 3 s s"]
    questions: list[str]
    answers: list[str]

    def digest(self) -> str:
        """SHA-256 over pictures, questions and answers."""
        return sha256_bytes(self.interiors.numpy().tobytes() + json.dumps([self.questions, self.answers]).encode())


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
) -> P:
    """Train a prompt; checkpoints and `metrics.jsonl` are in `out`.

    Args:
        prompt: where to start; left as it is.
        malicious, benign: training queries, each with a picture; `reference` is a benign query's wanted answer.
        vector: the harmfulness vector of this model.
        resume: go on from the checkpoint in `out`, if there is one; False starts anew.
        progress: show a bar with loss and the mean projections of both classes.
        probe: held-out queries (those without a picture are left out); every `probe_every` steps `probe_rsr`, the share
            of the malicious ones above mu_plus, and `probe_benign`, the share of the benign ones below mu_minus, are
            logged.

    Returns:
        A new prompt with float32 delta, and the facts of its making in `config`; `save_pretrained` makes it 8-bit.

    Raises:
        DavspError: bad data or settings; a checkpoint of other settings; a full disk.
        Interrupted: Ctrl-C; the state has been saved.
    """
    run = Run(lvlm, prompt, malicious, benign, vector, settings, Path(out), probe or [])
    checkpoint = run.checkpoint
    state = checkpoint.restore(lvlm.device) if resume else None
    state = state or checkpoint.start(prompt.delta.detach().clone().to(lvlm.device))
    with _bar(progress) as bar:
        task = bar.add_task("training", total=settings.steps, completed=state.step, note="")
        try:
            while state.step < settings.steps:
                state, metrics = run.advance(state)
                bar.update(task, completed=state.step, note=_note(metrics))
                if state.step % settings.checkpoint_every == 0 or state.step == settings.steps:
                    checkpoint.save(state)
        except KeyboardInterrupt:
            checkpoint.save(state)
            raise Interrupted(
                f"stopped at step {state.step} of {settings.steps}; the state is in {out}: "
                "give the same command again to go on"
            ) from None
    return cast(P, run.finish(state))


class Run:
    """One training run: what is fixed, and the step."""

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
    ):
        check_classes(malicious, benign)
        prompt.check(lvlm)
        self.lvlm, self.prompt, self.vector = lvlm, prompt, vector
        self.settings, self.layer, self.mu_plus, self.mu_minus = _resolve(settings, lvlm, vector)
        self.weight_hinge, self.weight_answer = _weights(self.settings)
        if self.settings.normalise:
            self.weight_hinge /= vector.half_gap(self.layer)
        answered = self.weight_answer > 0
        self.malicious = prepare(prompt, malicious, lambda query: self.settings.refusal)
        self.benign = prepare(prompt, benign, _reference if answered else lambda query: "")
        self.probes = {
            label: prepare(prompt, chosen, lambda query: "")
            for label in ("malicious", "benign")
            if (chosen := [query for query in probe if query.label == label and query.image is not None])
        }
        self.checkpoint = Checkpoint(out, self._identity())

    # -- the step --------------------------------------------------------------------------------------------------

    def advance(self, state: State) -> tuple[State, dict[str, Any]]:
        """One step: draw a batch, one forward and backward, move delta, write the metrics."""
        settings, half = self.settings, self.settings.batch_size // 2
        bad, good = self._rows("malicious", state.step), self._rows("benign", state.step)
        interior = torch.cat([self.malicious.interiors[bad], self.benign.interiors[good]])
        questions = [self.malicious.questions[i] for i in bad] + [self.benign.questions[i] for i in good]
        answers = self._answers(state.step, bad, good) if self.weight_answer > 0 else None

        delta = state.delta.clone().requires_grad_()
        canvas = self.prompt.with_delta(delta).apply(_pixels(interior, delta.device))
        output = self.lvlm.step(canvas, questions, self.layer, answers)
        s = self.vector.project(output.state, self.layer)
        hinge = projection_hinge(s, torch.arange(2 * half, device=s.device) < half, self.mu_plus, self.mu_minus)
        loss = self.weight_hinge * hinge
        metrics = {"step": state.step + 1, "lr": self._lr(state.step), "hinge": hinge.item()}
        if output.answer_loss is not None and answers is not None:
            answered = torch.tensor([answer is not None for answer in answers], device=s.device)
            answer_loss = answer_cross_entropy(output.answer_loss, answered)
            loss = loss + self.weight_answer * answer_loss
            metrics["answer_loss"] = answer_loss.item()
        metrics["loss"] = loss.item()
        metrics["projection_malicious"], metrics["projection_benign"] = s[:half].mean().item(), s[half:].mean().item()
        if not math.isfinite(metrics["loss"]):
            raise DavspError(f"the loss is not finite at step {metrics['step']}: lower lr or lam, or use dtype float32")

        (gradient,) = torch.autograd.grad(loss, delta)
        after = self._move(state, gradient, metrics["lr"])
        if after.step % settings.probe_every == 0 or after.step == settings.steps:
            metrics |= self._probe(after)
        self.checkpoint.log(metrics)
        return after, metrics

    def _move(self, state: State, gradient: Tensor, lr: float) -> State:
        """Sign step, or Adam with the usual constants; then back to what is allowed."""
        step, first, second = state.step + 1, state.first, state.second
        if self.settings.optimizer == "sign":
            move = gradient.sign()
        else:
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            move = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        return State(step, self.prompt.with_delta(state.delta - lr * move).project_().delta, first, second)

    def _lr(self, step: int) -> float:
        cosine = (1 + math.cos(math.pi * step / self.settings.steps)) / 2
        return self.settings.lr * (cosine if self.settings.schedule == "cosine" else 1)

    def _rows(self, label: str, step: int) -> list[int]:
        """Which examples of a class are in the batch: epoch after epoch, each in an order of its own."""
        count, half = len(getattr(self, label).questions), self.settings.batch_size // 2
        places = range(step * half, (step + 1) * half)
        return [_order(f"{self.settings.seed} {label} {place // count}", count)[place % count] for place in places]

    def _answers(self, step: int, bad: list[int], good: list[int]) -> list[str | None]:
        """Every benign row carries its reference, a share of the malicious ones the refusal."""
        settings, coin = self.settings, Random(f"{self.settings.seed} answers {step}")
        share = 1.0 if settings.objective == "answer" else settings.malicious_answer_share
        refusals = [settings.refusal if coin.random() < share else None for _ in bad]
        return [*refusals, *(self.benign.answers[i] for i in good)]

    @torch.no_grad()
    def _probe(self, state: State) -> dict[str, Any]:
        """Share of held-out queries on the right side of their margin; a cheap stand-in for RSR."""
        prompt, size, shares = self.prompt.with_delta(state.delta), self.settings.batch_size, {}
        for label, examples in self.probes.items():
            projections = []
            for start in range(0, len(examples.questions), size):
                canvas = prompt.apply(_pixels(examples.interiors[start : start + size], state.delta.device))
                output = self.lvlm.step(canvas, examples.questions[start : start + size], self.layer)
                projections.append(self.vector.project(output.state, self.layer))
            s = torch.cat(projections)
            name, right = (
                ("probe_rsr", s > self.mu_plus) if label == "malicious" else ("probe_benign", s < self.mu_minus)
            )
            shares[name] = float(right.float().mean())
        return shares

    def finish(self, state: State) -> Prompt:
        """The trained prompt with the facts of its making."""
        prompt = self.prompt.with_delta(state.delta.cpu())
        figures = {f"train_{name}": value for name, value in self.checkpoint.last().items()}
        prompt.config |= {
            "model_id": self.lvlm.model_id,
            "revision": self.lvlm.revision,
            "layer": self.layer,
            "mu_plus": self.mu_plus,
            "mu_minus": self.mu_minus,
            "figures": prompt.config.get("figures", {}) | figures,
            "data": prompt.config.get("data", {}) | self.checkpoint.identity["data"],
        }
        return prompt

    def _identity(self) -> dict[str, Any]:
        """All that the result depends on."""
        start = self.prompt
        return {
            **self.settings.model_dump(exclude={"checkpoint_every", "probe_every"}),
            "model": [self.lvlm.model_id, self.lvlm.revision, str(self.lvlm.dtype)],
            "weights": fingerprint(self.lvlm),  # a folder that is trained anew keeps its name
            "prompt": [
                start.kind,
                start.text,
                *(getattr(start, name, None) for name in ("padding", "eps")),  # noise of every eps starts at zero
                sha256_bytes(start.delta.detach().cpu().numpy().tobytes()),
            ],
            "data": {
                "train_malicious": self.malicious.digest(),
                "train_benign": self.benign.digest(),
                "vector": sha256_bytes(self.vector.direction(self.layer).numpy().tobytes()),
            },
        }


def prepare(prompt: Prompt, queries: Sequence[Query], answer: Callable[[Query], str]) -> Examples:
    """Resize every picture once and put the safety text before every question.

    Raises:
        DavspError: a query has no picture; a prompt can't act on it.
    """
    interiors = []
    for query in queries:
        picture = query.picture()
        if picture is None:
            raise DavspError(f"query {query.id} has no image: a visual prompt is trained on queries with one")
        interiors.append(torch.round(prompt.resize([picture]) * 255).to(torch.uint8))
    questions = [prompt.question(query.question) for query in queries]
    return Examples(torch.cat(interiors), questions, [answer(query) for query in queries])


def _reference(query: Query) -> str:
    if not query.reference:
        raise DavspError(f"benign query {query.id} has no reference answer: add one, or choose objective 'projection'")
    return query.reference


def _weights(settings: TrainSettings) -> tuple[float, float]:
    """Weights of hinge and cross-entropy."""
    return {"projection": (1.0, 0.0), "answer": (0.0, 1.0), "both": (1.0, settings.lam)}[settings.objective]


def _resolve(settings: TrainSettings, lvlm: LVLM, vector: HarmfulnessVector) -> tuple[TrainSettings, int, float, float]:
    """Fill in what was left to the vector, and check that vector, layer and model go together."""
    layer = vector.layer if settings.layer is None else settings.layer
    lvlm.check_layer(layer)
    vector.check(lvlm)
    plus, minus = (vector.mu_plus, vector.mu_minus) if layer == vector.layer else vector.margins(layer)
    plus = plus if settings.mu_plus is None else settings.mu_plus
    minus = minus if settings.mu_minus is None else settings.mu_minus
    if plus <= minus:
        raise DavspError(
            f"mu_plus ({plus:.4g}) must be above mu_minus ({minus:.4g}): give other margins or another layer"
        )
    return settings.model_copy(update={"layer": layer, "mu_plus": plus, "mu_minus": minus}), layer, plus, minus


@lru_cache(maxsize=64)
def _order(key: str, count: int) -> list[int]:
    return Random(key).sample(range(count), count)


def _pixels(levels: UInt8[Tensor, "b 3 s s"], device: torch.device) -> Float[Tensor, "b 3 s s"]:
    return levels.to(device).float() / 255


def _bar(progress: bool) -> Progress:
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), disable=not progress)


def _note(metrics: dict[str, Any]) -> str:
    parts = [f"loss {metrics['loss']:.3f}", f"malicious {metrics['projection_malicious']:+.2f}"]
    parts.append(f"benign {metrics['projection_benign']:+.2f}")
    return " · ".join(parts + [f"held out {metrics['probe_rsr']:.0%}" for _ in [0] if "probe_rsr" in metrics])
