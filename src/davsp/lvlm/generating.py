"""How a loaded model answers: greedy generation, steered or not, and what each answer took."""

from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from davsp.errors import DavspError
from davsp.lvlm.answering import Answer, answer_length
from davsp.lvlm.asking import Asking, Size, Tokens
from davsp.lvlm.hooks import Steer, steering
from davsp.lvlm.likelihood import spoken
from davsp.query import Question

# Finished pictures in [0, 1]: a batch of one size, or one by one where they keep sizes of their own.
Canvas = Float[Tensor, "b 3 h w"] | list[Float[Tensor, "3 _ _"]]

G = TypeVar("G", bound="Generating")


class Generating(Asking):
    """The part of `LVLM` that answers.

    Attributes:
        steer: how `generate` steers where nothing else is said; None: not at all (`steered`).
        beginning: with what every answer is made to begin; empty: with nothing (`begun`).
        barred: tokens with which no answer begins (`without`).
        longest: where an answer is cut (`AnsweringLVLM`); `davsp.embedded.load` sets it for the models that ship.
        the others: as in `LVLM`, which sets them.
    """

    model: Any
    layers: Any
    steer: Steer | None = None
    beginning: str = ""
    barred: tuple[int, ...] = ()
    longest: int = answer_length(shipped=False)

    def inputs(self, tokens: Tokens, canvas: Canvas | None, masked: bool = False) -> dict[str, Any]:
        """All arguments of the transformers model for one batch."""
        raise NotImplementedError

    def sizes(self, canvas: Canvas | None) -> Literal[False] | list[Size]:
        """Height and width of each canvas, as `encode` wants them; False without a picture."""
        raise NotImplementedError

    def check_query(self, question: Question, size: tuple[int, int] | None, answer_tokens: int) -> None:
        """As `Asking` has it; how the answer is made to begin takes room, too."""
        begun = len(self._answer_ids(self.beginning, False)) if self.beginning else 0
        super().check_query(question, size, begun + answer_tokens)

    def check_layer(self, layer: int) -> None:
        """Raises DavspError if the model has no such layer to look at."""
        raise NotImplementedError

    def generate(
        self,
        canvas: Canvas | None,
        questions: Sequence[Question],
        max_new_tokens: int | None = None,
        steer: tuple[int, Tensor] | Steer | None = None,
    ) -> list[str]:
        """Greedy answers.

        Args:
            canvas: finished canvases in [0, 1], or None for questions in words only.
            questions: as the user types them, any safety text included.
            max_new_tokens: an answer is cut there; None: at `longest`.
            steer: (layer, vector (D,)): the vector is added to that layer's output at the last prompt token and at
                every answer token (test-time intervention, the paper's Table 5); a `Steer` can do more.

        Raises:
            DavspError: prompt and answer would not fit the model's positions, or as `encode`.
        """
        return [text for text, _ in self.completions(canvas, questions, max_new_tokens, steer)]

    def completions(
        self,
        canvas: Canvas | None,
        questions: Sequence[Question],
        max_new_tokens: int | None = None,
        steer: tuple[int, Tensor] | Steer | None = None,
    ) -> list[tuple[str, str]]:
        """As `generate`, each answer with its finish: "stop" if the model ended it, "length" if it was cut.

        A batch goes on until its last answer has ended.
        """
        said, _ = self._generated(canvas, questions, max_new_tokens or self.longest, steer)
        return self._texts(said)

    @torch.no_grad()
    def _generated(
        self,
        canvas: Canvas | None,
        questions: Sequence[Question],
        max_new_tokens: int,
        steer: tuple[int, Tensor] | Steer | None = None,
        logits: bool = False,
    ) -> tuple[Int[Tensor, "b t"], tuple[Float[Tensor, "b v"], ...]]:
        """The tokens of the answers, and the logits at the place of each if they are wanted."""
        steer = steer or self.steer
        begun = [self.beginning] * len(questions) if self.beginning else None
        if begun and steer:
            raise DavspError(
                "an intervention acts at the prompt's last token, which a beginning hides: leave out --prefill"
            )
        tokens = self.encode(questions, self.sizes(canvas), begun, padding_side="left", end_token=False)
        for question, length in zip(questions, tokens.mask.sum(1).tolist(), strict=True):
            self._check_length(question, length, max_new_tokens)
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.pad_token_id,
            eos_token_id=self._ends(),
            begin_suppress_tokens=list(self.barred) or None,
            return_dict_in_generate=True,
            output_logits=logits,
        )
        if steer:
            self.check_layer(steer[0])
        with steering(self.layers, *steer) if steer else nullcontext():
            output = self.model.generate(**self.inputs(tokens, canvas, masked=True), generation_config=settings)
        return output.sequences[:, tokens.ids.shape[1] :], output.logits or ()

    def _texts(self, said: Int[Tensor, "b t"]) -> list[tuple[str, str]]:
        """Texts of answers, each with its finish."""
        texts = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        ended = torch.isin(said, torch.tensor(self._ends(), device=said.device)).any(1).tolist()
        return [(text.strip(), "stop" if end else "length") for text, end in zip(texts, ended, strict=True)]

    def _ends(self) -> Any:
        """The token, or the tokens, that end an answer."""
        return self.model.generation_config.eos_token_id or self.eos_token_id

    def steered(self: G, steer: Steer) -> G:
        """The same model, whose every answer is steered; nothing is copied but the reference to its weights.

        Raises:
            DavspError: a layer outside 1 .. num_layers - 1, or a model that is steered already.
        """
        self.check_layer(steer.layer)
        if self.steer is not None:
            raise DavspError("the model is steered already: put no intervention into another")
        other = copy(self)
        other.steer = steer
        return other

    def begun(self: G, beginning: str) -> G:
        """The same model, whose every answer begins with this text, as if it had said so itself (a prefilled answer); nothing is
        copied but the reference to its weights. What it answers is what it says behind that: the beginning is not its own, and whoever
        judges answers must not take it for a part of them.

        Raises:
            DavspError: the text is blank, or holds a special token or a word that the tokenizer does not know; or the chat template
                ends every prompt inside a thought.
        """
        if not beginning.strip():
            raise DavspError("the beginning of an answer is blank: give a text (--prefill)")
        marker = (
            self.picture_text[0] if self.picture_text else self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        )
        if held := [token for token in (marker, *self.tokenizer.all_special_tokens) if token in beginning]:
            raise DavspError(
                f"the beginning of an answer holds {held[0]}, which is no text to {self.model_id}: take it out (--prefill)"
            )
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in self._answer_ids(beginning, False):
            raise DavspError(
                f"the beginning of an answer holds a word that the tokenizer of {self.model_id} does not know, and the answer would "
                "not show it: take other words (--prefill)"
            )
        if opened := self.opened():
            raise DavspError(
                f"the chat template of {self.model_id} ends every prompt with {opened}, so a beginning would be one of a thought; switch "
                "thinking off (--template-kwargs enable_thinking=false)"
            )
        other = copy(self)
        other.beginning = beginning
        return other

    def without(self: G, words: str) -> G:
        """The same model, no answer of which begins with the first token of this text: what does it say where it would have said that?"""
        other = copy(self)
        other.barred = (*self.barred, self._answer_ids(words, False)[0])
        return other

    def ask(
        self, canvas: Canvas | None, questions: Sequence[Question], max_new_tokens: int | None = None
    ) -> list[Answer]:
        """What `completions` gives, and what each answer took. Tokens are counted as the model sees them, without padding."""
        return self._answers(canvas, questions, self.completions(canvas, questions, max_new_tokens=max_new_tokens))

    def likely(
        self, canvas: Canvas | None, questions: Sequence[Question], max_new_tokens: int, top: int
    ) -> list[Answer]:
        """As `ask`, in the same pass with the tokens of each answer but the one that ends it, and the `top` likeliest at each place."""
        said, logits = self._generated(canvas, questions, max_new_tokens, logits=True)
        answers = self._answers(canvas, questions, self._texts(said))
        ends = torch.tensor(self._ends()).reshape(-1).tolist()
        tokens = [
            spoken(self.tokenizer, row, [one[i] for one in logits], ends, top) for i, row in enumerate(said.tolist())
        ]
        return [answer._replace(tokens=some) for answer, some in zip(answers, tokens, strict=True)]

    def _answers(
        self, canvas: Canvas | None, questions: Sequence[Question], said: Sequence[tuple[str, str]]
    ) -> list[Answer]:
        """Texts and finishes with what they took."""
        sizes: Sequence[Size | None] = self.sizes(canvas) or [None] * len(said)
        opened = self.opened()
        answers = []
        for question, size, (text, finish) in zip(questions, sizes, said, strict=True):
            pictures = self.image_tokens(*size) if size else 0
            answers.append(Answer(text, len(self._prompt_ids(question, size)), pictures, opened=opened, finish=finish))
        return answers
