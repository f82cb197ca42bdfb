"""`davsp demo`: from the harmfulness vector to the report, on the LVLM that ships or on any other.

Every stage leaves its result in the output folder with a hash of what it was made from. A second run keeps what
still holds, goes on with what was cut off, and makes anew, saying so, what rests on other inputs.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image
from rich.console import Console
from rich.markup import escape

from davsp import report
from davsp.checkpoint import METRICS
from davsp.defenses import Defense, NoDefense, SafetyText, VisualPrompt
from davsp.embedded.words import REFUSAL
from davsp.errors import DavspError
from davsp.evaluation import Evaluation, evaluate, fingerprint, model_name, queries_hash
from davsp.files import manifest, read_bytes, read_json, read_tensors, save_tensors, write_json
from davsp.files import sha256 as file_hash
from davsp.lvlm import LVLM
from davsp.prompts import AdditiveNoise, Prompt, VisualSafetyPrompt
from davsp.report.cells import find
from davsp.report.html import write_report
from davsp.report.terminal import print_table
from davsp.training import TrainSettings, train
from davsp.vector import HarmfulnessVector

if TYPE_CHECKING:
    from davsp.embedded.data import Protocol

T = TypeVar("T")

SETTINGS = TrainSettings(
    steps=150, optimizer="adam", lr=0.02, schedule="cosine", lam=2.5, malicious_answer_share=0.25, refusal=REFUSAL
)
"""Of the demo and of `davsp train` on the embedded model; the seed is the run's."""


def run_demo(
    out: Path,
    lvlm: LVLM | None = None,
    protocol: "Protocol | None" = None,
    settings: TrainSettings | None = None,
    seed: int = 0,
    *,
    safety_text: str | None = None,
    vector_text: str | None = None,
    padding: int | None = None,
    eps: float = 32 / 255,
    batch_size: int = 32,
    max_new_tokens: int = 48,
    show_unsafe: bool | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Fit the vector, train border and noise, evaluate five rows; write metrics.json, report.html and prompt/.

    Args:
        out: the folder; a run that was stopped goes on in it.
        lvlm: the model; None is the one that ships.
        protocol: the queries; None is the shipped protocol of `seed`.
        settings: of both trainings, so that border and noise differ in nothing but where they stand; None is
            the demo's own.
        seed: of protocol, training and the random border.
        safety_text: put before every question in all rows but the first; None is the one that ships.
        vector_text: the same while the vector is fitted and its layer chosen; None is `safety_text`, as in training.
        padding: width of the border in pixels; None is a twelfth of the canvas, about as in the paper.
        eps: bound of the additive noise.
        batch_size, max_new_tokens: of the evaluation.
        show_unsafe: print compliant answers to malicious queries in the report; None does so for the model that
            ships, whose answers are harmless by construction, and for no other.
        console: where lines and bars go; None is the terminal.

    Returns:
        Responses, verdicts and rows. The prompt that was evaluated is the one in `prompt/`, read back from disk.

    Raises:
        DavspError: see `HarmfulnessVector.fit`, `train`, `evaluate`.
        Interrupted: Ctrl-C; the same call goes on.
    """
    console = console or Console()
    began = time.perf_counter()
    show_unsafe = lvlm is None if show_unsafe is None else show_unsafe
    if lvlm is None or protocol is None or safety_text is None:
        from davsp import embedded

        lvlm = lvlm or embedded.load()
        protocol = protocol or embedded.protocol(seed)
        safety_text = embedded.SAFETY_TEXT if safety_text is None else safety_text
    settings = settings or SETTINGS.model_copy(update={"seed": seed})
    vector_text = safety_text if vector_text is None else vector_text
    padding = padding or round(lvlm.canvas / 12)
    stages = _Stages(out, console)
    stages.line("model", f"{model_name(lvlm)}, {len(protocol.test)} test queries", time.perf_counter() - began)

    vector = _vector(stages, lvlm, protocol, vector_text)
    prompts: dict[str, Prompt] = {
        "davsp": VisualSafetyPrompt.create(lvlm.canvas, padding, text=safety_text),
        "additive": AdditiveNoise.create(lvlm.canvas, eps, text=safety_text),
    }
    trained = {name: _trained(stages, name, start, lvlm, protocol, vector, settings) for name, start in prompts.items()}
    defenses: dict[str, Defense] = {
        "none": NoDefense(),
        "safety-text": SafetyText(safety_text),
        "random-border": VisualPrompt(VisualSafetyPrompt.create(lvlm.canvas, padding, "random", seed, safety_text)),
        "additive": VisualPrompt(trained["additive"]),
        "davsp": VisualPrompt(trained["davsp"]),
    }
    start = time.perf_counter()
    found = evaluate(
        lvlm,
        defenses,
        protocol.test,
        out,
        vector,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        redo=True,
        seed=seed,
        console=console,
    )
    stages.line("evaluate", f"{len(defenses)} defenses", time.perf_counter() - start)
    stages.seconds["evaluate"] = round(sum(r.seconds for answers in found.responses.values() for r in answers), 2)

    start = time.perf_counter()
    _put_figures_on_card(out / "prompt", found, protocol)
    facts = manifest(
        model=model_name(lvlm),
        revision=lvlm.revision,
        weights=fingerprint(lvlm),
        seed=seed,
        settings=settings.model_dump(),
    )
    facts |= {
        "padding": padding,
        "eps": eps,
        "safety_text": safety_text,
        "vector_text": vector_text,
        "stages": stages.seconds,
    }
    facts["test"] = {"queries": len(protocol.test), "sha256": queries_hash(protocol.test)}
    write_json(out / "manifest.json", facts)
    page = report.build(
        model_name(lvlm),
        protocol.test,
        found,
        defenses,
        pictures=_pictures(trained, padding, eps),
        margins=_margins(trained["davsp"], vector),
        sweep=vector.table,
        layer=vector.layer,
        curves={name: _records(out / "train" / name / METRICS) for name in ("davsp", "additive")},
        manifest=facts,
    )
    write_report(out / "report.html", page, show_unsafe)
    stages.line("report", str(out / "report.html"), time.perf_counter() - start)
    print_table(console, found.rows, f"{model_name(lvlm)}, {time.perf_counter() - began:.0f} s in all")
    return found


@dataclass
class _Stages:
    """Results on disk, each with a hash of its inputs; prints a line a stage.

    Attributes:
        seconds: stage -> what it took when it was made, also where it is kept from a run before.
    """

    out: Path
    console: Console

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, inputs: Any, make: Callable[[bool], object], load: Callable[[], T]) -> T:
        """What `load` reads, after `make(resume)` if it is not there or not whole.

        resume is False where the inputs have changed; the folder of the stage's training is deleted then.
        """
        path, wanted = (
            self.out / "stages" / f"{name}.json",
            sha256(json.dumps(inputs, default=str).encode()).hexdigest(),
        )
        known: dict[str, Any] = read_json(path) if path.exists() else {}
        same = bool(known) and known["inputs"] == wanted
        if same and known["done"]:
            try:
                result = load()
            except DavspError as error:
                self.console.print(
                    f"[yellow]{name}: made anew, as what was kept is not whole ({escape(str(error))})[/]"
                )
            else:
                self.line(name, f"kept; it took {known['seconds']:.1f} s", 0.0)
                self.seconds[name] = round(known["seconds"], 2)
                return result
        if not same:
            if known:
                self.console.print(f"[yellow]{name}: made anew, as what it rests on has changed[/]")
            # before the new inputs are noted: a kill in between must not leave a checkpoint of the old ones to go on from
            if (old := self.out / "train" / name).exists():
                shutil.rmtree(old)
        write_json(path, {"inputs": wanted, "done": False})
        start = time.perf_counter()
        make(same)
        result = load()
        seconds = time.perf_counter() - start
        write_json(path, {"inputs": wanted, "done": True, "seconds": seconds})
        self.line(name, "made" if not same else "finished", seconds)
        return result

    def line(self, name: str, note: str, seconds: float) -> None:
        self.seconds[name] = round(seconds, 2)
        self.console.print(f"[bold]{name:<10}[/] {seconds:7.1f} s  {note}", highlight=False)


def _vector(stages: _Stages, lvlm: LVLM, data: "Protocol", text: str) -> HarmfulnessVector:
    """The vector with its layer chosen on held-out queries."""
    folder = stages.out / "vector"
    sets = (data.vector_malicious, data.vector_benign, data.sweep_malicious, data.sweep_benign)

    def make(resume: bool) -> None:
        vector = HarmfulnessVector.fit(
            lvlm, data.vector_malicious, data.vector_benign, text, progress=not stages.console.quiet
        )
        vector.sweep(lvlm, data.sweep_malicious, data.sweep_benign, text, progress=not stages.console.quiet)
        vector.save(folder)

    inputs = [fingerprint(lvlm), text, *(queries_hash(queries) for queries in sets)]
    return stages.run("vector", inputs, make, lambda: HarmfulnessVector.load(folder))


def _trained(
    stages: _Stages,
    name: str,
    start: Prompt,
    lvlm: LVLM,
    data: "Protocol",
    vector: HarmfulnessVector,
    settings: TrainSettings,
) -> Prompt:
    """The trained prompt as it reads back from disk."""
    folder = stages.out / "train" / name

    def make(resume: bool) -> None:
        probe = [*data.sweep_malicious, *data.sweep_benign]
        if resume and folder.exists() and not (folder / METRICS).exists():
            shutil.rmtree(folder)  # a checkpoint without its metrics can't be gone on from
        progress = not stages.console.quiet
        done = train(
            lvlm,
            start,
            data.train_malicious,
            data.train_benign,
            vector,
            settings,
            folder,
            resume,
            progress,
            _pictured(probe),
        )
        _save(done, stages.out)

    kind = {
        "kind": start.kind,
        "text": start.text,
        "padding": getattr(start, "padding", None),
        "eps": getattr(start, "eps", None),
    }
    queries = [
        queries_hash(q) for q in (data.train_malicious, data.train_benign, data.sweep_malicious, data.sweep_benign)
    ]
    inputs = [
        fingerprint(lvlm),
        kind,
        settings.model_dump(),
        file_hash(stages.out / "vector" / "vector.safetensors"),
        *queries,
    ]

    def load() -> Prompt:
        _records(folder / METRICS)  # the report draws them
        return _load(start, stages.out)

    return stages.run(name, inputs, make, load)


def _pictured(queries: list[Any]) -> list[Any]:
    return [q for q in queries if q.image is not None]


def _save(prompt: Prompt, out: Path) -> None:
    if isinstance(prompt, VisualSafetyPrompt):
        prompt.save_pretrained(out / "prompt")
    else:
        save_tensors(out / "additive" / "delta.safetensors", {"delta": prompt.quantised().delta})


def _load(start: Prompt, out: Path) -> Prompt:
    if isinstance(start, VisualSafetyPrompt):
        if not (out / "prompt").is_dir():  # from_pretrained would take the name for one on the hub
            raise DavspError(f"there is no folder {out / 'prompt'}")
        return VisualSafetyPrompt.from_pretrained(out / "prompt")
    assert isinstance(start, AdditiveNoise)
    return AdditiveNoise(read_tensors(out / "additive" / "delta.safetensors")["delta"], start.eps, start.text)


def _put_figures_on_card(folder: Path, found: Evaluation, data: "Protocol") -> None:
    """Save the prompt once more, the same pixels, with what it was measured to do."""
    prompt = VisualSafetyPrompt.from_pretrained(folder)
    wanted = [
        r
        for r in found.rows
        if r["defense"] == "davsp" and r["split"] == "total" and r["metric"] in _ON_CARD and r["n"]
    ]
    figures = {}
    for row in wanted:
        before = find(found.rows, "none", row["benchmark"], "total", row["metric"])
        was = f" (no defense {before['value']:.3f})" if before and before["value"] is not None else ""
        figures[f"{row['metric']} {row['benchmark']}"] = (
            f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]{was}"
        )
    prompt.config["figures"] = prompt.config.get("figures", {}) | figures
    prompt.config["data"] = prompt.config.get("data", {}) | {"test": queries_hash(data.test)}
    prompt.save_pretrained(folder)


_ON_CARD = ("rsr", "accuracy", "over_refusal")


def _margins(prompt: Prompt, vector: HarmfulnessVector) -> tuple[float, float]:
    """Those the prompt was trained with."""
    plus, minus = prompt.config.get("mu_plus"), prompt.config.get("mu_minus")
    return vector.mu_plus if plus is None else plus, vector.mu_minus if minus is None else minus


def _pictures(trained: Mapping[str, Prompt], padding: int, eps: float) -> list[report.Picture]:
    border, noise = trained["davsp"], trained["additive"]
    assert isinstance(border, VisualSafetyPrompt)
    side = border.canvas
    return [
        report.Picture(
            border.border(),
            "The visual safety prompt",
            "A square frame of coloured pixels around a grey field",
            f"{padding} pixels wide on a canvas of {side} × {side}; in the grey field stands the picture, untouched.",
        ),
        report.Picture(
            noise.image(Image.new("RGB", (side, side), (128, 128, 128))),
            "Additive noise, for comparison",
            "Coloured noise over a grey field",
            f"The same objective; at most {round(255 * eps)} of 255 levels on every pixel, shown over mid grey.",
        ),
    ]


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in read_bytes(path).splitlines() if line]
    except ValueError as error:
        raise DavspError(f"{path} is damaged ({error}); delete the folder of that training to make it anew") from error
