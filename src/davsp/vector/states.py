"""Collecting the hidden states of queries: one state a query and layer, of the last input token."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from davsp.errors import DavspError
from davsp.lvlm import LVLM
from davsp.lvlm.undefended import WHITE, square
from davsp.query import Query, single
from davsp.runtime import parallel

if TYPE_CHECKING:
    from davsp.lvlm.remote import RemoteLVLM

Readable: TypeAlias = "LVLM | RemoteLVLM"
"""A model whose states can be read: loaded here, or on a server that writes them (`davsp.lvlm.states_served`)."""


def collect_states(
    lvlm: Readable,
    queries: Sequence[Query],
    layers: Sequence[int],
    text: str = "",
    batch_size: int = 16,
    progress: bool = True,
    name: str = "states",
) -> Float[Tensor, "n l d"]:
    """States of the last input token of undefended queries, on the CPU; pictures and words-only in batches apart.

    Several processes share the batches; all of them must come here.

    Where a picture is padded, it is in white, as DAVSP's code does for the vector and for its border. A server gets it as it is.
    """
    single(queries, "the vector")
    states: list[Tensor] = [torch.empty(0)] * len(queries)
    pad = isinstance(lvlm, LVLM) and lvlm.undefended == "pad"
    if isinstance(lvlm, LVLM):
        _check_shown(lvlm, queries, text)
    with Progress(transient=True, disable=not progress or parallel.rank() > 0) as bar:
        task = bar.add_task(name, total=len(queries))
        batches = list(_batches(queries, batch_size))
        for batch in batches[parallel.rank() :: parallel.processes()]:
            pictures = [queries[i].picture() for i in batch]
            shown = [square(p, WHITE) if pad else p for p in pictures if p]
            canvas: Any = lvlm.preprocess(shown) if shown else None
            questions = [f"{text} {queries[i].question}" if text else queries[i].question for i in batch]
            for i, state in zip(batch, lvlm.states(canvas, questions, layers).cpu(), strict=True):
                states[i] = state
            bar.advance(task, parallel.processes() * len(batch))
    for number, of_one in enumerate(parallel.gathered([s for s in states if s.numel()])):
        rows = [i for batch in batches[number :: parallel.processes()] for i in batch]
        for i, state in zip(sorted(rows), of_one, strict=True):
            states[i] = state
    return torch.stack(states)


def _check_shown(lvlm: LVLM, queries: Sequence[Query], text: str) -> None:
    """Raises DavspError if the model has no room for a query, or cannot take its picture; nothing is computed yet."""
    for query in queries:
        try:
            lvlm.check_query(f"{text} {query.question}" if text else query.question, query.size(), 0)
        except DavspError as error:
            raise DavspError(f"query {query.id!r} cannot be shown: {error}") from error


def of_both(
    lvlm: Readable,
    malicious: Sequence[Query],
    benign: Sequence[Query],
    layers: Sequence[int],
    deepest: int,
    text: str,
    batch_size: int,
    progress: bool,
    name: str,
) -> tuple[Float[Tensor, "n l d"], Float[Tensor, "m l d"]]:
    """The states of both classes at layers 1 to `deepest`, zeros at those that are not among `layers`."""
    check_classes(malicious, benign)
    bad = collect_states(lvlm, malicious, layers, text, batch_size, progress, f"{name}: malicious")
    good = collect_states(lvlm, benign, layers, text, batch_size, progress, f"{name}: benign")
    if len(layers) == deepest:
        return bad, good
    rows = [layer - 1 for layer in layers]
    whole = [states.new_zeros(len(states), deepest, states.shape[-1]) for states in (bad, good)]
    for states, some in zip(whole, (bad, good), strict=True):
        states[:, rows] = some
    return whole[0], whole[1]


def check_classes(malicious: Sequence[Query], benign: Sequence[Query]) -> None:
    """Raises DavspError if a class is empty, or a query stands in the wrong one."""
    for label, queries in (("malicious", malicious), ("benign", benign)):
        single(queries, "training or calibration")
        if not queries:
            raise DavspError(f"there are no {label} queries: both classes are needed")
        for query in queries:
            if query.label != label:
                raise DavspError(f"query {query.id} is labelled {query.label} but stands among the {label} ones")


def _batches(queries: Sequence[Query], size: int) -> Iterator[list[int]]:
    for with_image in (True, False):
        rows = [i for i, query in enumerate(queries) if (query.image is not None) == with_image]
        for start in range(0, len(rows), size):
            yield rows[start : start + size]
