"""The command line: parse, call the Python API, print. Heavy imports stay inside the commands, so that help is quick."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from davsp.errors import DavspError, Interrupted

if TYPE_CHECKING:
    from davsp.defenses import Defense
    from davsp.embedded.data import Protocol
    from davsp.lvlm import LVLM
    from davsp.query import Query

STOPPED = (
    "stopped; what was finished is kept (stages of demo, checkpoints of train, answers of eval): "
    "give the same command again to go on from there."
)


class Commands(TyperGroup):
    """All commands; Ctrl-C in any of them says how to go on, where typer would end without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted(STOPPED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Visual safety prompts: a trained picture frame that keeps a frozen vision-language model safe (DAVSP).",
)
mini = typer.Typer(no_args_is_help=True, help="The small vision-language model that ships: how it is made, its data.")
app.add_typer(mini, name="mini")

Model = Annotated[str | None, typer.Option(help="Folder or hub id of the LVLM; left out: the embedded davsp-mini.")]
Revision = Annotated[str | None, typer.Option(help="Hub branch, tag or commit of the model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto; left out: a GPU if there is one.")]
Malicious = Annotated[
    Path | None, typer.Option(help="Folder or .jsonl of malicious queries; left out: the embedded protocol's.")
]
Benign = Annotated[
    Path | None, typer.Option(help="Folder or .jsonl of benign queries; left out: the embedded protocol's.")
]
Out = Annotated[Path, typer.Option(help="Folder to write into.")]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.")]


def main() -> None:
    """Entry point: one sentence and exit code 2 for what the user can mend, 130 for Ctrl-C."""
    try:
        app(standalone_mode=True)
    except Interrupted as stop:
        _say(f"{stop}")
        sys.exit(130)
    except DavspError as error:
        _say(f"davsp: {error}")
        sys.exit(2)
    except OSError as error:  # a full disk, a folder without permission
        _say(
            f"davsp: {error.filename or 'a file'} cannot be used ({error.strerror}); choose another folder or free space."
        )
        sys.exit(2)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@app.command()
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


@app.command()
def vector(
    out: Out = Path("out/vector"),
    model: Model = None,
    malicious: Malicious = None,
    benign: Benign = None,
    held_malicious: Annotated[
        Path | None, typer.Option(help="Held-out malicious queries, to choose the layer by.")
    ] = None,
    held_benign: Annotated[Path | None, typer.Option(help="Held-out benign queries.")] = None,
    text: Annotated[str | None, typer.Option(help='Safety text before every question ("" for none).')] = None,
    layer: Annotated[int | None, typer.Option(help="Use this layer, whatever the sweep says.")] = None,
    revision: Revision = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Fit the harmfulness vector at every layer, sweep the layers on held-out queries, choose one and its margins."""
    from davsp.files import write_bytes
    from davsp.layerplot import layer_plot
    from davsp.vector import HarmfulnessVector

    if (held_malicious is None) != (held_benign is None):
        raise DavspError("--held-malicious and --held-benign go together; give both or neither.")
    lvlm, p = _lvlm(model, revision, device), _protocol(model, malicious, benign, seed)
    fitting = (
        _queries(malicious, p.vector_malicious if p else None, "--malicious"),
        _queries(benign, p.vector_benign if p else None, "--benign"),
    )
    if layer is not None:
        lvlm.check_layer(layer)
    text = _text(text, p is not None)
    found = HarmfulnessVector.fit(lvlm, *fitting, text=text)
    held = None
    if held_malicious and held_benign:
        held = _queries(held_malicious, None, ""), _queries(held_benign, None, "")
    elif p:
        held = p.sweep_malicious, p.sweep_benign
    if held:
        found.sweep(lvlm, *held, text=text)
    else:
        _say("no held-out queries: the layer is chosen on the fitting set, which flatters it.")
    if layer is not None:
        found.use_layer(layer)
    found.save(out)
    data = "held-out queries" if held else "fitting set"
    write_bytes(out / "layers.png", layer_plot(found.by_layer(), found.layer, data))
    _print_layers(found)
    print(f"layer {found.layer}, margins {found.mu_plus:+.3f} / {found.mu_minus:+.3f}; written to {out}")


@app.command()
def train(
    out: Out = Path("out/prompt"),
    vector: Annotated[Path | None, typer.Option(help="Folder that `davsp vector` wrote.")] = None,
    model: Model = None,
    malicious: Malicious = None,
    benign: Benign = None,
    padding: Annotated[
        int | None, typer.Option(help="Border width p in pixels; left out: a twelfth of the canvas.")
    ] = None,
    kind: Annotated[str, typer.Option(help="border or additive.")] = "border",
    text: Annotated[str | None, typer.Option(help='Safety text before every question ("" for none).')] = None,
    refusal: Annotated[str | None, typer.Option(help="The answer wanted for malicious queries.")] = None,
    steps: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    optimizer: Annotated[str | None, typer.Option(help="sign or adam.")] = None,
    lr: Annotated[float | None, typer.Option(help="Step in pixel units, white = 1.")] = None,
    lam: Annotated[float | None, typer.Option(help="Weight of the answer cross-entropy.")] = None,
    objective: Annotated[str | None, typer.Option(help="both, projection or answer.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer of the projection; left out: the vector's.")] = None,
    mu_plus: Annotated[float | None, typer.Option(help="Margin of malicious queries; left out: the vector's.")] = None,
    mu_minus: Annotated[float | None, typer.Option(help="Margin of benign queries; left out: the vector's.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = True,
    revision: Revision = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Train a visual safety prompt and save it as a folder with an 8-bit picture."""
    from davsp import embedded
    from davsp.experiments.demo import SETTINGS
    from davsp.prompts import AdditiveNoise, VisualSafetyPrompt
    from davsp.training import TrainSettings
    from davsp.training import train as run
    from davsp.vector import HarmfulnessVector

    if kind not in ("border", "additive"):
        raise DavspError(f"--kind is border or additive, not {kind!r}.")
    lvlm, p = _lvlm(model, revision, device), _protocol(model, malicious, benign, seed)
    text = _text(text, p is not None)
    found = HarmfulnessVector.load(vector) if vector else None
    if found is None and p is None:
        raise DavspError("--vector is needed for your own data; make one with `davsp vector`.")
    if found is not None:
        found.check(lvlm)
        _compare_texts(found, text, "this training puts")
    if kind == "additive":
        start: Any = AdditiveNoise.create(lvlm.canvas, text=text)
    else:
        start = VisualSafetyPrompt.create(
            lvlm.canvas, max(1, lvlm.canvas // 12) if padding is None else padding, text=text
        )
    if found is None and p is not None:
        found = HarmfulnessVector.fit(lvlm, p.vector_malicious, p.vector_benign, text=text)
        found.sweep(lvlm, p.sweep_malicious, p.sweep_benign, text=text)
    assert found is not None
    given: dict[str, Any] = {
        "steps": steps, "batch_size": batch_size, "optimizer": optimizer, "lr": lr, "lam": lam, "objective": objective,
        "layer": layer, "mu_plus": mu_plus, "mu_minus": mu_minus, "seed": seed,
        "refusal": embedded.REFUSAL if refusal is None and p else refusal,
    }  # fmt: skip
    base = SETTINGS.model_dump() if p else {}
    settings = _settings(TrainSettings, base | {k: v for k, v in given.items() if v is not None})
    bad, good = (
        _queries(malicious, p.train_malicious if p else None, "--malicious"),
        _queries(benign, p.train_benign if p else None, "--benign"),
    )
    probe = [*p.sweep_malicious, *p.sweep_benign] if p else None
    trained = run(lvlm, start, bad, good, found, settings, out / "training", resume=resume, probe=probe)
    trained.save_pretrained(out)
    what = "vsp.png is the prompt" if kind == "border" else "noise.safetensors is the noise"
    print(f"saved to {out}: {what}; `davsp eval --prompt {out}` measures it")


@app.command("eval")
def evaluate_(
    prompt: Annotated[
        Path | None, typer.Option(help="Folder or hub id of a prompt: adds the row davsp, or additive for noise.")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Folder or .jsonl of queries; left out: the embedded test.")
    ] = None,
    out: Out = Path("out/eval"),
    model: Model = None,
    text: Annotated[
        str | None, typer.Option(help='Safety text of the row safety-text ("" leaves the row out).')
    ] = None,
    vector: Annotated[
        Path | None, typer.Option(help="Folder of a vector: records the projection of every answer.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first queries of each benchmark.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    revision: Revision = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Answer a test set without and with the prompt; rates with 95 % intervals, paired with No Defense."""
    from rich.console import Console

    from davsp.defenses import NoDefense, SafetyText, VisualPrompt
    from davsp.evaluation import evaluate
    from davsp.prompts import load_prompt
    from davsp.report.terminal import print_table
    from davsp.vector import HarmfulnessVector

    lvlm = _lvlm(model, revision, device)
    test = _queries(queries, None if queries else _embedded(model, seed).test, "--queries")
    if limit:
        test = _first(test, limit)
    defenses: dict[str, Defense] = {"none": NoDefense()}
    if text := _text(text, queries is None):
        defenses["safety-text"] = SafetyText(text)
    direction = HarmfulnessVector.load(vector) if vector else None
    if direction:
        direction.check(lvlm)
    if prompt:
        loaded = load_prompt(prompt)
        loaded.check(lvlm)
        name = "davsp" if loaded.kind == "border" else loaded.kind
        defenses[name] = VisualPrompt(loaded, name)
        if direction:
            _compare_texts(direction, loaded.text, "the prompt puts")
    found = evaluate(
        lvlm, defenses, test, out, direction,
        max_new_tokens=max_new_tokens, seed=seed, console=Console(stderr=True),
    )  # fmt: skip
    print_table(Console(), found.rows)
    print(f"answers, verdicts and metrics.json are in {out}")


@app.command()
def apply(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    prompt: Annotated[Path, typer.Option(help="Folder or hub id of a prompt.")],
    out: Annotated[Path, typer.Option(help="Where to write the defended canvas; must end in .png.")] = Path(
        "out/defended.png"
    ),
) -> None:
    """Put a prompt around a picture and write the finished canvas as a lossless PNG."""
    import io

    from davsp.files import write_bytes
    from davsp.prompts import load_prompt
    from davsp.query import open_picture

    if out.suffix.lower() != ".png":
        raise DavspError(f"--out {out} must end in .png: other formats would change the border's pixels.")
    loaded, buffer = load_prompt(prompt), io.BytesIO()
    loaded.image(open_picture(image)).save(buffer, "PNG")
    write_bytes(out, buffer.getvalue())
    print(f"{out}: {loaded.canvas} x {loaded.canvas} pixels; ask with this text before the question: {loaded.text!r}")


@app.command()
def info(prompt: Annotated[Path, typer.Argument(help="Folder or hub id of a prompt.")]) -> None:
    """What a prompt is: model, sizes, layer, margins, text, data hashes, figures. Checks the files against each other."""
    from rich.console import Console
    from rich.table import Table

    from davsp.prompts import load_prompt

    loaded = load_prompt(prompt)
    table = Table(show_header=False, box=None)
    for name, value in loaded.config.items():
        if isinstance(value, dict):
            for inner, v in value.items():
                table.add_row(f"{name}.{inner}", f"{v:.4g}" if isinstance(v, float) else str(v))
        else:
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if loaded.kind == "border":
        print("files agree: configuration, tensor and picture are of one prompt, every value in [0, 1]")
    else:
        print("files agree: configuration and tensor are of one prompt, every value within eps")


@mini.command("train")
def mini_train(
    out: Out = Path("out/mini"),
    stage: Annotated[
        str | None,
        typer.Option(help="Only tower, words, read, place, bridge, joint, skills or card; left out: what is missing."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where the finished model goes; left out: OUT/davsp-mini.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Seed = 0,
    start: Annotated[
        Path | None, typer.Option(help="A finished davsp-mini: only the last stage is run, from its weights.")
    ] = None,
) -> None:
    """Train davsp-mini from nothing, in resumable stages, measure it and write its card."""
    from davsp.embedded.make import make
    from davsp.lvlm import check_device

    check_device(device)
    make(out, folder or out / "davsp-mini", stage, device, seed, start)


@mini.command("data")
def mini_data(out: Out = Path("out/data"), seed: Seed = 0) -> None:
    """Write the embedded protocol as folders of queries, in the form in which your own data is read."""
    from dataclasses import fields

    from davsp.dataset import save_queries
    from davsp.embedded.data import protocol

    drawn = protocol(seed)
    for field in fields(drawn):
        save_queries(out / field.name, getattr(drawn, field.name))
        print(f"{out / field.name}: {len(getattr(drawn, field.name))} queries")


# -- shared ------------------------------------------------------------------------------------------------------------


def _lvlm(model: str | None, revision: str | None, device: str | None) -> "LVLM":
    from davsp import embedded
    from davsp.lvlm import LVLM

    if model is None:
        return embedded.load(device_map=device)
    return LVLM.from_pretrained(model, revision=revision, device_map=device)


def _protocol(model: str | None, malicious: Path | None, benign: Path | None, seed: int) -> "Protocol | None":
    """The embedded protocol, if no data was given; both classes must come from one place."""
    if (malicious is None) != (benign is None):
        missing = "--malicious" if malicious is None else "--benign"
        raise DavspError(f"{missing} is missing: both classes are needed, or neither for the embedded data.")
    return None if malicious else _embedded(model, seed)


def _embedded(model: str | None, seed: int) -> "Protocol":
    from davsp import embedded

    if model is not None and not _is_mini(Path(model)):
        raise DavspError(f"the embedded data is for davsp-mini, not for {model}; give your own queries.")
    return embedded.protocol(seed)


def _is_mini(folder: Path) -> bool:
    """Whether a folder holds a davsp-mini: its canvas, and a vocabulary as large as the embedded world's."""
    from davsp.embedded import draw, words
    from davsp.files import read_json

    if not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    parts = [config.get(name) if isinstance(config, dict) else None for name in ("vision_config", "text_config")]
    vision, text = (part if isinstance(part, dict) else {} for part in parts)
    return (vision.get("image_size"), text.get("vocab_size")) == (draw.SIDE, len(words.vocabulary()))


def _compare_texts(vector: Any, text: str, who: str) -> None:
    """Say so if a vector was fitted with another text before the questions; its margins may then not fit."""
    if vector.text != text:
        _say(f"note: the vector was fitted with the text {vector.text!r} before every question; {who} {text!r} there.")


def _queries(path: Path | None, otherwise: "list[Query] | None", option: str) -> "list[Query]":
    from davsp.dataset import load_queries

    if path is not None:
        return load_queries(path)
    if otherwise is None:
        raise DavspError(f"{option} is missing; give a folder or .jsonl of queries.")
    return otherwise


def _text(text: str | None, own: bool) -> str:
    """The safety text: as given; else the embedded model's for its own data, none for a user's."""
    from davsp import embedded

    return text if text is not None else embedded.SAFETY_TEXT if own else ""


def _first(queries: "list[Query]", limit: int) -> "list[Query]":
    seen: dict[tuple[str, str], int] = {}
    kept = []
    for query in queries:
        key = (query.benchmark, query.category if query.label == "benign" else "")
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= limit:
            kept.append(query)
    return kept


def _settings(cls: type, values: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    try:
        return cls(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise DavspError(f"{option} {first['input']!r} is not possible: {first['msg'].lower()}.") from error


def _print_layers(vector: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "AUROC", "malicious", "benign", "d'", title="harmfulness vector, held-out queries")
    for row in vector.table:
        mark = "bold" if int(row["layer"]) == vector.layer else ""
        cells = [f"{row['layer']:.0f}", *(f"{row[k]:.3f}" for k in ("auroc", "mean_malicious", "mean_benign", "gap"))]
        table.add_row(*cells, style=mark)
    if vector.table:
        Console().print(table)


if __name__ == "__main__":
    main()
