"""A text that makes sentences unlikely, searched token by token (UniGuard's optimised text part, a kind of HotFlip).

Position after position, the tokens that promise the largest rise of the sentences' cross-entropy to first order are tried, and
the best one stays if it does make it rise. What is tried is always the text: a token that would be read as another one, once
it stands beside its neighbours, is no candidate, so that the text found is the text that was measured.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from torch import Tensor

from davsp.errors import DavspError, Interrupted
from davsp.lvlm.onehot import token_gradient, token_ids, token_span
from davsp.runtime import journal, parallel
from davsp.runtime.files import alone, sha256_bytes, write_json
from davsp.runtime.progress import bar
from davsp.training.batches import Batch
from davsp.training.sentences import SentenceRun


class SearchSettings(BaseModel):
    """How a text is searched; the defaults are UniGuard's as published.

    Attributes:
        text_tokens: length of the text.
        sweeps: how often each position is tried.
        candidates: tokens tried a position.
        sample: sentences that a position is judged on, drawn anew for each.
        seed: of the random start and of the samples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_tokens: int = Field(16, ge=1)
    sweeps: int = Field(50, ge=1)
    candidates: int = Field(100, ge=1)
    sample: int = Field(8, ge=1)
    seed: int = 0


def search_text(
    run: SentenceRun, delta: Float[Tensor, "3 s s"], settings: SearchSettings, path: Path, resume: bool = True,
    progress: bool = True,
) -> str:  # fmt: skip
    """Search the text that stands right after the run's question (which is to be empty or end in a space), a line break after it.

    Args:
        run: says pictures, question and sentences; nothing is trained.
        delta: what lies on the pictures meanwhile.
        path: a JSON file that the search is kept in, written after every position.
        resume: go on from `path`, if it is there.

    Returns:
        The text, without the line break.

    Raises:
        DavspError: `path` is of another search; another process in its folder; no text of that length can be put together; a
            sentence without a token.
        Interrupted: Ctrl-C; all but the position under way has been saved.
    """
    with nullcontext() if parallel.rank() > 0 else alone(path.parent):  # the first process writes for all
        return _search(_Search(run, delta.to(run.lvlm.device), settings), path, resume, progress)


def _search(search: "_Search", path: Path, resume: bool, progress: bool) -> str:
    settings = search.settings
    total = settings.text_tokens * settings.sweeps
    identity = search.identity()
    state = journal.restore(path, identity, step=int, ids=list, cross_entropy=list) if resume else None
    state = state or {"identity": identity, "step": 0, "ids": search.start(), "cross_entropy": []}
    with bar(Console(quiet=not progress)) as bars:
        task = bars.add_task("text", total=total, completed=state["step"])
        try:
            while state["step"] < total:
                ids, value = search.position(state["ids"], state["step"])
                curve = [*state["cross_entropy"], value]
                state |= {"step": state["step"] + 1, "ids": ids, "text": search.text(ids), "cross_entropy": curve}
                if parallel.rank() == 0:
                    write_json(path, state)
                bars.update(task, completed=state["step"])
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped at position {state['step']} of {total} of the text; the state is in {path}: "
                "give the same command again to go on"
            ) from None
    return search.text(state["ids"])


class _Search:
    def __init__(self, run: SentenceRun, delta: Tensor, settings: SearchSettings):
        self.run, self.lvlm, self.delta, self.settings = run, run.lvlm, delta, settings
        self.size = run.prompt.canvas, run.prompt.canvas
        tokenizer = self.lvlm.tokenizer
        words = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        special = {*tokenizer.all_special_ids, self.lvlm.image_token_id}
        self.usable = [i for i, word in enumerate(words) if i not in special and word.strip() and word.isprintable()]

    def identity(self) -> dict[str, Any]:
        """All that the result depends on; of the run what its checkpoint is known by, settings of the noise included."""
        delta = sha256_bytes(self.delta.cpu().numpy().tobytes())
        return {**self.settings.model_dump(), "noise": delta, "run": self.run.checkpoint.identity}

    def text(self, ids: Sequence[int]) -> str:
        return str(self.lvlm.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)).strip()

    def question(self, ids: Sequence[int]) -> str:
        return f"{self.run.question}{self.text(ids)}\n"

    def span(self, ids: Sequence[int]) -> tuple[int, int]:
        """Where the text is among the tokens of the prompt."""
        question = self.question(ids)
        return token_span(self.lvlm, question, self.size, len(self.run.question), len(question) - 1)

    def start(self) -> list[int]:
        """Random tokens, one after the other such that each is read as itself.

        Raises:
            DavspError: no token goes on with what there is.
        """
        rng, ids = Random(f"{self.settings.seed} start"), list[int]()
        while len(ids) < self.settings.text_tokens:
            longer = ([*ids, token] for token in rng.sample(self.usable, len(self.usable)))
            first = next((candidate for candidate in longer if self.holds(candidate)), None)
            if first is None:
                raise DavspError(
                    f"no text of {self.settings.text_tokens} tokens was found for {self.lvlm.model_id}: take fewer"
                )
            ids = first
        return ids

    def holds(self, ids: Sequence[int]) -> bool:
        """Whether the tokens are read as themselves where they stand."""
        question, start = self.question(ids), len(self.run.question)
        return bool(self.text(ids)) and token_ids(self.lvlm, question, start, len(question) - 1) == list(ids)

    def position(self, ids: list[int], step: int) -> tuple[list[int], float]:
        """Try one position; the tokens after it, and the sentences' mean cross-entropy with them."""
        settings, place = self.settings, step % self.settings.text_tokens
        count = len(self.run.sentences)
        batch = self.run.rows(
            Random(f"{settings.seed} sample {step}").sample(range(count), min(settings.sample, count))
        )
        promised = self.gradient(ids, batch)[place]
        best = torch.tensor(self.usable, device=promised.device)[promised[self.usable].argsort(descending=True)]
        changes = [[*ids[:place], token, *ids[place + 1 :]] for token in best[: settings.candidates].tolist()]
        changes = parallel.gathered([one for one in changes if one != ids and self.holds(one)])[0]
        texts, present = [*changes, ids], len(changes)  # the text as it is goes last
        mine = range(parallel.rank(), len(texts), parallel.processes())
        my_values = {i: self.cross_entropy(texts[i], batch) for i in mine}
        values = {i: value for share in parallel.gathered(my_values) for i, value in share.items()}
        top = max(sorted(values), key=lambda i: values[i])
        chosen = top if values[top] > values[present] else present
        return texts[chosen], values[chosen]

    def gradient(self, ids: Sequence[int], batch: Batch) -> Float[Tensor, "n v"]:
        """By how much each token at each position promises to raise the cross-entropy, but for a constant a position."""
        rows, spans = self.with_text(ids, batch), [self.span(ids)] * len(batch)
        canvas = self.run.canvas(self.delta, rows)
        return token_gradient(self.lvlm, canvas, rows.questions, self.run.sentences_of(rows), spans)

    @torch.no_grad()
    def cross_entropy(self, ids: Sequence[int], batch: Batch) -> float:
        return float(self.run.cross_entropy(self.delta, self.with_text(ids, batch)).mean())

    def with_text(self, ids: Sequence[int], batch: Batch) -> Batch:
        """The batch with the text in its question."""
        return replace(batch, questions=[self.question(ids)] * len(batch))
