"""`davsp demo`, `davsp vector` and `davsp train`: the road to a prompt (`train --method`: see `cli.sentences`)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from davsp.cli import sentences, texts
from davsp.cli.inputs import compare_texts, in_processes, load_lvlm, own_protocol, queries_at, safety_text, say
from davsp.cli.options import (
    Benchmark,
    Benign,
    Canvas,
    Device,
    Dtype,
    Malicious,
    Model,
    Out,
    Processes,
    Quantization,
    Revision,
    Seed,
    SplitFile,
)
from davsp.cli.testset import from_split
from davsp.errors import DavspError, refused_as

if TYPE_CHECKING:
    from davsp.query import Query


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
    out: Out = Path("out/vector"),
    model: Model = None,
    malicious: Malicious = None,
    benign: Benign = None,
    split: SplitFile = None,
    benchmark: Benchmark = None,
    held_malicious: Annotated[
        Path | None, typer.Option(help="Held-out malicious queries, to choose the layer by.")
    ] = None,
    held_benign: Annotated[Path | None, typer.Option(help="Held-out benign queries.")] = None,
    text: Annotated[str | None, typer.Option(help='Safety text before every question ("" for none).')] = None,
    layer: Annotated[int | None, typer.Option(help="Use this layer, whatever the sweep says.")] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    canvas: Canvas = None,
    seed: Seed = 0,
) -> None:
    """Fit the harmfulness vector at every layer, sweep the layers on held-out queries, choose one and its margins."""
    from davsp.report.layerplot import layer_plot
    from davsp.runtime.files import write_bytes
    from davsp.vector import HarmfulnessVector

    if (held_malicious is None) != (held_benign is None):
        raise DavspError("--held-malicious and --held-benign go together; give both or neither.")
    drawn = _drawn(split, benchmark, "vector", malicious, benign)
    lvlm = load_lvlm(model, revision, device, dtype, quantization, canvas)
    p = None if drawn else own_protocol(model, malicious, benign, seed)
    fitting = drawn or (
        queries_at(malicious, p.vector_malicious if p else None, "--malicious"),
        queries_at(benign, p.vector_benign if p else None, "--benign"),
    )
    if layer is not None:
        lvlm.check_layer(layer)
    text = safety_text(text, p is not None)
    found = HarmfulnessVector.fit(lvlm, *fitting, text=text)
    held = None
    if held_malicious and held_benign:
        held = queries_at(held_malicious, None, ""), queries_at(held_benign, None, "")
    elif p:
        held = p.sweep_malicious, p.sweep_benign
    if held:
        found.sweep(lvlm, *held, text=text)
    else:
        say("no held-out queries: the layer is chosen on the fitting set, which flatters it.")
    if layer is not None:
        found.use_layer(layer)
    found.save(out)
    data = "held-out queries" if held else "fitting set"
    write_bytes(out / "layers.png", layer_plot(found.by_layer(), found.layer, data))
    _print_layers(found)
    print(f"layer {found.layer}, margins {found.mu_plus:+.3f} / {found.mu_minus:+.3f}; written to {out}")


def train(
    out: Out = Path("out/prompt"),
    method: Annotated[
        str,
        typer.Option(
            help="davsp; the paper's comparison: uniguard or esiii (noise trained on sentences), pat (tokens), adashield-a (a pool of prompts)."
        ),
    ] = "davsp",
    vector: Annotated[Path | None, typer.Option(help="Folder that `davsp vector` wrote.")] = None,
    model: Model = None,
    malicious: Malicious = None,
    benign: Benign = None,
    split: SplitFile = None,
    benchmark: Benchmark = None,
    padding: Annotated[
        int | None, typer.Option(help="Border width p in pixels; left out: a twelfth of the canvas.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="border or additive; left out: border.")] = None,
    eps: Annotated[
        float | None, typer.Option(help="Bound of additive noise in pixel units, white = 1; left out: 32/255.")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Text file, one a line: harmful sentences (uniguard) or your own safety sentences (esiii)."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="What uniguard and esiii put the noise on; left out: mid grey.")
    ] = None,
    text_part: Annotated[
        str | None, typer.Option(help="UniGuard's own text: none, fixed, optimised (as published) or searched.")
    ] = None,
    with_text: Annotated[
        bool, typer.Option("--with-text", help="uniguard: train with --text in the question.")
    ] = False,
    text_tokens: Annotated[int | None, typer.Option(help="Length of the searched text; left out: 16.")] = None,
    candidates: Annotated[int | None, typer.Option(help="Tokens tried a position; left out: 100.")] = None,
    sweeps: Annotated[int | None, typer.Option(help="How often each position is tried; left out: 50.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of pat or adashield-a, NAME=VALUE. Repeatable.")
    ] = None,
    defender: Annotated[str | None, typer.Option(help="adashield-a: the text model that writes prompts.")] = None,
    defender_url: Annotated[
        str | None, typer.Option(help="Its OpenAI-compatible server, which sees the model's answers; left out: OpenAI.")
    ] = None,
    defender_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable with its key; left out: OPENAI_API_KEY for OpenAI, no key else."),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="adashield-a: folder or hub id of a CLIP; left out: openai/clip-vit-base-patch32."),
    ] = None,
    text: Annotated[str | None, typer.Option(help='Safety text before every question ("" for none).')] = None,
    refusal: Annotated[str | None, typer.Option(help="The answer wanted for malicious queries.")] = None,
    steps: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Rows in memory at a time; left out: the whole batch.")
    ] = None,
    activation_checkpointing: Annotated[bool, typer.Option(help="Compute activations twice to save memory.")] = False,
    num_processes: Processes = 1,
    optimizer: Annotated[str | None, typer.Option(help="sign or adam.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", "--alpha", help="Step in pixel units, white = 1.")] = None,
    lam: Annotated[float | None, typer.Option(help="Weight of the answer cross-entropy.")] = None,
    objective: Annotated[str | None, typer.Option(help="both, projection or answer.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer of the projection; left out: the vector's.")] = None,
    mu_plus: Annotated[float | None, typer.Option(help="Margin of malicious queries; left out: the vector's.")] = None,
    mu_minus: Annotated[float | None, typer.Option(help="Margin of benign queries; left out: the vector's.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = True,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    canvas: Canvas = None,
    seed: Seed = 0,
) -> None:
    """Train a visual safety prompt, or one of the paper's comparison, and save it as a folder."""
    from davsp import embedded
    from davsp.experiments.demo import SETTINGS
    from davsp.prompts import AdditiveNoise, VisualSafetyPrompt
    from davsp.runtime import parallel
    from davsp.training import TrainSettings
    from davsp.training import train as run
    from davsp.vector import HarmfulnessVector

    if method not in (known := ("davsp", *sentences.METHODS, *texts.METHODS)):
        raise DavspError(f"--method is {', '.join(known[:-1])} or {known[-1]}, not {method!r}.")
    of_texts = {"steps": steps, "batch_size": batch_size, "candidates": candidates, "refusal": refusal}
    asked = texts.Asked(model, text, sets or [], of_texts, defender, defender_url, defender_key_env, encoder)
    not_texts = {
        "--vector": vector, "--padding": padding, "--kind": kind, "--eps": eps, "--corpus": corpus, "--picture": picture,
        "--text-part": text_part, "--with-text": with_text, "--text-tokens": text_tokens, "--sweeps": sweeps, "--lr": lr,
        "--micro-batch": micro_batch, "--activation-checkpointing": activation_checkpointing, "--optimizer": optimizer,
        "--lam": lam, "--objective": objective, "--layer": layer, "--mu-plus": mu_plus, "--mu-minus": mu_minus,
        "--num-processes": num_processes > 1, **({"--benign": benign} if method == "adashield-a" else {}),
    }  # fmt: skip
    texts.check_options(method, not_texts, asked)
    if method in texts.METHODS:
        bad_and_good = _drawn(split, benchmark, "train", malicious, benign)
        if bad_and_good is None:
            q = own_protocol(model, malicious, malicious if method == "adashield-a" else benign, seed)
            bad_and_good = (
                queries_at(malicious, q.train_malicious if q else None, "--malicious"),
                queries_at(benign, q.train_benign if q else [], "--benign"),
            )
        texts.train(
            method, asked, lambda: load_lvlm(model, revision, device, dtype, quantization, canvas), *bad_and_good, out,
            seed, resume,
        )  # fmt: skip
        return
    of_davsp = {
        "--vector": vector, "--malicious": malicious, "--benign": benign, "--split": split, "--benchmark": benchmark,
        "--padding": padding, "--kind": kind, "--refusal": refusal, "--lam": lam, "--objective": objective,
        "--layer": layer, "--mu-plus": mu_plus, "--mu-minus": mu_minus,
    }  # fmt: skip
    of_search = {"--text-tokens": text_tokens, "--candidates": candidates, "--sweeps": sweeps}
    of_uniguard = {"--text-part": text_part, "--with-text": with_text or None, **of_search}
    sentences.refuse(method, of_davsp, {"--corpus": corpus, "--picture": picture}, of_uniguard)
    kind = kind or "border"
    if kind not in ("border", "additive"):
        raise DavspError(f"--kind is border or additive, not {kind!r}.")
    if method == "davsp" and kind == "border" and eps is not None:
        raise DavspError("--eps is the bound of noise; give it with --kind additive, or leave it out.")
    in_processes(num_processes)
    if method != "davsp":
        taken: dict[str, Any] = {
            "steps": steps, "batch_size": batch_size, "micro_batch": micro_batch, "optimizer": optimizer, "lr": lr,
            "activation_checkpointing": activation_checkpointing, "seed": seed,
        }  # fmt: skip
        search = {"text_tokens": text_tokens, "candidates": candidates, "sweeps": sweeps}
        sentences.train(
            method, model, lambda: load_lvlm(model, revision, device, dtype, quantization, canvas), out, corpus, picture,
            text, text_part, with_text, eps, taken, search, resume,
        )  # fmt: skip
        return
    drawn = _drawn(split, benchmark, "train", malicious, benign)
    lvlm = load_lvlm(model, revision, device, dtype, quantization, canvas)
    p = None if drawn else own_protocol(model, malicious, benign, seed)
    text = safety_text(text, p is not None)
    found = HarmfulnessVector.load(vector) if vector else None
    if found is None and p is None:
        raise DavspError("--vector is needed for your own data; make one with `davsp vector`.")
    if found is not None:
        found.check(lvlm)
        compare_texts(found, text, "this training puts")
    if kind == "additive":
        start: Any = AdditiveNoise.create(lvlm.canvas, 32 / 255 if eps is None else eps, text=text)
    else:
        start = VisualSafetyPrompt.create(
            lvlm.canvas, max(1, lvlm.canvas // 12) if padding is None else padding, text=text
        )
    if found is None and p is not None:
        found = HarmfulnessVector.fit(lvlm, p.vector_malicious, p.vector_benign, text=text)
        found.sweep(lvlm, p.sweep_malicious, p.sweep_benign, text=text)
    assert found is not None
    given: dict[str, Any] = {
        "steps": steps, "batch_size": batch_size, "optimizer": optimizer, "lr": lr,
        "micro_batch": micro_batch, "activation_checkpointing": activation_checkpointing, "lam": lam, "objective": objective,
        "layer": layer, "mu_plus": mu_plus, "mu_minus": mu_minus, "seed": seed,
        "refusal": embedded.REFUSAL if refusal is None and p else refusal,
    }  # fmt: skip
    base = SETTINGS.model_dump() if p else {}
    settings = settings_of(TrainSettings, base | {k: v for k, v in given.items() if v is not None})
    bad, good = drawn or (
        queries_at(malicious, p.train_malicious if p else None, "--malicious"),
        queries_at(benign, p.train_benign if p else None, "--benign"),
    )
    probe = [*p.sweep_malicious, *p.sweep_benign] if p else None
    trained = run(lvlm, start, bad, good, found, settings, out / "training", resume=resume, probe=probe)
    if parallel.rank() > 0:
        return
    trained.save_pretrained(out)
    what = "vsp.png is the prompt" if kind == "border" else "noise.safetensors is the noise"
    print(f"saved to {out}: {what}; `davsp eval --prompt {out}` measures it")


def _drawn(
    split: str | None, sets: list[str] | None, kind: str, malicious: Path | None, benign: Path | None
) -> "tuple[list[Query], list[Query]] | None":
    """Malicious and benign queries of a split file, in place of the user's own."""
    if (split or sets) and (malicious or benign):
        raise DavspError("--split takes the place of --malicious and --benign; give one or the other.")
    return from_split(split, sets or [], kind)


def _impossible(field: str, why: str, value: Any) -> str:
    option = field.split(".")[0].replace("_", "-")
    return f"--{option} {value!r} is not possible: {why.lower()}."


def settings_of(cls: type, values: dict[str, Any]) -> Any:
    """Settings from options; a value that is not possible is named by its option."""
    with refused_as(_impossible):
        return cls(**values)


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
