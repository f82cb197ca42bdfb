"""An attacker inside training: `davsp train --adversarial`.

A border that was trained on clean pictures falls to an attacker who changes his picture by a few levels (docs/attack.md). Here the
malicious pictures of every step are changed against the border as it stands, before it learns from them (Madry et al. 2018,
arXiv 1706.06083). The change is a constant in the border's own gradient.
"""

from collections.abc import Callable, Sequence
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.errors import DavspError
from davsp.lvlm import LVLM
from davsp.query import Query
from davsp.training.settings import DEED, TrainSettings

REACH = 2.5
"""How far all steps together could carry a pixel, in eps: so that it may cross its box from a random start and turn back."""


def worst(
    losses: Callable[[Tensor], Tensor],
    clean: Float[Tensor, "b 3 s s"],
    where: Float[Tensor, "1 s s"],
    eps: float,
    steps: int,
    keys: Sequence[str],
) -> Float[Tensor, "b 3 s s"]:
    """Pictures within |x - clean| <= eps and [0, 1] whose losses are high: sign steps from a random start, ending at levels k/255.

    Args:
        losses: pictures -> what each is to raise; carries the gradient.
        clean: each value k/255.
        where: 1 where the picture may be changed, else 0.
        eps: a whole number of levels, in pixel units where white is 1.
        steps: gradients a picture, at least 1.
        keys: one a picture; they alone decide the starts.
    """
    low, high = (clean - eps * where).clamp(min=0), (clean + eps * where).clamp(max=1)
    x = low + (high - low) * torch.stack([_uniform(clean[0], key) for key in keys])
    for _ in range(steps):
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(losses(leaf).sum(), leaf)
        x = torch.minimum(torch.maximum(x + REACH * eps / steps * gradient.sign(), low), high)
    return torch.round(x.detach() * 255) / 255


def _uniform(like: Float[Tensor, "3 s s"], key: str) -> Float[Tensor, "3 s s"]:
    """The same numbers on every device."""
    rng = torch.Generator().manual_seed(Random(key).getrandbits(63))
    return torch.rand(like.shape, generator=rng).to(like)


def goals(lvlm: LVLM, settings: TrainSettings, malicious: Sequence[Query], deeds: Sequence[str]) -> list[str]:
    """What the attacker makes likely on each malicious query; empty: nothing, he raises their losses.

    Raises:
        DavspError: unless the model has words for it; not one deed a query.
    """
    target = settings.adversarial_target
    if not settings.adversarial or not target:
        return []
    if target == DEED and len(deeds) != len(malicious):
        raise DavspError(
            f"adversarial_target '{DEED}' needs the deed of each of the {len(malicious)} malicious queries, not {len(deeds)} (deeds)"
        )
    wanted = list(deeds) if target == DEED else [target] * len(malicious)
    for query, goal in zip(malicious, wanted, strict=True):
        ids = lvlm.tokenizer(goal, add_special_tokens=False)["input_ids"]
        if not ids or lvlm.tokenizer.unk_token_id in ids:
            what = (
                f"--adversarial-target {DEED}: what query {query.id} asks for,"
                if target == DEED
                else "--adversarial-target"
            )
            wrong = f"holds words that {lvlm.model_id} does not know" if ids else f"holds no token of {lvlm.model_id}"
            raise DavspError(f"{what} {goal!r} {wrong}; give others")
    return wanted
