"""Keys of queries: what AdaShield-A's pool is searched by.

As published: an image half and a text half, concatenated as they are, then the whole normalised. The encoder there is CLIP
ViT-B/32 (512 + 512); it is here for real models. The embedded LVLMs are searched by their own features: their pictures and words
are not CLIP's world, and no CLIP can be shipped.

INFERRED: questions longer than CLIP's 77 tokens are cut (the published code would raise), and a query without a picture has an
image half of zeros.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from davsp.errors import DavspError, words_of
from davsp.lvlm import LVLM, AnsweringLVLM, fingerprint, loaded, model_name
from davsp.lvlm.hooks import wide
from davsp.query import Query

CLIP = "openai/clip-vit-base-patch32"


@runtime_checkable
class Encoder(Protocol):
    """Turns queries into keys."""

    def describe(self) -> dict[str, Any]:
        """What decides the keys, as JSON; a pool is only good for the same."""
        ...

    def encode(self, queries: Sequence[Query]) -> Float[Tensor, "n d"]:
        """A unit key a query, float32 on the CPU."""
        ...


class ClipEncoder:
    """CLIP by transformers, without torchvision.

    Args:
        model_id: folder or hub id.
        device: where it runs.

    Raises:
        DavspError: it can't be loaded.
    """

    def __init__(self, model_id: str = CLIP, revision: str | None = None, device: str | torch.device = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.model_id, self.revision, self.device = model_id, revision, torch.device(device)
        try:
            self.model: Any = CLIPModel.from_pretrained(model_id, revision=revision or "main")
            self.tokenizer = AutoTokenizer.from_pretrained(model_id, revision=revision)
            self.processor = AutoImageProcessor.from_pretrained(model_id, revision=revision, backend="pil")
        except Exception as error:  # OSError, ValueError, KeyError, SafetensorError…
            raise DavspError(
                f"cannot load CLIP {model_id}: {words_of(error)}; check its name, or mend its files"
            ) from error
        self.model = self.model.requires_grad_(False).eval().to(self.device)

    def describe(self) -> dict[str, Any]:
        return {"kind": "clip", "model": self.model_id, "revision": self.revision}

    @torch.no_grad()
    def encode(self, queries: Sequence[Query]) -> Float[Tensor, "n d"]:
        longest = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer(
            [q.question for q in queries], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        words = self.model.get_text_features(**text.to(self.device)).pooler_output
        images = torch.zeros_like(words)
        pictures = [(i, picture) for i, q in enumerate(queries) if (picture := q.picture()) is not None]
        if pictures:
            pixels = self.processor([picture for _, picture in pictures], return_tensors="pt")["pixel_values"]
            images[[i for i, _ in pictures]] = self.model.get_image_features(pixels.to(self.device)).pooler_output
        return normalize(torch.cat([images, words], 1).float(), dim=1).cpu()


class LVLMEncoder:
    """Features of the defended LVLM itself, at the decoder's entrance: mean projected patch, and mean embedding of the question's words.

    Both halves are looked at from the middle of all ordinary words (the mean row of the embedding is taken off), as else all pictures and
    all questions would point one way. INFERRED as a whole: the paper's models use CLIP.
    """

    def __init__(self, lvlm: AnsweringLVLM) -> None:
        self.lvlm = loaded(lvlm, f"{lvlm.model_id} is on a server, which gives no features; make the pool with CLIP")

    def describe(self) -> dict[str, Any]:
        return {"kind": "own", "model": model_name(self.lvlm), "weights": fingerprint(self.lvlm)}

    def encode(self, queries: Sequence[Query]) -> Float[Tensor, "n d"]:
        return torch.stack([self._key(query) for query in queries])

    @torch.no_grad()
    def _key(self, query: Query) -> Float[Tensor, " d"]:
        lvlm, picture = self.lvlm, query.picture()
        embedding = lvlm.model.get_input_embeddings().weight
        ids = lvlm.tokenizer(query.question, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        words = wide(embedding[ids.to(embedding.device)]).mean(0)
        middle = wide(embedding).mean(0)
        patches = middle if picture is None else self._patches(lvlm.preprocess([picture]), query.question)
        return normalize(torch.cat([patches - middle, words - middle]).float(), dim=0).cpu()

    def _patches(self, canvas: Any, question: str) -> Float[Tensor, " d"]:
        """The mean of what stands for the picture where the first decoder block reads it."""
        states: list[Tensor] = []
        tokens = self.lvlm.encode([question], self.lvlm.sizes(canvas))

        def look(module: Any, inputs: Any, options: Any) -> None:
            states.append(wide(inputs[0] if inputs else options["hidden_states"]))
            raise _Enough

        handle = self.lvlm.layers[0].register_forward_pre_hook(look, with_kwargs=True)
        try:
            self.lvlm.model(**self.lvlm.inputs(tokens, canvas), use_cache=False)
        except _Enough:
            pass
        finally:
            handle.remove()
        return states[0][tokens.ids == self.lvlm.image_token_id].mean(0)


class _Enough(Exception):
    """Leaves the forward pass at the first block."""


def encoder_of(description: dict[str, Any], lvlm: AnsweringLVLM) -> Encoder:
    """The encoder that a pool was made with.

    Raises:
        DavspError: its keys are features of another LVLM, or it is not known.
    """
    if description.get("kind") == "clip":
        device = lvlm.device if isinstance(lvlm, LVLM) else "cpu"
        return ClipEncoder(description["model"], description.get("revision"), device)
    if description.get("kind") != "own":
        raise DavspError(f"the pool's encoder {description.get('kind')!r} is not known; make the pool anew")
    encoder = LVLMEncoder(lvlm)
    if encoder.describe() != description:
        raise DavspError(
            f"the pool's keys are features of {description.get('model')}, not of {model_name(lvlm)}; make a pool with this model"
        )
    return encoder
