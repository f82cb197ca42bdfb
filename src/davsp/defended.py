"""A model that answers only from behind its defense."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from PIL import Image

from davsp.defenses import Defense, NoDefense, load_defense
from davsp.errors import DavspError
from davsp.lvlm import LVLM, AnsweringLVLM
from davsp.query import Query

PictureSource = Image.Image | str | Path


class DefendedModel:
    """An LVLM and what stands before it. There is no way past the defense: what it cannot be applied to is an error.

    Args:
        lvlm: the frozen model.
        defense: `NoDefense()` for none.

    Raises:
        DavspError: the defense does not go with the model.
    """

    def __init__(self, lvlm: AnsweringLVLM, defense: Defense) -> None:
        defense.check(lvlm)
        self.lvlm, self.defense = lvlm, defense

    @classmethod
    def from_pretrained(cls, model: str | Path, defense: str | Path, **options: Any) -> "DefendedModel":
        """Load both.

        Args:
            model: folder or hub id, or the bare name of a model that ships (davsp-mini).
            defense: folder or hub id (USER/NAME, USER/NAME@REVISION) of a prompt, with gate+ before it a gate through it
                (`davsp.defenses.load_defense`); "none" for no defense.
            options: revision, device_map, dtype, quantization, canvas, template, template_kwargs, undefended of the model, as `LVLM.from_pretrained` takes them.

        Raises:
            DavspError: either cannot be loaded, or they do not go together.
        """
        from davsp import embedded

        if str(model) in embedded.MODELS:
            lvlm = embedded.load(str(model), **options)
        else:
            lvlm = LVLM.from_pretrained(model, **options)
        return cls(lvlm, NoDefense() if str(defense) == "none" else load_defense(defense))

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
        self, images: PictureSource | None, text: str, max_new_tokens: int | None = ..., batch_size: int = ...
    ) -> str: ...
    @overload
    def generate(
        self, images: Sequence[PictureSource | None] | None, text: Sequence[str], max_new_tokens: int | None = ..., batch_size: int = ...
    ) -> list[str]: ...  # fmt: skip
    def generate(
        self, images: Any, text: Any, max_new_tokens: int | None = None, batch_size: int = 8
    ) -> str | list[str]:
        """The greedy answers to questions, each with at most one picture.

        Args:
            images: a picture or its path, or None; a list of these where `text` is one.
            text: a question as the user types it, without the safety text; or a list.
            max_new_tokens: an answer is cut there; None: by model, 48 for one that ships, else 1,024.
            batch_size: questions a forward.

        Returns:
            The answer to one question, or the answers to a list, in its order. What the model thinks before is left out, so
                an answer that was cut before it began is empty.

        Raises:
            DavspError: a picture can't be read, another number of pictures than questions, or the defense can't be applied.
        """
        alone = isinstance(text, str)
        texts = [text] if alone else list(text)
        pictures = [images] if alone else [None] * len(texts) if images is None else list(images)
        if len(pictures) != len(texts):
            raise DavspError(
                f"images holds {len(pictures)} pictures for {len(texts)} questions in text; give one for each"
            )
        if bad := next((p for p in pictures if not isinstance(p, Image.Image | str | Path | None)), None):
            raise DavspError(
                f"images holds a {type(bad).__name__}; give a PIL picture, a path or None for each question"
            )
        queries = [
            Query(str(i), question, "benign", "", image=Path(picture) if isinstance(picture, str) else picture)
            for i, (question, picture) in enumerate(zip(texts, pictures, strict=True))
        ]
        answers = self.defense.respond(
            self.lvlm, queries, batch_size=batch_size, max_new_tokens=max_new_tokens
        )  # the label is not looked at: a defense does not know what it is asked for
        return answers[0].text if alone else [answer.text for answer in answers]

    def __call__(
        self, images: Any = None, text: Any = None, max_new_tokens: int | None = None, batch_size: int = 8
    ) -> list[dict[str, str]]:
        """As the image-text-to-text pipeline of transformers is called, with `return_full_text=False`.

        Args:
            images: as for `generate`; also a list of one picture for a single question.
            text: a question, or a list of them.
            max_new_tokens, batch_size: as for `generate`.

        Returns:
            For each question {"input_text": as given, "generated_text": the answer}.

        Raises:
            DavspError: no text, or as `generate`.
        """
        if text is None or (not isinstance(text, str) and not all(isinstance(one, str) for one in text)):
            raise DavspError(
                "text must be a question or a list of questions; a chat is not taken, for it may hide a picture"
            )
        if isinstance(text, str):
            images = images if isinstance(images, list | tuple) else [images]
            text = [text]
        answers = self.generate(images, text, max_new_tokens, batch_size)
        return [
            {"input_text": question, "generated_text": answer} for question, answer in zip(text, answers, strict=True)
        ]
