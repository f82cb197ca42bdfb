"""From questions to token ids: the conversation template, the picture's placeholders, the answers behind, and their padding."""

import inspect
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from davsp.errors import DavspError
from davsp.lvlm.templates import CHECKPOINT, TEMPLATES, TURN, named, names_read
from davsp.query import Question, as_text, turns_of
from davsp.runtime.thought import Tags

A = TypeVar("A", bound="Asking")

Size = tuple[int, int]
"""Height and width of a canvas in pixels: what a family says of it in tokens may depend on its shape."""

PROBE = "a \"b\"\nc 'd'"
"""A question that looks otherwise in a list or a JSON text: some templates print what they cannot read."""

PROBE_TURNS = (("user", PROBE), ("assistant", f"{PROBE} e"), ("user", f"{PROBE} f"))

HELPERS = ("raise_exception", "strftime_now")
"""Functions that transformers gives every template."""


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
        template: by which conversation template it is asked: the checkpoint's own with what it is told (`templates.named`), or one of
            `templates.TEMPLATES`.
        template_kwargs: what the checkpoint's own is told (`enable_thinking`).
        picture_text: what the checkpoint's template writes for a picture, and what its processor puts there, around one placeholder;
            None: the template writes the placeholder itself.
        the others: as in `LVLM`, which sets them.
    """

    tokenizer: Any
    model_id: str
    template: str = CHECKPOINT
    template_kwargs: Mapping[str, Any] = {}
    picture_text: tuple[str, str] | None = None
    reasoning_tags: Tags
    device: torch.device
    positions: int | None
    canvas: int
    image_token_id: int
    eos_token_id: int
    pad_token_id: int

    def image_tokens(self, height: int, width: int) -> int:
        """How many placeholders stand for a canvas of this size."""
        raise NotImplementedError

    def picture_ids(self, height: int, width: int) -> list[int]:
        """The tokens that the one placeholder of `prompt` becomes for a canvas of this size."""
        return [self.image_token_id] * self.image_tokens(height, width)

    def seen(self, width: int, height: int) -> tuple[int, int]:
        """Height and width that a picture of this size comes to undefended."""
        raise NotImplementedError

    def keep_prompts(self) -> None:
        """Keep what was tokenised: a training run asks the same questions again."""
        self._prompt_ids = lru_cache(maxsize=16384)(self._tokenise)
        self._check_template = lru_cache(maxsize=4)(self._rendered)

    def encode(
        self,
        questions: Sequence[Question],
        images: bool | Sequence[Size | None],
        answers: Sequence[str | None] | None = None,
        padding_side: Literal["right", "left"] = "right",
        end_token: bool = True,
    ) -> Tokens:
        """Questions in the checkpoint's chat template, with answer and end token after it where one is given.

        Args:
            questions: as the user types them, alone or in a conversation.
            images: whether a picture on the native canvas stands before each (in the first turn), or height and width of that picture; None: none.
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
            images = [(self.canvas, self.canvas) if images else None] * len(questions)
        prompts = [list(self._prompt_ids(question, size)) for question, size in zip(questions, images, strict=True)]
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

    def opened(self) -> str:
        """The tag of a thought with which the chat template ends every prompt; empty: none."""
        prompt = self.prompt("a", False).rstrip()
        return next((opening for opening, _ in self.reasoning_tags if opening and prompt.endswith(opening)), "")

    def prompt(self, question: Question, has_image: bool) -> str:
        """The question, or the conversation, in the checkpoint's chat template, with one placeholder where the picture stands.

        Raises:
            DavspError: the template does not show the question as it is, or knows one turn only.
        """
        self._check_template(PROBE if isinstance(question, str) else PROBE_TURNS, has_image)
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
        if self.template_kwargs:
            raise self._told_nothing(name)
        self.tokenizer.chat_template, self.template = TEMPLATES[name], name
        self.keep_prompts()

    def told(self: A, kwargs: Mapping[str, Any]) -> A:
        """The same model, whose own template is told this (`enable_thinking=False`) and nothing else; no weight is copied.

        Raises:
            DavspError: the template is one of LLaVA's own, or does not read a key.
        """
        if kwargs and self.template in TEMPLATES:
            raise self._told_nothing(self.template)
        for key in kwargs:
            if why := self._cannot_be_told(key):
                raise DavspError(
                    f"the chat template of {self.model_id} cannot be told {key}: {why} (--template-kwargs)"
                )
        other = copy(self)
        if self.template not in TEMPLATES:
            other.template, other.template_kwargs = named(kwargs), dict(kwargs)
        other.keep_prompts()
        return other

    def _cannot_be_told(self, key: str) -> str:
        """Why the checkpoint's template cannot be told it; empty: it can, or nobody sees from here."""
        ours = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, "messages", *HELPERS}

        def is_ours(name: str) -> bool:
            return name in ours or name.endswith("_token")

        if is_ours(key):
            return "davsp sets it"
        read = names_read(self.tokenizer.get_chat_template())
        if read is None or key in read:
            return ""
        free = ", ".join(sorted(name for name in read if not is_ours(name)))
        return f"it reads {free or 'nothing that it could be told'}"

    def _told_nothing(self, template: str) -> DavspError:
        return DavspError(
            f"template {template} is of LLaVA's own code and is told nothing: leave out --template-kwargs, or take {CHECKPOINT} "
            "(--template)"
        )

    def _rendered(self, question: Question, has_image: bool) -> str:
        turns = turns_of(question)
        contents = [[{"type": "text", "text": text}] for _, text in turns]
        contents[0] = [{"type": "image"}] * has_image + contents[0]
        messages = [{"role": role, "content": content} for (role, _), content in zip(turns, contents, strict=True)]
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **self.template_kwargs
                )
            )
        except Exception as error:  # a template is a program: TemplateError, TypeError, UndefinedError…
            raise self._no_template(f"it fails: {error}", len(turns)) from error
        at = 0
        for _, said in turns:  # in their order, each behind the one before
            at = text.find(said.strip(), at) + len(said.strip())
            if at < len(said.strip()):
                raise self._no_template(f"it makes {text[-200:]!r} of {said[:80]!r}", len(turns))
        return text.replace(*self.picture_text) if has_image and self.picture_text else text

    def _no_template(self, why: str, turns: int = 1) -> DavspError:
        if turns > 1:
            return DavspError(
                f"the chat template of {self.model_id} cannot show a conversation of {turns} turns ({why}); ask single questions, or "
                "put a template that can into chat_template.jinja in its folder"
            )
        return DavspError(
            f"the chat template of {self.model_id} cannot show a question as it is ({why}); put the template of its "
            "processor into chat_template.jinja in its folder"
        )

    def _tokenise(self, question: Question, size: Size | None) -> tuple[int, ...]:
        has_image = size is not None
        ids = self._text_ids(self.prompt(question, has_image))
        token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        marker = self.picture_text[0] if self.picture_text else token
        wrong, said = ids.count(self.image_token_id) != int(has_image), as_text(question)
        if (wrong and token in said) or (marker != token and marker in said):
            held = token if token in said else marker
            raise DavspError(f"the question holds the image placeholder {held}; take it out: {said[:80]!r}")
        if wrong:
            raise self._no_template(
                f"{int(has_image)} pictures are {ids.count(self.image_token_id)} times {token} there",
                len(turns_of(question)),
            )
        if size is None:
            return tuple(ids)
        at = ids.index(self.image_token_id)
        return (*ids[:at], *self.picture_ids(*size), *ids[at + 1 :])

    def _text_ids(self, text: str) -> list[int]:
        """The whole text at once, as the checkpoint's processor does it. Under a template of LLaVA's own code what stands before
        and after a picture apart, as there: each piece begins like a text of its own, so a word's mark may stand after a picture.
        """
        bos = self.tokenizer.bos_token
        if self.template not in TEMPLATES:
            return list(self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"])
        picture = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        ids, *others = (self.tokenizer(piece)["input_ids"] for piece in text.split(picture))
        begins = ids[:1] == [self.tokenizer.bos_token_id]
        for piece in others:
            ids = [*ids, self.image_token_id, *piece[begins:]]
        return list(ids)

    def check_query(self, question: Question, size: tuple[int, int] | None, answer_tokens: int) -> None:
        """Raises DavspError unless the model can take a question and a picture of (width, height), and has room for the answer."""
        self._check_length(question, self.prompt_size(question, size)[0], answer_tokens)

    def prompt_size(self, question: Question, size: tuple[int, int] | None) -> tuple[int, int]:
        """Tokens of a prompt with a picture of (width, height), and how many of these stand for the picture.

        Raises:
            DavspError: the family takes no such picture.
        """
        seen = None if size is None else self.seen(*size)
        return len(self._prompt_ids(question, seen)), self.image_tokens(*seen) if seen else 0

    def _check_length(self, question: Question, prompt_tokens: int, answer_tokens: int) -> None:
        if self.positions is not None and prompt_tokens + answer_tokens > self.positions:
            raise DavspError(
                f"prompt and answer take up to {prompt_tokens} + {answer_tokens} tokens, but {self.model_id} has "
                f"{self.positions} positions; shorten the question {as_text(question)[:60]!r}, or the answers (max_new_tokens)"
            )

    def _answer_ids(self, answer: str | None, end_token: bool) -> list[int]:
        if answer is None:
            return []
        return [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], *[self.eos_token_id] * end_token]
