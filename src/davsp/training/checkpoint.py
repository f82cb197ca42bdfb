"""What a training run keeps on disk, so that it can be killed at any moment and go on to the same bits."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.errors import DavspError, words_of
from davsp.runtime import journal, parallel
from davsp.runtime.files import read_tensors_and_metadata, save_tensors, write_bytes

STATE, METRICS = "checkpoint.safetensors", "metrics.jsonl"


@dataclass(frozen=True)
class TrainState:
    """All that changes from step to step; replaced as a whole, so an interrupt never meets half of it."""

    step: int
    delta: Float[Tensor, "3 s s"]
    first: Float[Tensor, "3 s s"]  # Adam's moments; zero under sign steps
    second: Float[Tensor, "3 s s"]


@dataclass(frozen=True)
class Checkpoint:
    """The folder of one run.

    Attributes:
        out: holds `checkpoint.safetensors` (tensors, step and identity in one file, so that a kill leaves the old one
            or the new one) and `metrics.jsonl`.
        identity: all that the result depends on; a checkpoint is only good for the same.
    """

    out: Path
    identity: dict[str, Any]

    def start(self, delta: Float[Tensor, "3 s s"]) -> TrainState:
        """The first state; written, so that a folder one can't write to is known before the work."""
        state = TrainState(0, delta, torch.zeros_like(delta), torch.zeros_like(delta))
        if parallel.rank() > 0:
            return state
        (self.out / STATE).unlink(missing_ok=True)  # in this order a kill leaves no checkpoint without its metrics
        write_bytes(self.out / METRICS, b"")
        self.save(state)
        return state

    def save(self, state: TrainState) -> None:
        """Replace the checkpoint.

        Raises:
            DavspError: the disk is full; the checkpoint before is still there.
        """
        if parallel.rank() > 0:  # the same state in every process; the first one writes
            return
        tensors = {"delta": state.delta, "first": state.first, "second": state.second}
        facts = json.dumps({"step": state.step, "identity": self.identity})
        save_tensors(self.out / STATE, tensors, {"davsp": facts})

    def restore(self, device: torch.device | str) -> TrainState | None:
        """The state in the folder, with the metrics cut back to it; None if there is none.

        Raises:
            DavspError: it is of a run with other settings, data, model or start, or no checkpoint.
        """
        path = self.out / STATE
        if not path.exists():
            return None
        tensors, metadata = read_tensors_and_metadata(path)
        try:
            facts = json.loads(metadata["davsp"])
            identity, step = facts["identity"], facts["step"]
            state = TrainState(step, *(tensors[name].to(device) for name in ("delta", "first", "second")))
        except (KeyError, ValueError) as error:
            raise DavspError(
                f"{path} is not a checkpoint of davsp train ({words_of(error)}); delete it to start anew"
            ) from error
        journal.check(path, identity, self.identity)
        if parallel.rank() > 0:
            return state
        lines = journal.lines(self.out / METRICS)[:step]
        write_bytes(self.out / METRICS, b"".join(line + b"\n" for line in lines))
        return state

    def log(self, metrics: dict[str, Any]) -> None:
        """Add a line to the metrics; it is on the disk when this returns.

        Raises:
            DavspError: the disk is full.
        """
        if parallel.rank() == 0:
            journal.append(self.out / METRICS, json.dumps(metrics) + "\n")

    def last(self) -> dict[str, Any]:
        """The metrics of the last step."""
        return json.loads(journal.lines(self.out / METRICS)[-1])
