"""The one loop: optimise a prompt against an objective on a frozen model.

The order of the data is a pure function of seed and step, so a checkpoint needs no cursor and no generator state,
and a run that was killed goes on to the very same bits.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from davsp import parallel
from davsp.checkpoint import Checkpoint, State
from davsp.errors import DavspError, Interrupted
from davsp.examples import Batch, pixels, prepare, reference
from davsp.files import sha256_bytes
from davsp.lvlm import LVLM, fingerprint
from davsp.memory import advice, estimate_memory, recomputing
from davsp.objectives import answer_cross_entropy, projection_hinge
from davsp.prompts.base import P, Prompt
from davsp.query import Query
from davsp.settings import TrainSettings, resolve
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
        if progress and lvlm.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(lvlm.device)
            if note := run.memory_advice(free):
                bar.console.print(note)
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
    parallel.gathered(None)  # process 0 has written the last metrics
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
        if settings.batch_size < parallel.processes():
            raise DavspError(f"batch_size {settings.batch_size} is less than the {parallel.processes()} processes")
        self.lvlm, self.prompt, self.vector = lvlm, prompt, vector
        self.settings, self.layer, self.mu_plus, self.mu_minus = resolve(settings, lvlm, vector)
        self.weight_hinge, self.weight_answer = self.settings.weights
        if self.settings.normalise:
            self.weight_hinge /= vector.half_gap(self.layer)
        answered = self.weight_answer > 0
        self.malicious = prepare(prompt, malicious, lambda query: self.settings.refusal)
        self.benign = prepare(prompt, benign, reference if answered else lambda query: "")
        self.probes = {
            label: prepare(prompt, chosen, lambda query: "")
            for label in ("malicious", "benign")
            if (chosen := [query for query in probe if query.label == label and query.image is not None])
        }
        self.checkpoint = Checkpoint(out, self._identity())

    # -- the step --------------------------------------------------------------------------------------------------

    def advance(self, state: State) -> tuple[State, dict[str, Any]]:
        """One step: draw a batch, one gradient, move delta, write the metrics."""
        settings = self.settings
        gradient, terms = self.gradient(state.delta, self._batch(state.step))
        metrics: dict[str, Any] = {"step": state.step + 1, "lr": self._lr(state.step), **terms}
        if not math.isfinite(metrics["loss"]):
            raise DavspError(f"the loss is not finite at step {metrics['step']}: lower lr or lam, or use dtype float32")
        after = self._move(state, gradient, metrics["lr"])
        if after.step % settings.probe_every == 0 or after.step == settings.steps:
            metrics |= self._probe(after)
        self.checkpoint.log(metrics)
        return after, metrics

    def gradient(self, delta: Float[Tensor, "3 s s"], batch: Batch) -> tuple[Float[Tensor, "3 s s"], dict[str, float]]:
        """The gradient of the loss at delta, and hinge, answer_loss, loss and the mean projection of each class.

        Micro-batches are added up, and so are the shares of several processes (every process takes each n-th row); rows
        without an answer are not computed beyond the layer.
        """
        settings, leaf = self.settings, delta.clone().requires_grad_()
        gradient, terms = torch.zeros_like(delta), defaultdict[str, float](float)
        malicious, projections = [], []
        saving = recomputing(self.lvlm.model, self.lvlm.layers[self.layer - 1])
        with saving if settings.activation_checkpointing else nullcontext():
            share = batch.share(parallel.rank(), parallel.processes())
            for part in share.parts(settings.micro_batch or len(batch)):
                s, losses = self._losses(leaf, part, batch)
                gradient += torch.autograd.grad(losses["loss"], leaf)[0]
                malicious.append(part.malicious)
                projections.append(s.detach().cpu())
                for name, value in losses.items():
                    terms[name] += value.item()
        return parallel.total(gradient), _together(torch.cat(malicious), torch.cat(projections), dict(terms))

    def _losses(self, delta: Tensor, part: Batch, whole: Batch) -> tuple[Float[Tensor, " b"], dict[str, Tensor]]:
        """Projections of a part of the batch, and what it adds to the losses, which are means over the whole batch."""
        canvas = self.prompt.with_delta(delta).apply(pixels(part.interiors, delta.device))
        answers = part.answers if part.answered else None
        output = self.lvlm.step(canvas, part.questions, self.layer, answers)
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

    def _batch(self, step: int) -> Batch:
        """Half malicious, half benign."""
        bad, good = self._rows("malicious", step), self._rows("benign", step)
        return Batch(
            torch.cat([self.malicious.interiors[bad], self.benign.interiors[good]]),
            [self.malicious.questions[i] for i in bad] + [self.benign.questions[i] for i in good],
            torch.tensor([True] * len(bad) + [False] * len(good)),
            self._answers(step, bad, good) if self.weight_answer > 0 else [None] * (len(bad) + len(good)),
        )

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
                canvas = prompt.apply(pixels(examples.interiors[start : start + size], state.delta.device))
                output = self.lvlm.step(canvas, examples.questions[start : start + size], self.layer)
                projections.append(self.vector.project(output.state, self.layer))
            s = torch.cat(projections)
            name, right = (
                ("probe_rsr", s > self.mu_plus) if label == "malicious" else ("probe_benign", s < self.mu_minus)
            )
            shares[name] = float(right.float().mean())
        return shares

    def memory_advice(self, free: int) -> str | None:
        """A sentence if the activations of a step will crowd a device with `free` bytes."""
        settings, answered, longest = self.settings, self.weight_answer > 0, 0
        for examples in (self.malicious, self.benign):
            images = [self.lvlm.image_tokens(self.prompt.canvas, self.prompt.canvas)] * len(examples.questions)
            tokens = self.lvlm.encode(examples.questions, images, examples.answers if answered else None)
            longest = max(longest, tokens.ids.shape[1])
        row = estimate_memory(self.lvlm, 1, longest, self.layer, answered, settings.activation_checkpointing)
        return advice(row, min(settings.micro_batch or settings.batch_size, settings.batch_size), free)

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


def _together(malicious: Bool[Tensor, " b"], s: Float[Tensor, " b"], terms: dict[str, float]) -> dict[str, float]:
    """The loss terms of all processes, and the mean projection of each class."""
    shares = parallel.gathered((malicious, s, terms))
    names = dict.fromkeys(name for _, _, one in shares for name in one)
    summed = {name: sum(one.get(name, 0.0) for _, _, one in shares) for name in names}
    rows, s = torch.cat([one for one, _, _ in shares]), torch.cat([one for _, one, _ in shares])
    for label, chosen in (("malicious", rows), ("benign", ~rows)):
        if chosen.any():
            summed[f"projection_{label}"] = s[chosen].mean().item()
    return summed


@lru_cache(maxsize=64)
def _order(key: str, count: int) -> list[int]:
    return Random(key).sample(range(count), count)


def _bar(progress: bool) -> Progress:
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), disable=not progress)


def _note(metrics: dict[str, Any]) -> str:
    parts = [f"loss {metrics['loss']:.3f}", f"malicious {metrics['projection_malicious']:+.2f}"]
    parts.append(f"benign {metrics['projection_benign']:+.2f}")
    return " · ".join(parts + [f"held out {metrics['probe_rsr']:.0%}" for _ in [0] if "probe_rsr" in metrics])
