"""What an attacker has in hand under a defense: the pixels of the picture he sends, and the road from there to the model.

He sends his picture in the very size at which the defense puts it on its canvas, so that nothing is resampled and each of his
8-bit pixels reaches the model: the strongest place to stand. A gate shows one picture twice: to the look in this size, and then
undefended, resized as the model resizes any picture; the attack goes both roads.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor
from torch.nn.functional import pad

from davsp.defenses import ECSO, AdaShieldA, Chain, Defense, Gate, Intervention, NoDefense, VisualPrompt
from davsp.defenses.ecso import CUT
from davsp.errors import DavspError
from davsp.lvlm import LVLM
from davsp.lvlm.onehot import answer_losses
from davsp.lvlm.resample import resample
from davsp.prompts import Prompt, VisualSafetyPrompt
from davsp.prompts.base import to_bytes
from davsp.query import Query
from davsp.vector import HarmfulnessVector

Road = Callable[[Tensor], Tensor]
"""From sent pictures, each value k/255, to what the model sees; carries the gradient."""
Goal = tuple[list[str], list[str]]
"""Questions, and the beginnings of the answers that the attacker wants to them."""
Target = str | Sequence[str]
"""How the answer is to begin that the attacker wants: to all queries, or to each."""
SPARE = 0.02  # of its first distance to a gate's threshold, by which a score is to fall below it


@dataclass(frozen=True)
class Surface:
    """Some queries under one defense, as their attacker sees them.

    Attributes:
        pictures: the queries' pictures as he would send them, each value k/255.
        canvas: the road of the defense's first look.
        questions: of it, with the defense's texts.
        goals: what the model is asked there, call by call, and what it is to say.
        plain, after: the road of what passes a gate, and what the model is asked there.
        caught: canvases of the first look -> how far above a gate's threshold, 1 at the start if it refuses, 0 where it lets pass.
    """

    lvlm: LVLM
    pictures: Float[Tensor, "b 3 h w"]
    canvas: Road
    questions: list[str]
    goals: list[Goal]
    plain: Road | None = None
    after: list[Goal] = field(default_factory=list)
    caught: Callable[[Tensor], Tensor] | None = None

    def comply(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """Mean cross-entropy of the wanted beginnings, and what a gate has against them, summed; of pictures rounded to 8 bit."""
        sent = rounded(pictures)
        losses = []
        if self.goals or self.caught:
            canvas = self.canvas(sent)
            losses += [answer_losses(self.lvlm, canvas, *one) for one in self.goals]
            losses += [self.caught(canvas)] if self.caught else []
        if self.plain is not None:
            canvas = self.plain(sent)
            losses += [answer_losses(self.lvlm, canvas, *one) for one in self.after]
        return torch.stack(losses).sum(0)

    def projection(self, pictures: Float[Tensor, "b 3 h w"], vector: HarmfulnessVector) -> Float[Tensor, " b"]:
        """s(x) of the first look at the vector's layer; of pictures rounded to 8 bit."""
        states = self.lvlm.states(self.canvas(rounded(pictures)), self.questions, [vector.layer])
        return vector.project(states[:, 0])


def surfaces(lvlm: LVLM, defense: Defense, queries: Sequence[Query], target: Target) -> list[tuple[list[int], Surface]]:
    """The queries under a defense, those of one picture size together, each group with the places of its queries.

    Args:
        queries: each with a picture.
        target: as in `goals`.

    Raises:
        DavspError: a query without a picture, two visual prompts in one defense, or one for another model; undefended pictures in tiles.
    """
    defense.check(lvlm)
    lvlm = defense.asked(lvlm) if isinstance(defense, NoDefense) else lvlm
    prompt = visual(defense)
    pictures = [picture_of(query) for query in queries]
    if prompt is None:
        prepared = lvlm.preprocess(pictures)
        if not all(lvlm.differentiable(*one.shape[-2:]) for one in prepared):
            raise DavspError(
                f"{lvlm.model_id} shows undefended pictures in tiles, resampled in a way whose gradient the attack does not know; give "
                f"--undefended {lvlm.ways[-1]}, or a prompt"
            )
        sent = [one.cpu() for one in prepared]
        canvas: Road = lambda x: x  # noqa: E731
    else:
        sent = list(_inside(prompt, prompt.resize(pictures)))
        canvas = _road(prompt, lvlm.device)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(sent):
        groups.setdefault(tuple(one.shape), []).append(i)
    wanted = _each(target, len(queries))
    return [
        (
            places,
            _surface(
                lvlm, defense, [queries[i] for i in places], torch.stack([sent[i] for i in places]), canvas,
                [wanted[i] for i in places],
            ),
        )
        for places in groups.values()
    ]  # fmt: skip


def _surface(
    lvlm: LVLM, defense: Defense, queries: Sequence[Query], sent: Float[Tensor, "b 3 h w"], canvas: Road, target: Target
) -> Surface:
    """Of queries whose pictures have one size."""
    pictures = sent.to(lvlm.device)
    if not isinstance(defense, Gate):
        calls = goals(defense, queries, target)
        return Surface(lvlm, pictures, canvas, calls[0][0], calls)
    questions = [q.question for q in defense.prepare(queries)]
    after = goals(defense.else_, queries, target)
    surface = Surface(lvlm, pictures, canvas, questions, [], plain_road(lvlm, sent), after)
    if defense.kind == "answer":
        return replace(surface, goals=goals(defense.inner, queries, target))
    with torch.no_grad():
        distance = defense.excess(lvlm, canvas(pictures), questions).abs().clamp(min=1e-6)
    return replace(surface, caught=lambda x: (defense.excess(lvlm, x, questions) / distance + SPARE).clamp(min=0))


def plain_road(lvlm: LVLM, sent: Float[Tensor, "b 3 h w"]) -> Road:
    """How a model resizes pictures of this size without a defense.

    Raises:
        DavspError: it is no bicubic resize to a square, so that the attack does not know its gradient.
    """
    seen, pictures = lvlm.preprocess(files(sent)), sent.to(lvlm.device)
    side = seen[0].shape[-1]
    road: Road = (lambda x: x) if seen[0].shape == sent[0].shape else lambda x: resample(x, side, Resampling.BICUBIC)
    passes = sent.shape[-1] == sent.shape[-2] and lvlm.differentiable(*seen[0].shape[-2:])
    if not passes or not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(road(pictures), seen, strict=True)):
        raise DavspError(
            f"{lvlm.model_id} resizes undefended pictures in a way whose gradient the attack does not know, so it can't attack a gate"
        )
    return road


def goals(defense: Defense, queries: Sequence[Query], target: Target) -> list[Goal]:
    """What the attacker wants to hear in each call of a defense: his target, and of ECSO's judge that it is harmless.

    Args:
        target: how the answer is to begin: to all queries, or to each.
    """
    if isinstance(defense, Chain):
        for one in defense.defenses[:-1]:
            queries = one.prepare(queries)
        return goals(defense.defenses[-1], queries, target)
    if isinstance(defense, Intervention):
        return goals(defense.inner, queries, target)
    wanted = _each(target, len(queries))
    calls = [([q.question for q in defense.prepare(queries)], wanted)]
    if isinstance(defense, ECSO):
        texts = [
            defense.templates.harm.format(query=q.question, response=w[:CUT])
            for q, w in zip(queries, wanted, strict=True)
        ]
        harm = [replace(q, question=text) for q, text in zip(queries, texts, strict=True)]
        prepared = defense.inner.prepare(harm) if defense.follow == "whole" else harm
        calls.append(([q.question for q in prepared], ["no"] * len(queries)))
    return calls


def _each(target: Target, count: int) -> list[str]:
    return [target] * count if isinstance(target, str) else list(target)


def visual(defense: Defense) -> Prompt | None:
    """The one visual prompt in a defense; None without one.

    Raises:
        DavspError: there are two, or a gate that is not outermost.
    """
    if isinstance(defense, VisualPrompt):
        return defense.prompt
    if isinstance(defense, ECSO | Intervention | Gate):
        if isinstance(defense.inner, Gate):
            raise DavspError(f"{defense.name} looks through a gate; the attack knows one that stands outermost")
        if isinstance(defense, Gate) and (isinstance(defense.else_, Gate) or visual(defense.else_) is not None):
            raise DavspError(f"{defense.name} answers through another border or gate; the attack knows one")
        return visual(defense.inner)
    prompts = [p for d in getattr(defense, "defenses", ()) if (p := visual(d)) is not None]
    if len(prompts) > 1:
        raise DavspError(f"{defense.name} has two visual prompts; the attack knows one")
    return prompts[0] if prompts else None


def unseen(defense: Defense) -> list[str]:
    """The parts of a defense that the attack's loss knows nothing of, in words; its figure is no worst case then."""
    if isinstance(defense, Intervention):
        return ["the intervention on hidden states", *unseen(defense.inner)]
    if isinstance(defense, AdaShieldA):
        return ["the choice of a text by the picture (the text of the clean picture is attacked)"]
    if isinstance(defense, ECSO):
        again = "the defense that answers again" if defense.instead else "its answer from a caption"
        return [again, *unseen(defense.inner)]
    if isinstance(defense, Chain):
        return [part for one in defense.defenses for part in unseen(one)]
    if isinstance(defense, Gate):
        return [*unseen(defense.inner), *unseen(defense.else_)]
    return [] if type(defense).respond is Defense.respond else [f"what {defense.name} does with the call"]


def rounded(pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """To levels k/255; the gradient passes."""
    return pictures + (torch.round(pictures.detach() * 255) / 255 - pictures.detach())


def files(pictures: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Pictures as 8-bit RGB images."""
    return [Image.fromarray(to_bytes(one)) for one in pictures]


def png(picture: Image.Image) -> bytes:
    """As a lossless file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def picture_of(query: Query) -> Image.Image:
    """The picture of a query.

    Raises:
        DavspError: it has none.
    """
    picture = query.picture()
    if picture is None:
        raise DavspError(f"query {query.id} has no image; a picture is what is attacked, so leave it out")
    return picture


def _inside(prompt: Prompt, interior: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 h w"]:
    """What of a canvas is the picture."""
    if isinstance(prompt, VisualSafetyPrompt):
        p = prompt.padding
        return interior[..., p:-p, p:-p]
    return interior


def _road(prompt: Prompt, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From the picture to the defended canvas."""
    there = prompt.with_delta(prompt.delta.to(device))
    border = prompt.padding if isinstance(prompt, VisualSafetyPrompt) else 0

    def canvas(pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        return rounded(there.apply(pad(pictures, (border,) * 4)))

    return canvas
