"""Prompts trained on sentences: once the noise lies on the picture, they are likely (ESIII) or unlikely (UniGuard) answers.

No vector, no classes and no margins; the loop, and with it checkpoints, micro-batches and processes, is DAVSP's.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from davsp.errors import DavspError
from davsp.lvlm import LVLM
from davsp.lvlm.onehot import answer_losses
from davsp.prompts.base import P, Prompt
from davsp.runtime.files import read_text, sha256_bytes
from davsp.training.batches import Batch, pixels
from davsp.training.loop import Asked, Loop, complete, rows_of_step
from davsp.training.settings import SentenceSettings


def train_sentences(
    lvlm: LVLM,
    prompt: P,
    pictures: Sequence[Image.Image],
    question: str,
    sentences: Sequence[str],
    settings: SentenceSettings,
    out: str | Path,
    resume: bool = True,
    progress: bool = True,
) -> P:
    """Train a prompt on sentences; checkpoints and `metrics.jsonl` are in `out`.

    Args:
        prompt: where to start; left as it is. Its texts are not used: they belong into `question`, if anywhere.
        pictures: sentence i is said of `pictures[i % len(pictures)]`: one picture serves all, as many as sentences are pairs.
        question: all that the model is asked, word for word; may be "".
        sentences: as the model would say them.
        resume, progress: as in `davsp.train`.

    Returns:
        A new prompt with float32 delta, and how it was trained in `config`; `save_pretrained` makes it 8-bit.

    Raises:
        DavspError: no sentence or no picture; else as `davsp.train`.
        Interrupted: Ctrl-C; the state has been saved.
    """
    run = SentenceRun(lvlm, prompt, pictures, question, sentences, settings, Path(out))
    return cast(P, complete(run, resume, progress))


class SentenceRun(Loop):
    """A run on sentences; the loss is their mean cross-entropy, or minus that."""

    settings: SentenceSettings
    layer = 1  # none is looked at: every row goes to the end

    def __init__(
        self,
        lvlm: LVLM,
        prompt: Prompt,
        pictures: Sequence[Image.Image],
        question: str,
        sentences: Sequence[str],
        settings: SentenceSettings,
        out: Path,
    ):
        if not sentences or not pictures:
            raise DavspError(f"there is no {'picture' if sentences else 'sentence'} to train on; give at least one")
        super().__init__(lvlm, prompt, settings)
        self.question, self.sentences = question, list(sentences)
        self.interiors = torch.cat([torch.round(prompt.resize([one]) * 255).to(torch.uint8) for one in pictures])
        data = {
            "pictures": sha256_bytes(self.interiors.numpy().tobytes()),
            "sentences": sha256_bytes(json.dumps([question, self.sentences]).encode()),
        }
        self.checkpoint = self._checkpoint(out, data)

    def rows(self, numbers: Sequence[int]) -> Batch:
        """Sentences by their number, each with its picture."""
        places = [i % len(self.interiors) for i in numbers]
        no_class = torch.zeros(len(places), dtype=torch.bool)
        return Batch(
            self.interiors[places], [self.question] * len(places), no_class, [self.sentences[i] for i in numbers]
        )

    def _batch(self, step: int) -> Batch:
        return self.rows(
            rows_of_step(f"{self.settings.seed} sentences", len(self.sentences), self.settings.batch_size, step)
        )

    def _losses(self, delta: Float[Tensor, "3 s s"], part: Batch, whole: Batch) -> tuple[None, dict[str, Tensor]]:
        """L = 1/B sum_j CE(s_j | question, picture + delta), to fall (ESIII) or to rise (UniGuard: minus L is minimised)."""
        mean = self.cross_entropy(delta, part).sum() / len(whole)
        return None, {"cross_entropy": mean, "loss": mean if self.settings.likely else -mean}

    def cross_entropy(self, delta: Float[Tensor, "3 s s"], batch: Batch) -> Float[Tensor, " b"]:
        """Of each row's sentence: the mean over its tokens, without the end token.

        With it, a sentence that is to be unlikely would be so for what follows it.
        """
        return answer_losses(self.lvlm, self.canvas(delta, batch), batch.questions, self.sentences_of(batch))

    def canvas(self, delta: Float[Tensor, "3 s s"], batch: Batch) -> Float[Tensor, "b 3 s s"]:
        """The pictures of a batch with the prompt on them."""
        return self.prompt.with_delta(delta).apply(pixels(batch.interiors, delta.device))

    def sentences_of(self, batch: Batch) -> list[str]:
        """The sentences of a batch: every row has one."""
        return [answer or "" for answer in batch.answers]

    def _questions(self) -> Iterator[Asked]:
        names = [f"sentence {number} ({one[:40]!r})" for number, one in enumerate(self.sentences, 1)]
        yield Asked(names, [self.question] * len(self.sentences), self.sentences, "the sentence itself (--corpus)")


def blank(size: int) -> Image.Image:
    """A mid-grey picture of size x size pixels."""
    return Image.new("RGB", (size, size), (128, 128, 128))


def read_sentences(path: str | Path) -> list[str]:
    """The sentences of a text file, one a line; empty lines are left out.

    Raises:
        DavspError: it can't be read, is not UTF-8, or holds no sentence.
    """
    lines = read_text(path).split("\n")  # not splitlines: a sentence may hold U+2028
    sentences = [line.strip() for line in lines if line.strip()]
    if not sentences:
        raise DavspError(f"{path} holds no sentence; write one a line")
    return sentences
