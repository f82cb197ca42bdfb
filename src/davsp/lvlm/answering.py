"""What a defense needs of a model: that it answers. A model that is loaded here does, and so does one behind a server."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor

from davsp.errors import DavspError
from davsp.query import Question
from davsp.runtime.thought import Tags

NO_STATES = (
    "a server gives no hidden states; leave out the vector, load the model here (--engine transformers), or have vLLM write them "
    "(--states-folder)."
)


def answer_length(shipped: bool) -> int:
    """Tokens at which an answer is cut where nothing else is said: 48 for the models that ship, which have no more to say; 1,024
    for every other, as the authors of DAVSP have it."""
    return 48 if shipped else 1024


class Token(NamedTuple):
    """A token of a greedy answer, with the likeliest ones at its place.

    Attributes:
        text: what it adds to the answer.
        logprob: natural logarithm of its probability.
        top: text and logprob of the likeliest, in falling order.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


class Answer(NamedTuple):
    """A greedy answer and what it took.

    Attributes:
        text: as the model gave it; a thought between tags is still in it.
        prompt_tokens: of its prompt; None: not known.
        image_tokens: how many of these stand for a picture; None: not known.
        thought: what a server told apart from the answer itself.
        cut: the server says that all tokens went before there was an answer.
        opened: the tag with which the prompt opened a thought that the text goes on with.
        finish: "stop": the model ended it; "length": it was cut at the longest; empty: not known.
        tokens: of the text; () where nobody asked for them (`AnsweringLVLM.likely`) or a server does not tell.
        states: of the last prompt token, by layer, where a server writes them (`davsp.lvlm.states_served`); None: it does not.
    """

    text: str
    prompt_tokens: int | None
    image_tokens: int | None
    thought: str = ""
    cut: bool = False
    opened: str = ""
    finish: str = ""
    tokens: tuple[Token, ...] = ()
    states: dict[int, Tensor] | None = None


@runtime_checkable
class AnsweringLVLM(Protocol):
    """A vision-language model that takes pictures and questions and answers greedily.

    `LVLM` (loaded here), `RemoteLVLM` (on a server) and the proxy's `UpstreamLVLM` are such. What else an evaluation wants (hidden
    states, gradients, steering) only a loaded one gives: `loaded` tells.

    Attributes:
        model_id, revision: what it is, as the hub or its server calls it.
        server: address of the server that runs it; None: it is loaded here.
        canvas: side in pixels at which it sees a picture without resampling; 0: not known.
        reasoning_tags: what stands around its thoughts; they are no part of its answers.
        longest: tokens at which an answer is cut where nothing else is said (`answer_length`).
    """

    model_id: str
    revision: str | None
    server: str | None
    canvas: int
    reasoning_tags: Tags
    longest: int

    def check_canvas(self, height: int, width: int) -> None:
        """Raises DavspError unless the model sees a picture of this size without resampling it."""
        ...

    def preprocess(self, images: list[Image.Image]) -> Any:
        """Pictures as this model's `ask` takes them: a tensor or a list of them here, PNG files for a server."""
        ...

    def ask(self, canvas: Any, questions: Sequence[Question], max_new_tokens: int | None = None) -> list[Answer]:
        """The greedy answers in the order of the questions.

        Args:
            canvas: what `preprocess` gave for one picture a question; None for questions in words only.
            questions: as the model is to read them, any safety text included; a conversation has the picture in its first turn.
            max_new_tokens: an answer is cut there; None: at `longest`.

        Raises:
            DavspError: there is no answer; none is made up.
        """
        ...

    def likely(self, canvas: Any, questions: Sequence[Question], max_new_tokens: int, top: int) -> list[Answer]:
        """As `ask`, each answer with its tokens, and with each of these the `top` likeliest at its place."""
        ...


def check_square(lvlm: AnsweringLVLM, height: int, width: int) -> None:
    """Raises DavspError unless a picture is the square that the model sees without resampling."""
    if (height, width) != (lvlm.canvas, lvlm.canvas):
        raise DavspError(
            f"the canvas is {width}x{height} pixels, but {lvlm.model_id} takes {lvlm.canvas}x{lvlm.canvas}: "
            "use a prompt made for this model"
        )
