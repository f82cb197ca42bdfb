"""`davsp demo`, `davsp vector` and `davsp train`: the road to a prompt. The paper's comparison: `cli.baseline`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from davsp.cli.canaries import Canaries, describe, own_queries, try_canaries
from davsp.cli.engine import EngineOptions, StatesOptions, lvlm_of, served_states, server_of
from davsp.cli.groups import chosen
from davsp.cli.inputs import (
    ask_as_published,
    default_target,
    direction_of,
    in_processes,
    is_shipped,
    load_lvlm,
    published,
    safety_text,
    say,
    say_where,
    settings_of,
)
from davsp.cli.options import (
    DataOptions,
    LoopOptions,
    ModelOptions,
    Out,
    ProcessOptions,
    Recipe,
    RequestOptions,
    Resume,
    Seed,
)
from davsp.cli.testset import both_classes, queries_at
from davsp.errors import DavspError

if TYPE_CHECKING:
    from davsp.lvlm import LVLM
    from davsp.prompts import Prompt
    from davsp.query import Query


@dataclass(frozen=True)
class LossOptions:
    """What is minimised; what is left out stays as the recipe has it, or as the vector says."""

    panel: ClassVar[str] = "What is minimised"
    refusal: Annotated[str | None, typer.Option(help="The answer wanted for malicious queries.")] = None
    lam: Annotated[float | None, typer.Option(help="Weight of the answer cross-entropy.")] = None
    objective: Annotated[str | None, typer.Option(help="both, projection or answer.")] = None
    layer: Annotated[int | None, typer.Option(help="Layer of the projection; left out: the vector's.")] = None
    mu_plus: Annotated[float | None, typer.Option(help="Margin of malicious queries; left out: the vector's.")] = None
    mu_minus: Annotated[float | None, typer.Option(help="Margin of benign queries; left out: the vector's.")] = None
    benign_share: Annotated[
        float | None, typer.Option(help="Share of a batch's rows that are benign; left out: 0.5.")
    ] = None
    malicious_answer_share: Annotated[
        float | None,
        typer.Option(
            help="Share of malicious rows that carry the refusal in both; left out: 0.05, or 0.25 for the models that ship."
        ),
    ] = None


@dataclass(frozen=True)
class HardeningOptions:
    """Whom and what the prompt is to withstand."""

    panel: ClassVar[str] = "What the prompt is to withstand"
    augment: Annotated[
        str | None,
        typer.Option(
            help="Changes on the way to the model that the prompt is to survive, with commas: shift, resize, jpeg, crop, gamma."
        ),
    ] = None
    adversarial: Annotated[
        int | None,
        typer.Option(
            help="Levels of 255 by which an attacker changes the malicious pictures of every step, to a prompt that is to hold against him."
        ),
    ] = None
    adversarial_steps: Annotated[
        int | None, typer.Option(help="His gradients a picture; left out: 3. Needs --adversarial.")
    ] = None
    adversarial_target: Annotated[
        str | None,
        typer.Option(
            help="Beginning of an answer that he makes likely, or deed for the whole answer that does what each query asks for; left out: he raises the loss that the prompt lowers. Needs --adversarial."
        ),
    ] = None

    def __post_init__(self) -> None:
        if not self.adversarial and (self.adversarial_steps or self.adversarial_target):
            raise DavspError(
                "--adversarial-steps and --adversarial-target are of an attacker; give --adversarial, too."
            )


def demo(
    out: Out = Path("out/demo"),
    seed: Seed = 0,
    redact: Annotated[
        bool | None,
        typer.Option(
            "--redact/--show-unsafe",
            help="Compliant answers in the report; left out: shown, as davsp-mini's are harmless by construction.",
        ),
    ] = None,
) -> None:
    """Train a prompt on the embedded model and show, with intervals and pictures, what it does (about five minutes)."""
    from davsp.experiments.demo import run_demo

    run_demo(out, seed=seed, show_unsafe=None if redact is None else not redact)


def vector(
    model: ModelOptions,
    data: DataOptions,
    engine: EngineOptions,
    states: StatesOptions,
    requests: RequestOptions,
    processes: ProcessOptions,
    out: Out = Path("out/vector"),
    held_malicious: Annotated[
        Path | None, typer.Option(help="Held-out malicious queries, to choose the layer by.")
    ] = None,
    held_benign: Annotated[Path | None, typer.Option(help="Held-out benign queries.")] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help='Safety text before every question ("" for none); left out: the own one of a model that ships.'
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Use this layer, whatever the sweep says.")] = None,
    recipe: Recipe = None,
    seed: Seed = 0,
) -> None:
    """Fit the harmfulness vector at every layer, sweep the layers on held-out queries, choose one and its margins."""
    from contextlib import nullcontext

    from davsp.report.layerplot import layer_plot
    from davsp.runtime import parallel
    from davsp.runtime.files import alone, write_bytes
    from davsp.training.recipe import LAYER, is_theirs
    from davsp.vector import HarmfulnessVector

    if (held_malicious is None) != (held_benign is None):
        raise DavspError("--held-malicious and --held-benign go together; give both or neither.")
    as_published, server = published(recipe), server_of(engine, model, processes.num_processes)
    if server and as_published:
        raise DavspError("--recipe published goes with a model loaded here: a server asks by its own template.")
    served = served_states(states, server)
    model = in_processes(processes, model)
    name = server[0] if server else model.name
    if layer is not None and served and layer not in served.layers:
        raise DavspError(
            f"--layer {layer} is not among --states-layers {states.states_layers}; take one that the server writes."
        )
    malicious, benign, protocol = both_classes(data, "vector", name, seed)
    held = (protocol.sweep_malicious, protocol.sweep_benign) if protocol else None
    if held_malicious and held_benign:
        held = (
            queries_at(held_malicious, None, "--held-malicious", data.allow_outside),
            queries_at(held_benign, None, "--held-benign", data.allow_outside),
        )
    text = _text(text, is_shipped(name), as_published)
    lvlm: Any = lvlm_of(model, server, engine, requests, served)
    if as_published:
        ask_as_published(lvlm, model.template)
        layer = LAYER if layer is None and is_theirs(lvlm) else layer
    if not server:
        say_where(lvlm)
        if layer is not None:
            lvlm.check_layer(layer)
    with nullcontext() if parallel.rank() > 0 else alone(out):  # the first process writes for all
        fitted = HarmfulnessVector.fit(lvlm, malicious, benign, text=text)
        if held:
            fitted.sweep(lvlm, *held, text=text)
        else:
            say("no held-out queries: the layer is chosen on the fitting set, which flatters it.")
        if layer is not None:
            fitted.use_layer(layer)
        if parallel.rank() > 0:
            return
        fitted.save(out)
        plot = layer_plot(fitted.by_layer(), fitted.layer, "held-out queries" if held else "fitting set")
        write_bytes(out / "layers.png", plot)
    _print_layers(fitted)
    if left_out := [one for one in fitted.left_out if one in lvlm.readable]:
        layers = ", ".join(map(str, left_out))
        say(f"left out, as malicious and benign queries do not differ there: layer {layers}.")
    print(f"layer {fitted.layer}, margins {fitted.mu_plus:+.3f} / {fitted.mu_minus:+.3f}; written to {out}")


def train(
    model: ModelOptions,
    data: DataOptions,
    loop: LoopOptions,
    loss: LossOptions,
    hardening: HardeningOptions,
    processes: ProcessOptions,
    out: Out = Path("out/prompt"),
    vector: Annotated[
        Path | None, typer.Option(help="Folder that `davsp vector` or `davsp import-published` wrote.")
    ] = None,
    padding: Annotated[
        int | None, typer.Option(help="Border width p in pixels; left out: a twelfth of the canvas.")
    ] = None,
    kind: Annotated[str, typer.Option(help="border, or additive for noise all over the picture.")] = "border",
    eps: Annotated[
        float | None, typer.Option(help="Bound of additive noise in pixel units, white = 1; left out: 32/255.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help='Safety text before every question ("" for none); left out: the own one of a model that ships.'
        ),
    ] = None,
    recipe: Recipe = None,
    canaries: Canaries = None,
    resume: Resume = True,
    seed: Seed = 0,
) -> None:
    """Train a visual safety prompt and save it as a folder. The methods that the paper compares: davsp baseline."""
    from davsp import embedded
    from davsp.prompts import VisualSafetyPrompt
    from davsp.runtime import parallel
    from davsp.training import TrainSettings
    from davsp.training import train as run
    from davsp.training.recipe import PUBLISHED, layer_and_margins
    from davsp.training.settings import DEED
    from davsp.vector import HarmfulnessVector

    if kind not in ("border", "additive"):
        raise DavspError(f"--kind is border or additive, not {kind!r}.")
    if kind == "border" and eps is not None:
        raise DavspError("--eps is the bound of noise; give it with --kind additive, or leave it out.")
    if kind == "additive" and canaries is not None:
        raise DavspError("--canaries are of a border; leave them out, or take --kind border.")
    as_published = published(recipe)
    model = in_processes(processes, model)
    shipped = is_shipped(model.name)
    usual = (embedded.SETTINGS.model_dump() if shipped else {}) | (PUBLISHED if as_published else {})
    options = chosen(loop) | chosen(loss) | chosen(hardening) | {"seed": seed}
    if hardening.augment is not None:
        options["augment"] = [change.strip() for change in hardening.augment.split(",")]
    settings = settings_of(TrainSettings, usual | options)  # a value that is not possible is told before any work
    bad, good, protocol = both_classes(data, "train", model.name, seed)
    deeds = _deeds(bad, shipped) if settings.adversarial_target == DEED else None
    own = own_queries(canaries, data.allow_outside)
    if vector is None and protocol is None:
        raise DavspError("--vector is needed for your own data; make one with `davsp vector`.")
    given = HarmfulnessVector.load(vector) if vector else None
    text = _text(text, shipped, as_published)
    lvlm = load_lvlm(model)
    if as_published:
        ask_as_published(lvlm, model.template)
    say_where(lvlm)
    start = _start(lvlm, kind, padding, eps, text, as_published)
    if loss.layer is not None:
        lvlm.check_layer(loss.layer)
    direction = direction_of(given, protocol, lvlm, text, "this training puts")
    if as_published:
        aligned, note = layer_and_margins(lvlm, direction, loss.layer)
        settings = settings_of(TrainSettings, usual | aligned | options)
        if note and loss.mu_plus is None and loss.mu_minus is None:
            say(f"note: {note}.")
    probe = [*protocol.sweep_malicious, *protocol.sweep_benign] if protocol else None
    trained = run(
        lvlm, start, bad, good, direction, settings, out / "training", resume=resume, probe=probe, deeds=deeds
    )  # fmt: skip
    if parallel.rank() > 0:
        return
    trained.save_pretrained(out)
    if isinstance(trained, VisualSafetyPrompt) and (watched := try_canaries(trained, lvlm, own, shipped)):
        watched.save_pretrained(out)
        print(describe(watched))
    what = "vsp.png is the prompt" if kind == "border" else "noise.safetensors is the noise"
    print(f"saved to {out}: {what}; `davsp eval --prompt {out}` measures it")


def _deeds(queries: "list[Query]", shipped: bool) -> list[str]:
    """Of each malicious query the answer that does what it asks for."""
    from davsp.attacks.deeds import wanted

    deeds = [wanted(query, default_target(shipped)) for query in queries]
    for query, deed in zip(queries, deeds, strict=True):
        if deed is None:
            raise DavspError(
                f"--adversarial-target deed: query {query.id} does not say in words what it asks for; give it a context, or another target."
            )
    return [deed for deed in deeds if deed is not None]


def _text(text: str | None, shipped: bool, as_published: bool) -> str:
    """The safety text: as given; else the model's own if it ships, AdaShield's by the published recipe, none for others."""
    from davsp.defenses.adashield_s import DAVSP

    return DAVSP if text is None and as_published and not shipped else safety_text(text, shipped)


def _start(
    lvlm: "LVLM", kind: str, padding: int | None, eps: float | None, text: str, as_published: bool
) -> "Prompt":  # fmt: skip
    """Where the training starts: a grey border, the authors', or no noise yet."""
    from davsp.prompts import AdditiveNoise, VisualSafetyPrompt
    from davsp.training.recipe import border

    if kind == "additive":
        return AdditiveNoise.create(lvlm.canvas, 32 / 255 if eps is None else eps, text=text)
    if as_published:
        return border(lvlm, padding, text)
    width = max(1, lvlm.canvas // 12) if padding is None else padding
    return VisualSafetyPrompt.create(lvlm.canvas, width, text=text)


def _print_layers(vector: Any) -> None:
    from rich.console import Console

    from davsp.runtime.table import TextTable

    table = TextTable("layer", "AUROC", "malicious", "benign", "d'", title="harmfulness vector, held-out queries")
    for row in vector.table:
        mark = "bold" if int(row["layer"]) == vector.layer else ""
        cells = [f"{row['layer']:.0f}", *(f"{row[k]:.3f}" for k in ("auroc", "mean_malicious", "mean_benign", "gap"))]
        table.add_row(*cells, style=mark)
    if vector.table:
        table.print(Console())
