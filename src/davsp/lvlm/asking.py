"""From questions to token ids: the conversation template, the picture's placeholders, the answers behind, and their padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from davsp.errors import DavspError
from davsp.lvlm.templates import CHECKPOINT, TEMPLATES, TURN
from davsp.runtime.thought import Tags

PROBE = "a \"b\"\nc 'd'"
"""A question that looks otherwise in a list or a JSON text: some templates print what they cannot read."""


@dataclass(frozen=True)
class Tokens:
    """A padded batch. `last` is the index of the last prompt token; `answer_mask` marks answer tokens and their eos."""

    ids: Int[Tensor, "b t"]
    mask: Int[Tensor, "b t"]
    last: Int[Tensor, " b"]
    answer_mask: Bool[Tensor, "b t"]


class Asking:
    """How a loaded model is asked; the half of `LVLM` that needs no weights.

    Attributes:
        template: by which conversation template it is asked: the checkpoint's own, or one of `templates.TEMPLATES`.
        the others: as in `LVLM`, which sets them.
    """

    tokenizer: Any
    model_id: str
    template: str = CHECKPOINT
    reasoning_tags: Tags
    device: torch.device
    positions: int | None
    tokens_per_image: int
    image_token_id: int
    eos_token_id: int
    pad_token_id: int

    def image_tokens(self, height: int, width: int) -> int:
        """How many placeholders stand for a canvas of this size."""
        raise NotImplementedError

    def seen(self, width: int, height: int) -> tuple[int, int]:
        """Height and width that a picture of this size comes to undefended."""
        raise NotImplementedError

    def keep_prompts(self) -> None:
        """Keep what was tokenised: a training run asks the same questions again."""
        self._prompt_ids = lru_cache(maxsize=16384)(self._tokenise)
        self._check_template = lru_cache(maxsize=2)(self._rendered)

    def encode(
        self,
        questions: Sequence[str],
        images: bool | Sequence[int],
        answers: Sequence[str | None] | None = None,
        padding_side: Literal["right", "left"] = "right",
        end_token: bool = True,
    ) -> Tokens:
        """Questions in the checkpoint's chat template, with answer and end token after it where one is given.

        Args:
            questions: as the user types them.
            images: whether a picture on the native canvas stands before each, or how many placeholders it takes.
            answers: what follows; None for a row without.
            padding_side: right for training and states, left for generation.
            end_token: False leaves it out after an answer.

        Raises:
            DavspError: no question, one that holds the image placeholder, or more tokens than the model has positions.
        """
        if not questions:
            raise DavspError("there is no question to ask: the list of queries is empty")
        if answers is not None and len(answers) != len(questions):
            raise ValueError(f"{len(answers)} answers for {len(questions)} questions")
        if isinstance(images, bool):
            images = [self.tokens_per_image * images] * len(questions)
        prompts = [list(self._prompt_ids(question, n)) for question, n in zip(questions, images, strict=True)]
        endings = [self._answer_ids(answer, end_token) for answer in answers or [None] * len(prompts)]
        for question, prompt, ending in zip(questions, prompts, endings, strict=True):
            self._check_length(question, len(prompt), len(ending))
        length = max(len(p) + len(e) for p, e in zip(prompts, endings, strict=True))
        ids = torch.full((len(prompts), length), self.pad_token_id)
        mask = torch.zeros_like(ids)
        answer_mask = torch.zeros_like(ids, dtype=torch.bool)
        last = []
        for row, (prompt, ending) in enumerate(zip(prompts, endings, strict=True)):
            size = len(prompt) + len(ending)
            start = length - size if padding_side == "left" else 0
            ids[row, start : start + size] = torch.tensor(prompt + ending)
            mask[row, start : start + size] = 1
            answer_mask[row, start + len(prompt) : start + size] = True
            last.append(start + len(prompt) - 1)
        return Tokens(*(t.to(self.device) for t in (ids, mask, torch.tensor(last), answer_mask)))

    def _opened(self) -> str:
        """The tag of a thought with which the chat template ends every prompt; empty: none."""
        prompt = self.prompt("a", False).rstrip()
        return next((opening for opening, _ in self.reasoning_tags if opening and prompt.endswith(opening)), "")

    def prompt(self, question: str, has_image: bool) -> str:
        """The question in the checkpoint's chat template, with one placeholder where the picture stands.

        Raises:
            DavspError: the template does not show the question as it is.
        """
        self._check_template(PROBE, has_image)
        return self._rendered(question, has_image)

    def takes_templates(self) -> bool:
        """Whether the checkpoint's own template asks as LLaVA-1.5's does (`USER:`, picture, question, `ASSISTANT:`)."""
        try:
            text = self.prompt("a", True)
        except DavspError:
            return False
        return " ".join(text.split()).endswith(TURN)

    def use_template(self, name: str) -> None:
        """Ask by one of LLaVA's own conversation templates from now on; it cannot be taken back.

        Raises:
            DavspError: there is no such template, or the checkpoint is none that it is for.
        """
        if name not in TEMPLATES:
            raise DavspError(
                f"template {name!r} is not known: choose {CHECKPOINT}, {' or '.join(TEMPLATES)} (--template)"
            )
        if not self.takes_templates():
            raise DavspError(
                f"template {name} is of LLaVA-1.5, and {self.model_id} does not ask by USER: and ASSISTANT:; "
                f"take {CHECKPOINT} (--template)"
            )
        self.tokenizer.chat_template, self.template = TEMPLATES[name], name
        self._check_template.cache_clear()
        self._prompt_ids.cache_clear()

    def _rendered(self, question: str, has_image: bool) -> str:
        content = [{"type": "image"}] * has_image + [{"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        try:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program: TemplateError, TypeError, UndefinedError…
            raise self._no_template(f"it fails: {error}") from error
        if question.strip() not in text:
            raise self._no_template(f"it makes {text[-200:]!r} of {question[:80]!r}")
        return text

    def _no_template(self, why: str) -> DavspError:
        return DavspError(
            f"the chat template of {self.model_id} cannot show a question as it is ({why}); put the template of its "
            "processor into chat_template.jinja in its folder"
        )

    def _tokenise(self, question: str, image_tokens: int) -> tuple[int, ...]:
        has_image = image_tokens > 0
        ids = self._text_ids(self.prompt(question, has_image))
        if ids.count(self.image_token_id) != int(has_image):
            token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
            if token not in question:
                raise self._no_template(
                    f"{int(has_image)} pictures are {ids.count(self.image_token_id)} times {token} there"
                )
            raise DavspError(f"the question holds the image placeholder {token}; take it out: {question[:80]!r}")
        if not has_image:
            return tuple(ids)
        at = ids.index(self.image_token_id)
        return (*ids[:at], *[self.image_token_id] * image_tokens, *ids[at + 1 :])

    def _text_ids(self, text: str) -> list[int]:
        """The whole text at once, as the checkpoint's processor does it. Under a template of LLaVA's own code what stands before
        and after a picture apart, as there: each piece begins like a text of its own, so a word's mark may stand after a picture.
        """
        bos = self.tokenizer.bos_token
        if self.template == CHECKPOINT:
            return list(self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"])
        picture = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        ids, *others = (self.tokenizer(piece)["input_ids"] for piece in text.split(picture))
        begins = ids[:1] == [self.tokenizer.bos_token_id]
        for piece in others:
            ids = [*ids, self.image_token_id, *piece[begins:]]
        return list(ids)

    def check_query(self, question: str, size: tuple[int, int] | None, answer_tokens: int) -> None:
        """Raises DavspError unless the model can take a question and a picture of (width, height), and has room for the answer."""
        self._check_length(question, self.prompt_size(question, size)[0], answer_tokens)

    def prompt_size(self, question: str, size: tuple[int, int] | None) -> tuple[int, int]:
        """Tokens of a prompt with a picture of (width, height), and how many of these stand for the picture.

        Raises:
            DavspError: the family takes no such picture.
        """
        image_tokens = 0 if size is None else self.image_tokens(*self.seen(*size))
        return len(self._prompt_ids(question, image_tokens)), image_tokens

    def _check_length(self, question: str, prompt_tokens: int, answer_tokens: int) -> None:
        if self.positions is not None and prompt_tokens + answer_tokens > self.positions:
            raise DavspError(
                f"prompt and answer take up to {prompt_tokens} + {answer_tokens} tokens, but {self.model_id} has "
                f"{self.positions} positions; shorten the question {question[:60]!r}, or the answers (max_new_tokens)"
            )

    def _answer_ids(self, answer: str | None, end_token: bool) -> list[int]:
        if answer is None:
            return []
        return [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], *[self.eos_token_id] * end_token]
