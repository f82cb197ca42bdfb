"""One change for all pictures, trained on others (Moosavi-Dezfooli et al. 2017, arXiv 1610.08401).

By sign steps on mini-batches (Shafahi et al. 2020, arXiv 1811.11304), with the momentum of Dong et al. 2018 (arXiv 1710.06081), whose
size falls to nothing. Whoever has it needs no gradient any more: he adds it to each picture that he sends.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.attacks.surface import Surface, surfaces
from davsp.defenses import Defense
from davsp.errors import DavspError
from davsp.lvlm import LVLM
from davsp.query import Query
from davsp.runtime import parallel
from davsp.runtime.files import read_tensors_and_metadata, save_tensors
from davsp.training.loop import rows_of_step

MOMENTUM = 0.9
STEP = 0.25  # of eps, the first one
SAVED = 20  # steps from one checkpoint to the next


def train_universal(
    lvlm: LVLM,
    defense: Defense,
    queries: Sequence[Query],
    target: str,
    eps: float,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    file: Path,
    progress: Callable[[int], object] = lambda n: None,
) -> Float[Tensor, "3 h w"]:
    """The change, within eps, that makes the wanted beginning likely on the queries' pictures; a killed training goes on to the same bits.

    Args:
        queries: to train on, each with a picture.
        target: how the answer is to begin.
        eps: in pixel units, where white is 1.
        steps: gradients of `batch_size` pictures each.
        seed: of the order of the pictures.
        file: where it is kept, with the step it is at.
        progress: told of every step.

    Raises:
        DavspError: under this defense pictures reach the model in several sizes; a gradient that is not finite; else as `surfaces`.
    """
    step, tensors = _restore(file)
    parallel.same(step, f"steps in {file}")  # of what process 0 keeps
    progress(step)
    while step < steps:
        batch = [queries[i] for i in rows_of_step(f"{seed} universal", len(queries), batch_size, step)]
        mine = batch[parallel.rank() :: parallel.processes()]
        surface = _surface(lvlm, defense, mine or batch[:1], target)
        delta, velocity = tensors or [torch.zeros_like(surface.pictures[0])] * 2
        if delta.shape != surface.pictures.shape[1:]:
            raise _sizes(defense)
        own = _gradient(surface, delta.to(lvlm.device)) if mine else torch.zeros_like(surface.pictures[0])
        gradient = parallel.total(own)
        velocity = MOMENTUM * velocity.to(lvlm.device) + gradient / gradient.abs().mean().clamp(min=1e-12)
        moved = delta.to(lvlm.device) - STEP * eps * (1 - step / steps) * velocity.sign()
        step, tensors = step + 1, [moved.clamp(-eps, eps), velocity]
        progress(1)
        if parallel.rank() == 0 and (step % SAVED == 0 or step == steps):
            save_tensors(file, dict(zip(("delta", "velocity"), tensors, strict=True)), {"step": str(step)})
    return tensors[0].to(lvlm.device)


def _surface(lvlm: LVLM, defense: Defense, queries: Sequence[Query], target: str) -> Surface:
    groups = surfaces(lvlm, defense, queries, target)
    if len(groups) > 1:
        raise _sizes(defense)
    return groups[0][1]


def _gradient(surface: Surface, delta: Float[Tensor, "3 h w"]) -> Float[Tensor, "3 h w"]:
    """Of the sum of the losses with respect to the change.

    Raises:
        DavspError: it is not finite.
    """
    leaf = delta.clone().requires_grad_()
    with torch.enable_grad():
        loss = surface.comply((surface.pictures + leaf).clamp(0, 1)).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
    if not bool(gradient.isfinite().all()):
        raise DavspError("the gradient of the attack 'universal' is not finite: use --dtype float32")
    return gradient


def _sizes(defense: Defense) -> DavspError:
    return DavspError(
        f"under {defense.name} pictures reach the model in several sizes, and the attack 'universal' is of one; leave it out"
    )


def _restore(file: Path) -> tuple[int, list[Tensor]]:
    """Step, and change and momentum of a training that was begun; none where there is no file.

    Raises:
        DavspError: another file.
    """
    if not file.exists():
        return 0, []
    tensors, metadata = read_tensors_and_metadata(file)
    try:
        return int(metadata["step"]), [tensors["delta"], tensors["velocity"]]
    except (KeyError, ValueError) as error:
        raise DavspError(f"{file} holds no universal change; delete {file.parent} to attack anew") from error
