"""Where the model runs: loaded here, or behind a server. The options, and the model that they mean."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from davsp.cli.inputs import load_lvlm
from davsp.cli.options import ModelOptions, RequestOptions
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.lvlm import AnsweringLVLM
    from davsp.lvlm.states_served import ServedStates


@dataclass(frozen=True)
class EngineOptions:
    """Where the model runs: here, or behind a server."""

    panel: ClassVar[str] = "Where the model runs"
    engine: Annotated[
        str, typer.Option(help="transformers: the model is loaded here; openai: a server runs it (vLLM, SGLang).")
    ] = "transformers"
    base_url: Annotated[
        list[str] | None,
        typer.Option(
            help="The model's server, http://HOST:PORT/v1; repeatable, and each gets as many of the questions."
        ),
    ] = None
    api_model: Annotated[str | None, typer.Option(help="The model as its server calls it; left out: --model.")] = None
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key of the model's server; left out: no key.")
    ] = None
    extra_body: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE, VALUE as JSON or text, or a JSON object, that every request to the model's server has besides. Repeatable."
        ),
    ] = None


@dataclass(frozen=True)
class StatesOptions:
    """Where the model's server writes its hidden states."""

    panel: ClassVar[str] = "Where the model runs"
    states_folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder into which the model's server writes hidden states (vLLM's shared_storage_path), as this machine sees it."
        ),
    ] = None
    states_layers: Annotated[
        str | None,
        typer.Option(help="The layers that the server was told to write, in rising order: 14, or 8,16,24, or 1-31."),
    ] = None


def server_of(engine: EngineOptions, model: ModelOptions, processes: int = 1) -> tuple[str, list[str]] | None:
    """Model and addresses of the server that answers; None if the model is loaded here."""
    if engine.engine not in ("transformers", "openai"):
        raise DavspError(f"--engine {engine.engine!r} is not known: choose transformers or openai.")
    if engine.engine == "transformers":
        if engine.base_url or engine.extra_body:
            raise DavspError(f"--{'base-url' if engine.base_url else 'extra-body'} goes with --engine openai.")
        return None
    name = engine.api_model or model.name
    if not engine.base_url or not name:
        raise DavspError("--engine openai needs --base-url and --api-model (or --model), as the server calls it.")
    loading = model.revision or model.device or model.dtype or model.quantization or model.attn_implementation
    if loading or model.template or processes > 1:
        raise DavspError(
            "--revision, --device, --dtype, --quantization, --attn-implementation, --template and --num-processes go with a model loaded here."
        )
    if model.undefended:
        raise DavspError(
            "--undefended goes with a model loaded here: a server shapes undefended pictures in its own way."
        )
    return name, engine.base_url


def served_states(states: StatesOptions, server: tuple[str, list[str]] | None) -> "ServedStates | None":
    """Where the server writes hidden states; None if nobody says that it does."""
    if states.states_folder is None and states.states_layers is None:
        return None
    if server is None:
        raise DavspError("--states-folder and --states-layers go with --engine openai: a model loaded here has all.")
    if states.states_folder is None or states.states_layers is None:
        raise DavspError("--states-folder and --states-layers go together; give both.")
    from davsp.lvlm.states_served import ServedStates, read_layers

    return ServedStates(states.states_folder, read_layers(states.states_layers))


def lvlm_of(
    model: ModelOptions,
    server: tuple[str, list[str]] | None,
    engine: EngineOptions,
    requests: RequestOptions,
    served: "ServedStates | None" = None,
) -> "AnsweringLVLM":
    """The model that answers, loaded here or behind its server."""
    if server is None:
        return load_lvlm(model)
    from davsp.lvlm.remote import RemoteLVLM
    from davsp.lvlm.templates import read_extra, read_kwargs

    told, extra = read_kwargs(model.template_kwargs), read_extra(engine.extra_body)
    return RemoteLVLM(
        *server, engine.api_key_env, canvas=model.canvas, template_kwargs=told, extra_body=extra,
        concurrency=requests.concurrency, timeout=requests.timeout, trust_env=requests.trust_env, served=served,
    )  # fmt: skip
