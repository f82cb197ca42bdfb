"""One query, answered twice: as it comes, and behind a defense. Knows nothing of the page."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from PIL import Image

from davsp.defenses import Defense, Gate, NoDefense
from davsp.errors import DavspError, words_of
from davsp.judges import withheld
from davsp.lvlm import LVLM, model_name
from davsp.prompts import VisualSafetyPrompt
from davsp.prompts.base import from_picture, to_bytes
from davsp.query import Query
from davsp.vector import HarmfulnessVector

REFUSED = "The gate looked at this picture and question and refused."
PASSED = "The gate let it pass: this picture and question were answered, not what was looked at."


@dataclass(frozen=True)
class Side:
    """What one of the two gave.

    Attributes:
        canvas: the 8-bit picture as the model sees it where it answers.
        question: as the model is asked there, safety text included.
        answer: greedy.
        withheld: the answer refuses, or holds no words.
        curve: projection of the last input token at layers 1, 2, ...; () without a vector.
        seconds: wall time of the answer.
        calls: how often the model was asked.
        prompt_tokens: of all calls together, those of pictures included.
        image_tokens: how many of these stand for a picture.
        road: which of the two a gate took, in words; empty: the defense is no gate.
    """

    canvas: Image.Image
    question: str
    answer: str
    withheld: bool
    curve: tuple[float, ...]
    seconds: float
    calls: int
    prompt_tokens: int
    image_tokens: int
    road: str = ""


class Comparison:
    """A model, one defense, and a vector to see by what the defense moves.

    Args:
        lvlm: the frozen model, in this process.
        defense: what the second answer stands behind.
        vector: of the model; None: no projections.
        max_new_tokens: an answer is cut there; None: at the model's own `longest`.

    Raises:
        DavspError: defense or vector is of another model.
    """

    def __init__(
        self, lvlm: LVLM, defense: Defense, vector: HarmfulnessVector | None = None, max_new_tokens: int | None = None
    ) -> None:
        defense.check(lvlm)
        if vector is not None:
            vector.check(lvlm)
        self.lvlm, self.defense, self.vector, self.max_new_tokens = lvlm, defense, vector, max_new_tokens
        self.model = Path(model_name(lvlm)).name  # a folder's path is nobody's business

    def ask(self, picture: Image.Image, question: str) -> tuple[Side, Side]:
        """The query undefended and defended.

        Raises:
            DavspError: there is no question, or the defense can't be applied.
        """
        if not question.strip():
            raise DavspError("There is no question yet: type one, or choose an example.")
        query = Query("asked", question.strip(), "benign", "app", image=picture)  # the label is not looked at
        return self._side(NoDefense(), query), self._side(self.defense, query)

    def _side(self, defense: Defense, query: Query) -> Side:
        shown, road = self._road(defense, query)
        (prepared,) = shown.prepare([query])
        picture = prepared.picture()
        assert picture is not None
        canvas = self.lvlm.preprocess([picture])
        (response,) = defense.respond(self.lvlm, [query], max_new_tokens=self.max_new_tokens)
        curve: tuple[float, ...] = ()
        if self.vector is not None:
            layers = range(1, self.lvlm.num_layers)
            states = self.lvlm.states(canvas, [prepared.question], layers)[0].cpu()  # (L, D)
            curve = tuple(float(self.vector.project(states[layer - 1], layer)) for layer in layers)
        return Side(
            Image.fromarray(to_bytes(canvas[0])), prepared.question, response.text, withheld(response.text), curve, response.seconds,
            response.calls or 0, response.prompt_tokens or 0, response.image_tokens or 0, road,
        )  # fmt: skip

    def _road(self, defense: Defense, query: Query) -> tuple[Defense, str]:
        """What the model sees the query through where it answers, and why."""
        if not isinstance(defense, Gate):
            return defense, ""
        (looked,) = defense.looks(self.lvlm, [query], 1, self.max_new_tokens or self.lvlm.longest)
        return (defense.inner, REFUSED) if looked.refused else (defense.else_, PASSED)


def shipped_folder(model: str) -> Path | None:
    """The folder with the border and the vector that ship for a model by its bare name; None if there are none."""
    folder = Path(str(files("davsp.app"))) / "prompts" / Path(model).name
    return folder if Path(model).name == model and (folder / "vsp.png").exists() else None


def border_of(path: Path) -> VisualSafetyPrompt:
    """The prompt that a `vsp.png` alone holds: the border in its pixels, width and texts in its PNG text.

    Raises:
        DavspError: it is no such picture.
    """
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            png_text = {name: str(value) for name, value in picture.info.items()}
            border = VisualSafetyPrompt(from_picture(picture), int(png_text["padding"]))
    except (OSError, KeyError, ValueError) as error:
        raise DavspError(
            f"{path} does not serve as a prompt ({words_of(error)}); make it again with runs/app.sh"
        ) from error
    return border.with_texts(png_text["safety_text"], png_text["separator"], png_text["suffix"])


def margins_by_layer(vector: HarmfulnessVector) -> Sequence[tuple[float, float]]:
    """(mu_plus, mu_minus) of every layer; at the layer in use those that the vector holds. Empty if it can't set the others'."""
    if not vector.fitted:
        return []
    layers = range(1, len(vector.vectors) + 1)
    return [(vector.mu_plus, vector.mu_minus) if n == vector.layer else vector.margins(n) for n in layers]
