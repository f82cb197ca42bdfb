"""`davsp serve` and `davsp serve-model`."""

import gc
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from davsp.cli.canaries import asking
from davsp.cli.defenses import rows
from davsp.cli.engine import StatesOptions, served_states
from davsp.cli.groups import chosen
from davsp.cli.inputs import compare_templates, is_shipped, load_lvlm, needs_extra, say
from davsp.cli.options import GRAMMAR, ModelOptions, TrustEnv
from davsp.errors import DavspError

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket

    from starlette.applications import Starlette

    from davsp.defenses import Defense
    from davsp.prompts import VisualSafetyPrompt
    from davsp.serve.canaries import Report
    from davsp.serve.settings import ServeSettings

M_MMAP_THRESHOLD = -3  # of malloc.h
Host = Annotated[str, typer.Option(help="Address to listen at; another than this machine's own needs --token-env.")]
TokenEnv = Annotated[
    str | None, typer.Option(help="Environment variable with the token that clients must bring; left out: none.")
]
MaxPixels = Annotated[
    int | None, typer.Option(help="Pixels of the smallest square that holds a picture; left out: 36 million.")
]


@dataclass(frozen=True)
class LimitOptions:
    """What a request may hold, and how many are served at once; what is left out stays as `ServeSettings` has it."""

    panel: ClassVar[str] = "Limits"
    max_body: Annotated[int | None, typer.Option(help="Bytes of a request; left out: 32 MiB.")] = None
    max_text: Annotated[int | None, typer.Option(help="Bytes of a request besides its pictures; left out: 4 MiB.")] = (
        None
    )
    max_values: Annotated[int | None, typer.Option(help="Values of a request's JSON; left out: 100,000.")] = None
    max_images: Annotated[int | None, typer.Option(help="Pictures of a request; left out: 8.")] = None
    max_picture_bytes: Annotated[int | None, typer.Option(help="Bytes of a picture; left out: 16 MiB.")] = None
    max_pixels: MaxPixels = None
    max_request_pixels: Annotated[
        int | None, typer.Option(help="Pixels of all pictures of a request; left out: 144 million.")
    ] = None
    max_held: Annotated[
        int | None, typer.Option(help="Bytes of requests that each worker holds; one more is a 429; left out: 256 MiB.")
    ] = None
    max_decoding: Annotated[
        int | None, typer.Option(help="Bytes that each worker's decoding takes at a time; left out: 256 MiB.")
    ] = None
    concurrency: Annotated[int | None, typer.Option(help="Requests under way at once; left out: 128.")] = None
    workers: Annotated[
        int | None, typer.Option(help="Processes, each with its own --concurrency and --threads; left out: 1.")
    ] = None
    threads: Annotated[
        int | None, typer.Option(help="Pictures defended at once; left out: as many as cores, shared by the workers.")
    ] = None
    upstream_timeout: Annotated[float | None, typer.Option(help="Longest silence of the upstream in seconds.")] = None


def serve(
    limits: LimitOptions,
    upstream: Annotated[str, typer.Option(help="The OpenAI-compatible server that answers, http://HOST:PORT/v1.")],
    prompt: Annotated[Path | None, typer.Option(help="Folder or hub id of a prompt; or --defense.")] = None,
    defense: Annotated[str | None, typer.Option(help=f"Another defense, as of davsp eval: {GRAMMAR}")] = None,
    text: Annotated[str | None, typer.Option(help="Text of --defense safety-text.")] = None,
    canvas: Annotated[
        int | None, typer.Option(help="Side in pixels at which its model sees a picture without resampling.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model as the upstream calls it; left out: the first it lists.")
    ] = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8100,
    token_env: TokenEnv = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable with the upstream's key; left out: the client's own is passed on."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="HOST or HOST:PORT from which pictures are fetched by https; repeatable.")
    ] = None,
    allow_field: Annotated[
        list[str] | None,
        typer.Option(help="A field of requests that passes besides the known ones, which force no words; repeatable."),
    ] = None,
    image_free: Annotated[
        str, typer.Option(help="A request without a picture: defend (the text alone) or pass (as it is).")
    ] = "defend",
    plain_names: Annotated[
        bool,
        typer.Option("--plain-names", help="Take the upstream's own model names, without the defense's hash, too."),
    ] = False,
    trust_env: TrustEnv = False,
    gate_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of --defense gate+…: tokens that are looked at; a model that thinks needs more; left out: 16."
        ),
    ] = None,
    reasoning_tags: Annotated[
        str | None,
        typer.Option(
            help="Of --defense gate+…: tags around what the upstream's model thinks, as JSON, or none; an empty first tag: each answer "
            "begins in a thought; left out: <think> and <analysis>."
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option(help="Look at the upstream first, with a picture of noise and the prompt's canaries.")
    ] = True,
    require_effect: Annotated[
        bool, typer.Option("--require-effect", help="Refuse to start unless the canaries show the border's effect.")
    ] = False,
    ready_seconds: Annotated[
        float | None, typer.Option(help="For which /ready keeps what the canaries showed; left out: 60.")
    ] = None,
) -> None:
    """Put a defense before a server: an OpenAI-compatible proxy that defends every picture and question (docs/serve.md)."""
    needs_extra()
    import asyncio

    from davsp.lvlm.remote import RemoteLVLM
    from davsp.runtime.http import road
    from davsp.runtime.thought import read_tags
    from davsp.serve.app import Proxy
    from davsp.serve.canaries import border_of, check_required
    from davsp.serve.gate import gate_of, note
    from davsp.serve.probe import probe as look
    from davsp.serve.settings import ServeSettings

    if require_effect and not probe:
        raise DavspError("--require-effect looks at the upstream, and --no-probe does not; leave one out.")
    tags = None if reasoning_tags is None else tuple(read_tags(reasoning_tags))
    settings = ServeSettings.of(
        reasoning_tags=tags, upstream=upstream, model=model, canvas=canvas, require_effect=require_effect or None, ready_seconds=ready_seconds, host=host, port=port, token_env=token_env, api_key_env=api_key_env,
        allow_hosts=tuple(allow_host or ()), allow_fields=tuple(allow_field or ()), image_free=image_free, plain_names=plain_names, trust_env=trust_env, **chosen(limits),
    )  # fmt: skip
    load = partial(_defense, prompt, defense, text, model, gate_tokens)
    loaded = load()
    gate = gate_of(loaded)
    if gate is None and not (gate_tokens is None and reasoning_tags is None):
        raise DavspError(
            "--gate-tokens and --reasoning-tags belong to a gate; give --defense gate+NAME=FOLDER, or leave them out."
        )
    served = gate.served if gate else None
    if served and model is None:
        model, settings = served.model, settings.model_copy(update={"model": served.model})
    told = served.template_kwargs if served else None
    there = RemoteLVLM(model or "the upstream's model", upstream, api_key_env, canvas=canvas, template_kwargs=told)
    loaded.check(there)
    compare_templates(there, {"the prompt": loaded})
    for line in asyncio.run(look(settings, model, served=served)) if probe else ():
        say(line)
    report = _effect(border_of(loaded), settings) if probe else None
    if require_effect:
        check_required(report)
    proxy = Proxy(loaded, settings, report=report)
    if gate is not None:
        say(note(gate))
    say(f"the upstream is reached {road(trust_env)}")
    say(f"{loaded.name}, {proxy.hash[:12]}: models are called NAME{proxy.suffix}")
    if settings.workers == 1:
        return _run(proxy.app, host, port)
    from davsp.serve import workers as several

    say(f"{settings.workers} workers listen at {_address(host, port)}")
    several.run(partial(_work, load, proxy.hash, settings), settings.workers, host, port)


def _effect(border: "VisualSafetyPrompt | None", settings: "ServeSettings") -> "Report | None":
    """What the canaries show at the upstream, said in a line; None if there are none."""
    import asyncio

    from davsp.serve.canaries import NONE, at_start

    if border is None or border.canaries is None:
        if border is not None:
            say(NONE)
        return None
    with asking(border) as progress:
        report = asyncio.run(at_start(settings, border, progress))
    say(report.line)
    return report


def _work(load: "Callable[[], Defense]", expected: str, settings: "ServeSettings", listening: "socket") -> None:
    """One of several workers, which loads the defense for itself.

    Raises:
        DavspError: it is another than the command looked at.
    """
    import uvicorn

    from davsp.serve.app import Proxy
    from davsp.serve.connections import SERVER

    proxy = Proxy(load(), settings)
    if proxy.hash != expected:
        raise DavspError("the defense was changed on disk while the workers started; start davsp serve again.")
    _settle()
    uvicorn.Server(uvicorn.Config(proxy.app, **SERVER)).run([listening])


def serve_model(
    model: ModelOptions,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    token_env: TokenEnv = None,
    max_pixels: MaxPixels = None,
    states_folder: Annotated[
        Path | None, typer.Option(help="Folder to write each prompt's hidden states into, as vLLM does.")
    ] = None,
    states_layers: Annotated[
        str | None, typer.Option(help="Their layers, in rising order: 14, or 8,16,24, or 1-31.")
    ] = None,
) -> None:
    """Serve a model by OpenAI's protocol, one question at a time: to try davsp serve and davsp eval --engine openai on."""
    needs_extra()
    from davsp.lvlm import model_name
    from davsp.lvlm.undefended import WAYS
    from davsp.serve.model import model_app
    from davsp.serve.settings import ServeSettings

    settings = ServeSettings.of(upstream="", host=host, port=port, token_env=token_env, max_pixels=max_pixels)
    states = served_states(StatesOptions(states_folder, states_layers), ("", []))
    lvlm = load_lvlm(model)
    for layer in states.layers if states else ():
        lvlm.check_layer(layer)
    name = model_name(lvlm)
    say(
        f"serving {name}, whose canvas is {lvlm.canvas}x{lvlm.canvas} pixels; others that are not square are "
        f"{WAYS[lvlm.undefended]}"
    )
    _run(model_app(lvlm, name, settings, states), host, port)


def _defense(
    prompt: Path | None, spec: str | None, text: str | None, model: str | None, gate_tokens: int | None = None
) -> "Defense":
    """The one defense that the options name."""
    from davsp.defenses import Gate, NoDefense, load_defense

    if (prompt is None) == (spec is None):
        raise DavspError("give either --prompt or --defense: the one defense that is put before the upstream.")
    if prompt:
        defense = load_defense(prompt)
    else:
        shipped = model is not None and is_shipped(model)
        defense = next(iter(rows([spec or ""], None, text, shipped).values()))
    if isinstance(defense, NoDefense):
        raise DavspError("--defense none would send everything on undefended; ask the upstream itself.")
    if gate_tokens is not None and isinstance(defense, Gate):
        defense.tokens = gate_tokens
    return defense


def _run(app: "Starlette", host: str, port: int) -> None:
    """Until Ctrl-C."""
    import uvicorn

    from davsp.serve.connections import SERVER

    say(f"listening at {_address(host, port)}")
    _settle()
    uvicorn.run(app, host=host, port=port, **SERVER)


def _settle() -> None:
    """What a process sets once it has loaded everything.

    The garbage collector passes by what torch and others loaded: one look at it all stalls every request by a quarter second. And glibc
    gives large blocks back to the system when they are freed; left alone, it would learn from the first large picture to keep them.
    """
    import ctypes

    from davsp.serve.pictures import quiet

    quiet()
    gc.collect()
    gc.freeze()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 4 * 2**20)


def _address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
