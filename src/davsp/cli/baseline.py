"""`davsp baseline`: the methods that the paper compares with DAVSP and that are trained, a command each."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from davsp.cli.groups import add, chosen
from davsp.cli.inputs import (
    embedded_protocol,
    in_processes,
    is_shipped,
    load_lvlm,
    safety_text,
    say,
    settings_of,
    terminal,
)
from davsp.cli.options import (
    DataOptions,
    DefenderOptions,
    LoopOptions,
    MaliciousOptions,
    ModelOptions,
    Out,
    ProcessOptions,
    Resume,
    Seed,
    TrustEnv,
)
from davsp.cli.testset import both_classes, queries_at, split_queries
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.defenses.adashield_a import ChatDefender
    from davsp.prompts import Prompt

TEXT_PARTS = ("none", "fixed", "optimised", "searched")

Picture = Annotated[Path | None, typer.Option(help="What the noise is put on; left out: mid grey.")]
Eps = Annotated[float | None, typer.Option(help="Bound of the noise in pixel units, white = 1; left out: 32/255.")]
Text = Annotated[
    str | None,
    typer.Option(
        help="Safety text before every question (\"\" for none); left out: AdaShield-S's, or the model's own."
    ),
]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Another setting, NAME=VALUE. Repeatable.")]


def uniguard(
    model: ModelOptions,
    loop: LoopOptions,
    processes: ProcessOptions,
    out: Out = Path("out/uniguard"),
    corpus: Annotated[
        Path | None,
        typer.Option(help="Text file of harmful sentences, one a line; left out: the mild one of a model that ships."),
    ] = None,
    picture: Picture = None,
    eps: Eps = None,
    text: Text = None,
    text_part: Annotated[
        str, typer.Option(help="UniGuard's own text: none, fixed, optimised (as published) or searched.")
    ] = "none",
    with_text: Annotated[bool, typer.Option("--with-text", help="Train with --text in the question.")] = False,
    text_tokens: Annotated[int | None, typer.Option(help="Length of the searched text; left out: 16.")] = None,
    candidates: Annotated[
        int | None, typer.Option(help="Of the search: tokens tried a position; left out: 100.")
    ] = None,
    sweeps: Annotated[
        int | None, typer.Option(help="Of the search: how often each position is tried; left out: 50.")
    ] = None,
    resume: Resume = True,
    seed: Seed = 0,
) -> None:
    """UniGuard: train noise that makes harmful sentences unlikely, with a text beside it or without."""
    from davsp.defenses.uniguard import EPS, FIXED, SearchSettings, train_uniguard
    from davsp.embedded import corpus as embedded
    from davsp.query import open_picture
    from davsp.training.sentences import read_sentences

    shipped = is_shipped(model.name)
    search = {"text_tokens": text_tokens, "candidates": candidates, "sweeps": sweeps}
    search = {name: value for name, value in search.items() if value is not None}
    _check_text_part(text_part, search, shipped)
    if corpus is None and not shipped:
        raise DavspError("--corpus is missing; give a text file of harmful sentences, one a line.")
    model = in_processes(processes, model)
    settings = _loop_settings(loop, shipped, seed, likely=False)
    search_settings = settings_of(SearchSettings, {"seed": seed} | search)
    pictures = [open_picture(picture)] if picture else []
    if corpus:
        sentences = read_sentences(corpus)
        if not pictures:
            say(
                "note: without --picture the noise is trained on mid grey; UniGuard's own is an attack picture of Qi et al."
            )
    else:
        sentences, attacked = embedded.corpus(seed)
        pictures = pictures or attacked
    noise = train_uniguard(
        load_lvlm(model), sentences, out / "training", pictures=pictures, text=_before(text, shipped), eps=EPS if eps is None else eps,
        settings=settings, resume=resume, text_part=cast(Any, text_part), with_text=with_text,
        fixed=embedded.UNIGUARD_TEXT if shipped else FIXED, search=search_settings,
    )  # fmt: skip
    _save(noise, "uniguard", out)


def _check_text_part(text_part: str, search: dict[str, Any], shipped: bool) -> None:
    """Raise DavspError if the text part is unknown or not in the model's words, or if options of the search go without it."""
    if text_part not in TEXT_PARTS:
        raise DavspError(f"--text-part is {', '.join(TEXT_PARTS[:-1])} or {TEXT_PARTS[-1]}, not {text_part!r}.")
    if text_part == "optimised" and shipped:
        raise DavspError("--text-part optimised is in the tokens of LLaVA, which this model lacks; take searched.")
    if text_part != "searched" and search:
        raise DavspError(f"--{next(iter(search)).replace('_', '-')} is for --text-part searched; leave it out.")


def esiii(
    model: ModelOptions,
    loop: LoopOptions,
    processes: ProcessOptions,
    out: Out = Path("out/esiii"),
    corpus: Annotated[
        Path | None, typer.Option(help="Text file of your own safety sentences, one a line; left out: the method's.")
    ] = None,
    picture: Picture = None,
    eps: Eps = None,
    text: Text = None,
    resume: Resume = True,
    seed: Seed = 0,
) -> None:
    """ESIII-style: train noise that makes safety sentences likely."""
    from davsp.defenses.esiii import QUESTION, SENTENCES, train_esiii
    from davsp.defenses.uniguard import EPS
    from davsp.embedded import corpus as embedded
    from davsp.query import open_picture
    from davsp.training.sentences import read_sentences

    shipped = is_shipped(model.name)
    model = in_processes(processes, model)
    settings = _loop_settings(loop, shipped, seed, likely=True)
    sentences = read_sentences(corpus) if corpus else list(embedded.SAFETY_SENTENCES if shipped else SENTENCES)
    pictures = [open_picture(picture)] if picture else []
    noise = train_esiii(
        load_lvlm(model), out / "training", sentences=sentences, question=embedded.QUESTION if shipped else QUESTION,
        pictures=pictures, text=_before(text, shipped), eps=EPS if eps is None else eps, settings=settings, resume=resume,
    )  # fmt: skip
    _save(noise, "esiii", out)


def pat(
    model: ModelOptions,
    data: DataOptions,
    processes: ProcessOptions,
    out: Out = Path("out/pat"),
    text: Text = None,
    refusal: Annotated[str | None, typer.Option(help="The answer wanted for malicious queries.")] = None,
    steps: Annotated[int | None, typer.Option(help="How many tokens are changed, one a step.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Candidates in memory at a time.")] = None,
    candidates: Annotated[int | None, typer.Option(help="Changes tried a step.")] = None,
    sets: Sets = None,
    resume: Resume = True,
    seed: Seed = 0,
) -> None:
    """PAT: search tokens that stand before the question, with the picture present."""
    from davsp.defenses.pat import PatSettings, train_pat
    from davsp.embedded.recipes import TOKENS
    from davsp.runtime import parallel

    shipped = is_shipped(model.name)
    options = {"refusal": refusal, "steps": steps, "batch_size": batch_size, "candidates": candidates}
    options = {name: value for name, value in options.items() if value is not None}
    recipe = TOKENS if shipped else {}
    settings = settings_of(PatSettings, recipe | {"seed": seed} | options | _settings(sets, PatSettings))
    model = in_processes(processes, model)
    malicious, benign, _ = both_classes(data, "train", model.name, seed)
    console = terminal()
    tokens = train_pat(
        load_lvlm(model), malicious, benign, _before(text, shipped), settings, out / "training", resume, console
    )
    if parallel.rank() > 0:
        return
    tokens.save(out)
    print(f"saved to {out}: the tokens are {tokens.control!r}; `davsp eval --defense pat={out}` measures them")


def adashield_a(
    model: ModelOptions,
    data: MaliciousOptions,
    defender: DefenderOptions,
    out: Out = Path("out/adashield-a"),
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a CLIP; left out: openai/clip-vit-base-patch32, or the model's own features."
        ),
    ] = None,
    trust_env: TrustEnv = False,
    sets: Sets = None,
    resume: Resume = True,
    seed: Seed = 0,
) -> None:
    """AdaShield-A: refine a pool of defense prompts, of which each query fetches one."""
    from davsp.defenses.adashield_a import RefineSettings, make_pool
    from davsp.defenses.adashield_a.features import CLIP, ClipEncoder, LVLMEncoder
    from davsp.embedded.phrases import PhraseDefender
    from davsp.embedded.recipes import POOL

    shipped = is_shipped(model.name)
    if shipped and defender.defender:
        raise DavspError(
            "--defender writes words that this model lacks; leave it out, and a grammar of its phrases takes its place."
        )
    server = chat_defender(defender, trust_env)
    if not shipped and not server:
        raise DavspError("--defender is missing; name a text model, and its server by --defender-url.")
    settings = settings_of(RefineSettings, (POOL if shipped else {}) | {"seed": seed} | _settings(sets, RefineSettings))
    queries = split_queries(data, "train")
    if queries is None:
        protocol = None if data.malicious else embedded_protocol(model.name, seed)
        malicious = queries_at(
            data.malicious, protocol.train_malicious if protocol else None, "--malicious", data.allow_outside
        )
    else:
        malicious = queries[0]
    lvlm = load_lvlm(model)
    features = LVLMEncoder(lvlm) if shipped and not encoder else ClipEncoder(encoder or CLIP, device=lvlm.device)
    pool = make_pool(
        lvlm, malicious, server or PhraseDefender(), features, settings, out / "training", resume, terminal()
    )
    pool.save(out)
    say(pool.summary())
    print(f"saved to {out}: `davsp info {out}` prints the pool, `davsp eval --defense adashield-a={out}` measures it")


def chat_defender(options: DefenderOptions, trust_env: bool) -> "ChatDefender | None":
    """AdaShield-A's defender behind a server; None if none is named.

    Raises:
        DavspError: a server or a key without the model, or what the defender raises.
    """
    from davsp.defenses.adashield_a import ChatDefender

    if options.defender is None:
        if options.defender_url or options.defender_key_env:
            raise DavspError("--defender-url and --defender-key-env go with --defender.")
        return None
    return ChatDefender(options.defender, options.defender_url, options.defender_key_env, trust_env=trust_env)


def _before(text: str | None, shipped: bool) -> str:
    """The text before every question: as given; else the model's own if it ships, AdaShield-S's in DAVSP's wording for others."""
    from davsp.defenses.adashield_s import DAVSP

    return safety_text(text, shipped) if shipped or text is not None else DAVSP


def _loop_settings(loop: LoopOptions, shipped: bool, seed: int, likely: bool) -> Any:
    """Of noise trained on sentences: the options, on a small budget for the models that ship."""
    from davsp.embedded.recipes import NOISE
    from davsp.training.settings import SentenceSettings

    recipe = NOISE if shipped else {}
    return settings_of(SentenceSettings, {"likely": likely, "seed": seed} | recipe | chosen(loop))


def _save(noise: "Prompt", method: str, out: Path) -> None:
    from davsp.runtime import parallel

    if parallel.rank() == 0:
        noise.save_pretrained(out)
        print(f"saved to {out}: noise.safetensors is the noise; `davsp eval --defense {method}={out}` measures it")


def _settings(sets: list[str] | None, kind: Any) -> dict[str, Any]:
    """NAME=VALUE of --set; "none" is None."""
    settings: dict[str, Any] = {}
    for setting in sets or []:
        name, equals, value = setting.partition("=")
        if not equals or name not in kind.model_fields:
            raise DavspError(
                f"--set {setting!r} is not known: give NAME=VALUE, NAME one of {', '.join(kind.model_fields)}."
            )
        settings[name] = None if value == "none" else value
    return settings


app = typer.Typer(no_args_is_help=True, help="Train a method that the paper compares with DAVSP.")
add(app, uniguard)
add(app, esiii)
add(app, pat)
add(app, adashield_a, "adashield-a")


def from_train(arguments: list[str]) -> list[str]:
    """`train --method X …`, the form of releases before, as the command of today; all other arguments as they are.

    Raises:
        DavspError: no such method.
    """
    if arguments[:1] != ["train"]:
        return arguments
    rest, method = [], None
    options = iter(arguments[1:])
    for option in options:
        name, equals, value = option.partition("=")
        if name == "--method":
            method = value if equals else next(options, "")
        else:
            rest.append(option)
    if method is None:
        return arguments
    known = ("davsp", "uniguard", "esiii", "pat", "adashield-a")
    if method not in known:
        raise DavspError(f"--method is {', '.join(known[:-1])} or {known[-1]}, not {method!r}.")
    if not any(option.partition("=")[0] == "--out" for option in rest):
        rest += ["--out", "out/prompt"]  # where the old form wrote
    command = ["train"] if method == "davsp" else ["baseline", method]
    say(
        f"note: `davsp train --method {method}` is now `davsp {shlex.join([*command, *rest])}`; the old form ends with the next release."
    )
    return [*command, *rest]
