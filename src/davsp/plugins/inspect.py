"""Inspect (`pip install 'davsp[inspect]'`): a local LVLM behind its defense as a model, the six benchmarks as tasks.

    inspect eval davsp/figstep --model davsp/davsp-mini -M defense=out/demo/prompt

Inspect finds both by the entry point of this package.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentImage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from PIL import Image

from davsp.defenses import NoDefense
from davsp.errors import DavspError
from davsp.lvlm import loaded, template_record
from davsp.plugins.inspect_tasks import figstep, llava_bench, mm_safetybench, mm_vet, mme, vlguard
from davsp.query import Query, Response, flatten, open_picture, undecodable

__all__ = ["DavspAPI", "figstep", "llava_bench", "mm_safetybench", "mm_vet", "mme", "vlguard"]

DEFENSE = re.compile(r"\+(davsp-[0-9a-f]{12}|none)$")  # what a model's name in a log ends with
GREEDY = {"temperature": (None, 0, 0.0), "num_choices": (None, 1), "top_k": (None, 1)}
UNKNOWN = (
    "stop_seqs", "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "response_schema",
    "system_message",
)  # fmt: skip


@dataclass(eq=False)  # two of the same question are two
class _Waiting:
    query: Query
    longest: int
    response: Response | None = None


@modelapi(name="davsp")
class DavspAPI(ModelAPI):
    """`davsp/MODEL`: folder or hub id of an LVLM, or one of those that ship. Answers are greedy; what waits is answered together.

    In logs the model is called `davsp/MODEL+davsp-HASH`, as by `davsp serve`, or `davsp/MODEL+none`.

    Args:
        model_name: MODEL; also as in a log, so that Inspect can try one again: then the defense must be that one.
        base_url: not taken: the model runs here.
        api_key: not looked at.
        config: of Inspect.
        defense: folder or hub id of a prompt, with gate+ before it a gate through it; "none" for none. There is no default, so that nothing runs undefended unsaid.
        batch_size: questions a forward, at most.
        options: revision, device_map, dtype, quantization, canvas, template, template_kwargs, undefended of the model; Inspect reads them
            as YAML (`-M 'template_kwargs={enable_thinking: false}'`), or from the YAML or JSON file of --model-config.

    Raises:
        DavspError: no defense was named, or model and defense cannot be loaded or do not go together.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        defense: str | list[str] | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> None:
        from davsp.defended import DefendedModel

        if base_url is not None:
            raise DavspError("davsp runs the model here and takes no model-base-url; leave it out.")
        if defense is None:
            raise DavspError("davsp/MODEL needs its defense: -M defense=FOLDER, or -M defense=none to measure without.")
        if isinstance(defense, list):  # Inspect takes a comma for the end of one of several
            defense = ",".join(map(str, defense))
        bare = DEFENSE.sub("", model_name)
        self.defended = DefendedModel.from_pretrained(bare, str(defense), **options)
        self.defense_sha256 = self.defended.defense.sha256()
        none = isinstance(self.defended.defense, NoDefense)
        name = f"{bare}+none" if none else f"{bare}+davsp-{self.defense_sha256[:12]}"
        if model_name not in (bare, name):
            raise DavspError(
                f"-M defense={defense} makes {name}, not {model_name}; give that one's defense, or davsp/{bare}."
            )
        # Inspect's cache knows a model by its name and address: with these in it, another defense or template gets no old answers.
        asked = "".join(f" {part}" for part in template_record(self.defended.lvlm).values())
        super().__init__(name, f"davsp:{self.defense_sha256}{asked}", None, [], config or GenerateConfig())
        self.turn, self.batch_size = anyio.Lock(), batch_size
        self.waiting: list[_Waiting] = []

    def max_connections(self) -> int:
        """A batch is under way, another waits."""
        return 2 * self.batch_size

    async def generate(
        self, input: list[ChatMessage], tools: list[Any], tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """The greedy answer to one question with at most one picture.

        Raises:
            DavspError: tools, sampling, another conversation than that, or a picture that can't be read.
        """
        _check(tools, config)
        longest = config.max_tokens or self.defended.lvlm.longest
        response = await self._response(_Waiting(question(input), longest))
        tokenizer, text = loaded(self.defended.lvlm).tokenizer, response.thought + response.text
        written = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        read = response.prompt_tokens or 0
        parts: list[Any] = [ContentReasoning(reasoning=response.thought), ContentText(text=response.text)]
        message = ChatMessageAssistant(
            content=parts if response.thought else response.text, model=self.model_name, source="generate"
        )
        cut = response.cut or response.finish == "length"
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason="max_tokens" if cut else "stop")],
            usage=ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written),
            time=response.seconds,
            metadata={"defense": response.defense, "defense_sha256": self.defense_sha256, "calls": response.calls},
        )

    async def _response(self, mine: "_Waiting") -> Response:
        """Whoever's turn it is answers for those that wait behind, too."""
        self.waiting.append(mine)
        try:
            async with self.turn:
                if mine.response is None:
                    alike = [one for one in self.waiting if one.longest == mine.longest and one is not mine]
                    batch = [mine, *[one for one in alike if one.response is None][: self.batch_size - 1]]
                    for one, response in zip(batch, await anyio.to_thread.run_sync(self._answer, batch), strict=True):
                        one.response = response
        finally:
            self.waiting.remove(mine)
        assert mine.response is not None
        return mine.response

    def _answer(self, batch: "Sequence[_Waiting]") -> list[Response]:
        queries, longest = [one.query for one in batch], batch[0].longest
        return self.defended.defense.respond(
            self.defended.lvlm, queries, batch_size=self.batch_size, max_new_tokens=longest
        )


def _check(tools: Sequence[Any], config: GenerateConfig) -> None:
    if tools:
        raise DavspError("davsp's models take no tools; leave them out.")
    for name, allowed in GREEDY.items():
        if getattr(config, name) not in allowed:
            raise DavspError(f"{name} must be {allowed[1]} or left out: davsp's answers are greedy.")
    if unknown := [name for name in UNKNOWN if getattr(config, name, None)]:
        raise DavspError(f"davsp's models know no {unknown[0]}; leave it out.")


def question(messages: Sequence[ChatMessage]) -> Query:
    """The one question of a conversation, with its picture.

    Raises:
        DavspError: anything else: a defense is defined for one question with at most one picture.
    """
    if [message.role for message in messages] != ["user"]:
        roles = ", ".join(message.role for message in messages)
        raise DavspError(f"davsp's models take one message of role user, not {roles or 'none'}.")
    content = messages[0].content
    parts = [ContentText(text=content)] if isinstance(content, str) else content
    if other := next((part for part in parts if not isinstance(part, ContentText | ContentImage)), None):
        raise DavspError(f"davsp's models take texts and pictures; nothing defends a part of type {other.type}.")
    images = [part.image for part in parts if isinstance(part, ContentImage)]
    if len(images) > 1:
        raise DavspError(f"davsp's models take one picture a question, not {len(images)}.")
    text = "\n".join(part.text for part in parts if isinstance(part, ContentText))
    return Query("", text, "benign", "", image=_picture(images[0]) if images else None)


def _picture(image: str) -> Image.Image:
    """A picture file, or one in a data URL, as `davsp eval` reads it."""
    if image.startswith(("http:", "https:")):
        raise DavspError("davsp fetches no pictures; give a file or a data URL.")
    if not image.startswith("data:"):
        return open_picture(Path(image))
    try:
        with Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2], validate=True))) as picture:
            return flatten(picture)
    except DavspError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        raise DavspError(
            f"the picture in the data URL cannot be read ({undecodable(error)}); give a whole PNG, JPEG or WebP in base64."
        ) from error
