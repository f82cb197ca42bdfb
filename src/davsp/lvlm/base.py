"""What every family shares: loading, pictures, hidden states, answer loss; `asking` and `generating` hold the rest.

Layers are numbered as in `hidden_states`: layer l is the output of decoder block l, that is `layers[l - 1]`;
0 is the embedding. The last one is left out, because `hidden_states[num_layers]` comes after the final norm.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from davsp.errors import DavspError, words_of
from davsp.lvlm.answering import NO_STATES, AnsweringLVLM, check_square
from davsp.lvlm.asking import Size, Tokens
from davsp.lvlm.device import SPREAD, check_device_map
from davsp.lvlm.generating import Canvas, Generating
from davsp.lvlm.hooks import catching, wide
from davsp.lvlm.loading import chat_template, check_format, load_weights, make_greedy, processor_file
from davsp.lvlm.templates import CHECKPOINT
from davsp.lvlm.undefended import chosen
from davsp.query import Question, flatten
from davsp.runtime.thought import TAGS, Tags


@dataclass(frozen=True)
class StepOutput:
    """State of the last prompt token, and each sample's mean answer cross-entropy (0 without an answer)."""

    state: Float[Tensor, "b d"]
    answer_loss: Float[Tensor, " b"] | None


class LVLM(Generating):
    """One loaded, frozen vision-language model.

    Attributes:
        model_id, revision: where it came from.
        model, tokenizer: the transformers objects; no weight takes a gradient.
        canvas: height and width in pixels at which the model sees a picture without resampling.
        positions: tokens of prompt and answer together at most; None: its configuration does not say.
        num_layers: decoder blocks; the layers one can ask for are 1 to num_layers - 1.
        image_token_id, tokens_per_image: the placeholder, and how many of it stand for one canvas.
        mean, std: per-channel normalisation of the vision tower, (1, 3, 1, 1).
        processors: image processors that this family's checkpoints come with.
        ways: how it can show a picture that is not square (`davsp.lvlm.undefended.WAYS`): first as its authors' code does, last as
            its checkpoint's processor does (of InternVL: on one tile).
        undefended: the one of these in use.
        overridden: what the checkpoint's generation settings say against greedy answers; it does not count.
        server: None: it is loaded here (`AnsweringLVLM`).
        steer: how `generate` steers where nothing else is said; None: not at all (`steered`).
        beginning: with what every answer is made to begin; empty: with nothing (`begun`).
        barred: tokens with which no answer begins (`without`).
        reasoning_tags: what stands around its thoughts (`AnsweringLVLM`).
        attention: the `attn_implementation` that was asked for; None: transformers' choice.
        longest: where an answer is cut (`AnsweringLVLM`); `davsp.embedded.load` sets it for the models that ship.
    """

    processors: tuple[str, ...]
    server: str | None = None
    reasoning_tags: Tags = TAGS
    attention: str | None = None
    canvas: int
    tokens_per_image: int
    image_token_id: int
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        model_id: str,
        revision: str | None,
        canvas: int | None = None,
    ):
        self.model = model.requires_grad_(False).eval()
        self.overridden = make_greedy(model)
        self.tokenizer, self.model_id, self.revision = tokenizer, model_id, revision
        self.image_processor = image_processor
        self.ways = self.ways_of(image_processor)
        self.undefended = self.ways[0]
        self.layers = model.get_decoder().layers
        self.num_layers = len(self.layers)
        self.positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.device, self.dtype = model.device, model.dtype
        self.eos_token_id: int = tokenizer.eos_token_id
        self.pad_token_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.image_token_id = model.config.image_token_id
        self.mean, self.std = (
            torch.tensor(x, device=self.device).view(1, 3, 1, 1)
            for x in (image_processor.image_mean, image_processor.image_std)
        )
        self.keep_prompts()

    def take_canvas(self, canvas: int) -> None:
        """Set the side of the square that prompts make, where the family takes several.

        Raises:
            DavspError: it does not see such a square as it is.
        """
        self.canvas = canvas
        self.check_canvas(canvas, canvas)
        self.tokens_per_image = self.image_tokens(canvas, canvas)

    # -- loading ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model_id: Any,
        *,
        revision: str | None = None,
        device_map: Any = None,
        dtype: torch.dtype | str | None = None,
        quantization: str | None = None,
        attn_implementation: str | None = None,
        canvas: int | None = None,
        template: str = CHECKPOINT,
        template_kwargs: Mapping[str, Any] | None = None,
        undefended: str | None = None,
    ) -> "LVLM":
        """Load a checkpoint of any known family from a folder or the hub. Code from the checkpoint is never run.

        Args:
            model_id: folder or hub name.
            revision: hub branch, tag or commit.
            device_map: a device ("cpu", "cuda:1"), or a map as accelerate knows them; None: the GPU if there is one.
            dtype: of the weights; None: float32 on CPU, bfloat16 on a GPU.
            quantization: "4bit" or "8bit", by bitsandbytes on a GPU: the decoder's linear layers alone, so that the
                gradient to the picture stays good. None: none. A checkpoint that is quantized as it comes needs nothing here.
            attn_implementation: "eager", "sdpa", "flash_attention_2", …, as transformers names them; None: its choice.
            canvas: side in pixels of the pictures that prompts make, for families that take many sizes (Qwen2-VL);
                None: the family's own.
            template: "checkpoint", or a conversation template of LLaVA's own code (`use_template`).
            template_kwargs: what the checkpoint's own template is told, {"enable_thinking": False} (`told`).
            undefended: how a picture without a visual prompt comes to the model's shape: "pad", "crop", … as the model has it
                (docs/families.md); None: as its authors' code does.

        Raises:
            DavspError: no such checkpoint or device, broken or missing weights, or a family that is not supported.
        """
        from davsp.lvlm import FAMILIES

        model_id = str(model_id)
        device_map = device_map or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device_map(device_map)
        if dtype is None:
            on_cpu = str(device_map) == "cpu" or (str(device_map) in SPREAD and not torch.cuda.is_available())
            dtype = torch.float32 if on_cpu else torch.bfloat16
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        try:
            check_format(model_id, revision)
            config = AutoConfig.from_pretrained(model_id, revision=revision)
            if config.model_type not in FAMILIES:
                known = ", ".join(sorted(FAMILIES))
                raise DavspError(f"{model_id} is a '{config.model_type}' model; the families known are: {known}")
            family = FAMILIES[config.model_type]
            tokenizer = AutoTokenizer.from_pretrained(model_id, revision=revision)
            tokenizer.chat_template = chat_template(model_id, revision, tokenizer)
            processor = family.load_processor(model_id, revision)
            way = chosen(family.ways_of(processor), undefended, f"{model_id} ({config.model_type})")
            revision = getattr(config, "_commit_hash", None) or revision
            model = load_weights(
                model_id, revision, device_map, dtype, quantization, attn_implementation, _quantized(config)
            )
            lvlm = family(model, tokenizer, processor, model_id, revision, canvas)
            if canvas not in (None, lvlm.canvas):
                raise DavspError(
                    f"{model_id} looks at pictures of {lvlm.canvas}x{lvlm.canvas} and at no other canvas, so not at {canvas}: leave out "
                    "--canvas"
                )
            lvlm.attention = attn_implementation
            if template != CHECKPOINT:
                lvlm.use_template(template)
            lvlm.undefended = way
            return lvlm.told(template_kwargs) if template_kwargs else lvlm
        except DavspError:
            raise
        except Exception as error:  # the libraries raise OSError, ValueError, KeyError, RuntimeError, SafetensorError…
            raise DavspError(
                f"cannot load model {model_id}: {words_of(error)}; check its name, or mend its files"
            ) from error

    @classmethod
    def load_processor(cls, model_id: str, revision: str | None) -> Any:
        """The checkpoint's image processor, without torchvision; whole processors are avoided, for some need it.

        Raises:
            DavspError: it is another family's.
        """
        processor = AutoImageProcessor.from_pretrained(model_id, revision=revision, backend="pil")
        if type(processor).__name__.removesuffix("Pil") not in cls.processors:
            raise DavspError(
                f"{model_id} comes with a {type(processor).__name__.removesuffix('Pil')}, but its model needs "
                f"{' or '.join(cls.processors)}: restore its {processor_file(model_id, revision)}"
            )
        return processor

    def showing(self, way: str) -> "LVLM":
        """The same model, which shows undefended pictures in another of its `ways`; no weight is copied.

        Raises:
            DavspError: the model has no such way.
        """
        other = copy(self)
        other.undefended = chosen(self.ways, way, self.model_id)
        other.keep_prompts()  # what stands for a picture may depend on it
        return other

    # -- what a family writes --------------------------------------------------------------------------------------

    @classmethod
    def ways_of(cls, processor: Any) -> tuple[str, ...]:
        """`ways`, by the checkpoint's image processor."""
        raise NotImplementedError

    def preprocess(self, images: list[Image.Image]) -> Canvas:
        """Undefended pictures as this family resizes them; float32 in [0, 1], each k/255.

        A picture that `check_canvas` accepts passes unchanged. A list comes back where the pictures keep sizes of
        their own (Qwen2-VL).

        Raises:
            DavspError: there is no picture, or one that the family does not take (`seen`).
        """
        if not images:
            raise DavspError("there is no image to prepare: the list is empty")
        canvases = []
        for image in images:
            self.seen(*image.size)
            canvases.append(torch.from_numpy(self.shown(flatten(image)).astype(np.float32)) / 255)
        same = all(one.shape == canvases[0].shape for one in canvases)
        return torch.stack(canvases) if same else canvases

    def shown(self, picture: Image.Image) -> Any:
        """A plain picture as this family resizes it undefended: an array (3, h, w) of bytes, from the checkpoint's own processor."""
        return self.image_processor(picture, do_rescale=False, do_normalize=False)["pixel_values"][0]

    def pixel_inputs(self, canvas: Any) -> dict[str, Tensor]:
        """The model's own image arguments for finished canvases in [0, 1]; carries the gradient.

        Canvases of one size come as a tensor (b, 3, h, w), others as a list. Here: normalised in the canvas' own precision, cast last.
        """
        return {"pixel_values": ((canvas - self.mean) / self.std).to(self.dtype)}

    def image_tokens(self, height: int, width: int) -> int:
        """How many placeholders stand for a canvas of this size."""
        return self.tokens_per_image

    def check_canvas(self, height: int, width: int) -> None:
        """Raises DavspError unless the model sees a picture of this size without resampling it."""
        check_square(self, height, width)

    def check_pixels(self, height: int, width: int) -> None:
        """Raises DavspError unless the tower takes pixels of this size: those of `preprocess`, and every canvas."""
        check_square(self, height, width)

    def differentiable(self, height: int, width: int) -> bool:
        """Whether a gradient reaches a canvas of this size."""
        return True

    def seen(self, width: int, height: int) -> tuple[int, int]:
        """Height and width that `preprocess` gives a picture of this size.

        Raises:
            DavspError: the family takes no such picture.
        """
        return self.canvas, self.canvas

    def token_inputs(self, ids: Int[Tensor, "b t"]) -> dict[str, Tensor]:
        """What else the model wants to know of the tokens."""
        return {}

    @property
    def readable(self) -> Sequence[int]:
        """The layers whose states can be asked for."""
        return range(1, self.num_layers)

    # -- forward ---------------------------------------------------------------------------------------------------

    def states(
        self, canvas: Canvas | None, questions: Sequence[Question], layers: Sequence[int]
    ) -> Float[Tensor, "b l d"]:
        """Hidden state of the last prompt token at each of `layers`; computes no deeper than the deepest.

        Equal to `output_hidden_states=True` (checked in the tests). Gradient flows only if `canvas` requires it.

        Raises:
            DavspError: a layer outside 1 .. num_layers - 1, or a canvas of another size.
        """
        for layer in layers:
            self.check_layer(layer)
        tokens = self.encode(questions, self.sizes(canvas))
        wants = isinstance(canvas, Tensor) and canvas.requires_grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(wants), catching(self.layers, layers, tokens.last, stop=True) as caught:
            self.model(**self.inputs(tokens, canvas), use_cache=False)
        return torch.stack([caught[layer].to(self.device) for layer in layers], dim=1)

    def step(
        self,
        canvas: Canvas | None,
        questions: Sequence[Question],
        layer: int,
        answers: Sequence[str | None] | None = None,
        end_token: bool = True,
    ) -> StepOutput:
        """State at `layer` and answer loss in one forward pass; without answers the pass ends at `layer`.

        The loss of a sample is the mean cross-entropy over its answer tokens and, if `end_token`, the end token. The language-model
        head is applied to those positions only. A row whose answer is None has loss 0.

        Raises:
            DavspError: a layer outside 1 .. num_layers - 1, or a canvas of another size.
        """
        self.check_layer(layer)
        tokens = self.encode(questions, self.sizes(canvas), answers, end_token=end_token)
        inputs = self.inputs(tokens, canvas) | {"use_cache": False}
        with catching(self.layers, [layer], tokens.last, stop=answers is None) as caught:
            if answers is not None:
                before = torch.zeros_like(tokens.answer_mask)  # the logits at t - 1 foretell token t
                before[:, :-1] = tokens.answer_mask[:, 1:]
                logits = self.model(**inputs, logits_to_keep=before).logits  # (answer tokens of all rows, vocabulary)
            else:
                self.model(**inputs)
        state = caught[layer].to(self.device)
        if answers is None:
            return StepOutput(state, None)
        losses = cross_entropy(wide(logits), tokens.ids[tokens.answer_mask], reduction="none")
        parts = losses.split(tokens.answer_mask.sum(1).tolist())
        return StepOutput(state, torch.stack([part.sum() / max(len(part), 1) for part in parts]))

    def check_layer(self, layer: int) -> None:
        """Raises DavspError if the model has no such layer to look at."""
        if not 1 <= layer <= self.num_layers - 1:
            raise DavspError(f"layer {layer} is out of range: {self.model_id} has layers 1 to {self.num_layers - 1}")

    def sizes(self, canvas: Canvas | None) -> Literal[False] | list[Size]:
        """Height and width of each canvas, as `encode` wants them; False without a picture.

        Raises:
            DavspError: a canvas of another size; it is found here, before anything is computed.
        """
        if canvas is None:
            return False
        for one in canvas[:1] if isinstance(canvas, Tensor) else canvas:
            self.check_pixels(*one.shape[-2:])
        return [(int(one.shape[-2]), int(one.shape[-1])) for one in canvas]

    def inputs(self, tokens: Tokens, canvas: Canvas | None, masked: bool = False) -> dict[str, Any]:
        """All arguments of the transformers model for one batch; carries the gradient to the canvas.

        Args:
            tokens: what `encode` gave for this canvas.
            canvas: finished canvases in [0, 1], one a row; None for questions in words only.
            masked: with the attention mask. Padding on the left needs it; right-padded and causal, nothing looks at the padding, and
                without a mask attention takes its fast path.
        """
        inputs: dict[str, Any] = {"input_ids": tokens.ids}
        if masked:
            inputs["attention_mask"] = tokens.mask
        if canvas is None:
            return inputs
        if len(canvas) != len(tokens.ids):
            raise ValueError(f"{len(canvas)} canvases for {len(tokens.ids)} questions")
        if not isinstance(canvas, Tensor):
            canvas = [one.to(self.device) for one in canvas]
            canvas = torch.stack(canvas) if len({one.shape for one in canvas}) == 1 else canvas
        pixels = self.pixel_inputs(canvas.to(self.device) if isinstance(canvas, Tensor) else canvas)
        return inputs | self.token_inputs(tokens.ids) | pixels


def loaded(lvlm: AnsweringLVLM, refusal: str = NO_STATES) -> LVLM:
    """The model, if it is loaded here: it has more than answers.

    Args:
        refusal: the sentence for a model on a server: what it does not give, and the mend.

    Raises:
        DavspError: it is on a server.
    """
    if not isinstance(lvlm, LVLM):
        raise DavspError(refusal)
    return lvlm


def _quantized(config: Any) -> dict[str, Any] | None:
    """The checkpoint's own quantization_config as a dictionary; None without one."""
    found = getattr(config, "quantization_config", None)
    return dict(found) if isinstance(found, dict) else None if found is None else dict(found.to_dict())
