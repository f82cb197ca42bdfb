"""The one loop: the step that every training takes, and how it goes on after a kill.

The order of the data is a pure function of seed and step, so a checkpoint needs no cursor and no generator state,
and a run that was killed goes on to the very same bits.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from copy import copy
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from davsp.errors import DavspError, Interrupted
from davsp.lvlm import LVLM, fingerprint
from davsp.lvlm.templates import CHECKPOINT
from davsp.prompts.base import Prompt
from davsp.runtime import parallel
from davsp.runtime.files import alone, sha256_bytes
from davsp.training.batches import Batch
from davsp.training.checkpoint import Checkpoint, TrainState
from davsp.training.memory import advice, estimate_memory, recomputing
from davsp.training.settings import SentenceSettings, TrainSettings


class Asked(NamedTuple):
    """Rows that a step may ask.

    Attributes:
        names: of each row, for a sentence that says what is wrong with it.
        questions: with the safety text.
        answers: None: the rows carry none.
        whose: what the answers are, and the option or the field that they come from.
    """

    names: list[str]
    questions: list[str]
    answers: list[str] | None = None
    whose: str = ""


ClassProjections = tuple[
    Bool[Tensor, " _"], Float[Tensor, " _"]
]  # which rows are malicious, and the projections of all


def complete(run: "Loop", resume: bool, progress: bool) -> Prompt:
    """Take all steps of a run, from its checkpoint on if there is one and `resume` holds.

    Raises:
        DavspError: a checkpoint of another run; another process in the folder; a loss that is not finite; a full disk.
        Interrupted: Ctrl-C; the state has been saved.
    """
    run.longest()  # what is too long is better refused now than when it is drawn
    with nullcontext() if parallel.rank() > 0 else alone(run.checkpoint.out):  # the first process writes for all
        return _complete(run, resume, progress)


def _complete(run: "Loop", resume: bool, progress: bool) -> Prompt:
    checkpoint, settings, device = run.checkpoint, run.settings, run.lvlm.device
    state = checkpoint.restore(device) if resume else None
    state = state or checkpoint.start(run.prompt.delta.detach().clone().to(device))
    parallel.same(state.step, f"checkpoints in {checkpoint.out}")
    with _bar(progress) as bar:
        if progress and parallel.rank() == 0 and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
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
                f"stopped at step {state.step} of {settings.steps}; the state is in {checkpoint.out}: "
                "give the same command again to go on"
            ) from None
    parallel.wait()  # process 0 has written the last metrics
    return run.finish(state)


class Loop:
    """One training run: what is fixed, and the step.

    A kind of run says what a batch is (`_batch`) and what is lost on it (`_losses`), what was looked at meanwhile (`_probe`),
    and by which data its checkpoint is known; it calls `_checkpoint` last.

    Attributes:
        layer: where a pass without an answer ends; its block is left alone by activation checkpointing.
        checkpoint: the folder that the run is kept in.
    """

    layer: int
    checkpoint: Checkpoint

    def __init__(self, lvlm: LVLM, prompt: Prompt, settings: TrainSettings | SentenceSettings):
        prompt.check(lvlm)
        if settings.batch_size < parallel.processes():
            raise DavspError(f"batch_size {settings.batch_size} is less than the {parallel.processes()} processes")
        self.lvlm, self.prompt, self.settings = lvlm, prompt, settings

    # -- what a kind of run says -----------------------------------------------------------------------------------

    def _batch(self, step: int) -> Batch:
        """The rows of a step."""
        raise NotImplementedError

    def _losses(
        self, delta: Float[Tensor, "3 s s"], part: Batch, whole: Batch
    ) -> tuple[Float[Tensor, " b"] | None, dict[str, Tensor]]:
        """Projections of a part of the batch, if any, and what it adds to the losses, which are means over the whole batch.

        The one called "loss" is what is minimised.
        """
        raise NotImplementedError

    def _probe(self, state: TrainState) -> dict[str, Any]:
        """What else goes into the metrics of a step."""
        return {}

    def _questions(self) -> Iterator[Asked]:
        """All that a step may ask: the longest decides about memory."""
        raise NotImplementedError

    # -- the step --------------------------------------------------------------------------------------------------

    def advance(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """One step: draw a batch, one gradient, move delta, write the metrics."""
        gradient, terms = self._step(state)
        metrics: dict[str, Any] = {"step": state.step + 1, "lr": self._lr(state.step), **terms}
        if not math.isfinite(metrics["loss"]):
            raise DavspError(f"the loss is not finite at step {metrics['step']}: lower lr or lam, or use dtype float32")
        after = self._move(state, gradient, metrics["lr"])
        metrics |= self._probe(after)
        self.checkpoint.log(metrics)
        return after, metrics

    def _step(self, state: TrainState) -> tuple[Float[Tensor, "3 s s"], dict[str, float]]:
        """The gradient of a step's batch, and its losses."""
        return self.gradient(state.delta, self._batch(state.step))

    def gradient(self, delta: Float[Tensor, "3 s s"], batch: Batch) -> tuple[Float[Tensor, "3 s s"], dict[str, float]]:
        """The gradient of the loss at delta, and the losses (of DAVSP also the mean projection of each class).

        Micro-batches are added up, and so are the shares of several processes (every process takes each n-th row); rows
        without an answer are not computed beyond the layer.
        """
        settings, leaf = self.settings, delta.clone().requires_grad_()
        gradient, terms = torch.zeros_like(delta), defaultdict[str, float](float)
        projections: list[ClassProjections] = []
        saving = recomputing(self.lvlm.model, self.lvlm.layers[self.layer - 1])
        with saving if settings.activation_checkpointing else nullcontext():
            share = batch.share(parallel.rank(), parallel.processes())
            for part in share.parts(settings.micro_batch or len(batch)):
                s, losses = self._losses(leaf, part, batch)
                gradient += torch.autograd.grad(losses["loss"], leaf)[0]
                projections += [] if s is None else [(part.malicious, s.detach().cpu())]
                for name, value in losses.items():
                    terms[name] += value.item()
        return parallel.total(gradient), _together(projections, dict(terms))

    def _move(self, state: TrainState, gradient: Float[Tensor, "3 s s"], lr: float) -> TrainState:
        """Sign step, or Adam with the usual constants; then back to what is allowed."""
        step, first, second = state.step + 1, state.first, state.second
        if self.settings.optimizer == "sign":
            move = gradient.sign()
        else:
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            move = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        return TrainState(step, self.prompt.with_delta(state.delta - lr * move).project_().delta, first, second)

    def _lr(self, step: int) -> float:
        cosine = (1 + math.cos(math.pi * step / self.settings.steps)) / 2
        return self.settings.lr * (cosine if self.settings.schedule == "cosine" else 1)

    def longest(self) -> tuple[int, bool]:
        """Tokens of the longest row that a step may draw, and whether rows have answers.

        Raises:
            DavspError: a row has more tokens than the model has positions, or an answer has none.
        """
        longest, answered = 0, False
        unbounded = copy(self.lvlm)
        unbounded.positions = None  # so that the row is named here, with what makes it shorter
        for names, questions, answers, whose in self._questions():
            tokens = unbounded.encode(questions, [(self.prompt.canvas, self.prompt.canvas)] * len(questions), answers)
            of_answer, of_all = tokens.answer_mask.sum(1).tolist(), tokens.mask.sum(1).tolist()
            for name, told, whole in zip(names, of_answer, of_all, strict=True):
                self._check_room(name, whole - told, told, whose)
            longest = max(longest, *of_all)
            answered |= answers is not None
        return longest, answered

    def _check_room(self, name: str, prompt: int, answer: int, whose: str) -> None:
        """Raises DavspError if the tokens of a row are more than the model takes, or those of its answer no more than the end token."""
        positions, model = self.lvlm.positions, self.lvlm.model_id
        if whose and answer < 2:
            raise DavspError(f"{name}: {whose} holds no token of {model}; give words")
        if positions is not None and prompt + answer > positions:
            takes = f"question takes {prompt} tokens" + (f", and {whose} {answer}" if whose else "")
            mend = f"shorten one of the two, or leave {name} out" if whose else f"shorten it, or leave {name} out"
            raise DavspError(f"{name} cannot be trained on: its {takes}, but {model} has {positions} positions; {mend}")

    def memory_advice(self, free: int) -> str | None:
        """A sentence if the activations of a step will crowd a device with `free` bytes."""
        settings, (longest, answered) = self.settings, self.longest()
        row = estimate_memory(self.lvlm, 1, longest, self.layer, answered, settings.activation_checkpointing)
        return advice(row, min(settings.micro_batch or settings.batch_size, settings.batch_size), free)

    # -- before and after ------------------------------------------------------------------------------------------

    def _checkpoint(self, out: Path, data: dict[str, str]) -> Checkpoint:
        """The run's folder; a checkpoint in it is only good for all that the result depends on."""
        start = self.prompt
        placement = [] if (start.separator, start.suffix) == (" ", "") else [start.separator, start.suffix]
        identity = {
            **self.settings.model_dump(exclude={"checkpoint_every", "probe_every"}),
            "model": [self.lvlm.model_id, self.lvlm.revision, str(self.lvlm.dtype)],
            **({} if self.lvlm.template == CHECKPOINT else {"template": self.lvlm.template}),
            "weights": fingerprint(self.lvlm),  # a folder that is trained anew keeps its name
            "prompt": [
                start.kind,
                start.text,
                *placement,
                *(getattr(start, name, None) for name in ("padding", "eps")),  # noise of every eps starts at zero
                sha256_bytes(start.delta.detach().cpu().numpy().tobytes()),
            ],
            "data": data,
        }
        return Checkpoint(out, identity)

    def finish(self, state: TrainState) -> Prompt:
        """The trained prompt, with how it was trained in `config`."""
        prompt = self.prompt.with_delta(state.delta.cpu())
        figures = {f"train_{name}": value for name, value in self.checkpoint.last().items()}
        prompt.config |= {
            "model_id": self.lvlm.model_id,
            "revision": self.lvlm.revision,
            "figures": prompt.config.get("figures", {}) | figures,
            "data": prompt.config.get("data", {}) | self.checkpoint.identity["data"],
        }
        prompt.config.pop("template", None)
        if self.lvlm.template != CHECKPOINT:
            prompt.config["template"] = self.lvlm.template
        return prompt


def rows_of_step(key: str, count: int, size: int, step: int) -> list[int]:
    """Which `size` of `count` rows are in the batch of a step: epoch after epoch, each in an order of its own."""
    places = range(step * size, (step + 1) * size)
    return [_order(f"{key} {place // count}", count)[place % count] for place in places]


@lru_cache(maxsize=64)
def _order(key: str, count: int) -> list[int]:
    return Random(key).sample(range(count), count)


def _together(projections: list[ClassProjections], terms: dict[str, float]) -> dict[str, float]:
    """The loss terms of all processes, and the mean projection of each class."""
    shares: list[tuple[list[ClassProjections], dict[str, float]]] = parallel.gathered((projections, terms))
    names = dict.fromkeys(name for _, one in shares for name in one)
    summed = {name: sum(one.get(name, 0.0) for _, one in shares) for name in names}
    if pairs := [pair for share, _ in shares for pair in share]:
        rows, s = torch.cat([malicious for malicious, _ in pairs]), torch.cat([one for _, one in pairs])
        for label, of_class in (("malicious", rows), ("benign", ~rows)):
            if of_class.any():
                summed[f"projection_{label}"] = s[of_class].mean().item()
    return summed


def _bar(progress: bool) -> Progress:
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), disable=not progress or parallel.rank() > 0)


def _note(metrics: dict[str, Any]) -> str:
    classes = {label: metrics.get(f"projection_{label}") for label in ("malicious", "benign")}
    parts = [f"loss {metrics['loss']:.3f}", *(f"{label} {s:+.2f}" for label, s in classes.items() if s is not None)]
    return " · ".join(parts + [f"held out {metrics['probe_rsr']:.0%}" for _ in [0] if "probe_rsr" in metrics])
