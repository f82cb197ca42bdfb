"""`davsp demo`: from the harmfulness vector to the report, on the LVLM that ships or on any other.

Every stage leaves its result in the output folder with a hash of what it was made from. A second run keeps what
still holds, goes on with what was cut off, and makes anew, saying so, what rests on other inputs.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.console import Console

from davsp import report
from davsp.defenses import Defense, Gate, NoDefense, SafetyText, VisualPrompt
from davsp.defenses.effect import choose
from davsp.embedded.recipes import SETTINGS
from davsp.errors import DavspError
from davsp.evaluation import Evaluation, evaluate
from davsp.evaluation.fitting import fitting
from davsp.experiments.stages import Stages, fitted_vector, records, trained_prompt
from davsp.lvlm import LVLM, model_facts, model_name, undefended
from davsp.prompts import AdditiveNoise, Prompt, VisualSafetyPrompt
from davsp.prompts.canaries import Canaries
from davsp.report.html import write_report
from davsp.report.terminal import print_table
from davsp.runtime.files import manifest, write_json
from davsp.store import RESPONSES, pillow_notes, queries_hash
from davsp.training import TrainSettings
from davsp.training.checkpoint import METRICS
from davsp.vector import HarmfulnessVector

if TYPE_CHECKING:
    from davsp.embedded.data import Protocol


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
    max_new_tokens: int | None = None,
    show_unsafe: bool | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Fit the vector, train border and noise, evaluate six rows; write metrics.json, report.html and prompt/.

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
    ships = lvlm is None
    show_unsafe = ships if show_unsafe is None else show_unsafe
    if lvlm is None or protocol is None or safety_text is None:
        from davsp import embedded

        lvlm = lvlm or embedded.load()
        protocol = protocol or embedded.protocol(seed)
        safety_text = embedded.SAFETY_TEXT if safety_text is None else safety_text
    fitting(lvlm, {"none": NoDefense(), "text": SafetyText(safety_text)}, protocol.test, max_new_tokens)
    settings = settings or SETTINGS.model_copy(update={"seed": seed})
    vector_text = safety_text if vector_text is None else vector_text
    padding = padding or round(lvlm.canvas / 12)
    stages = Stages(out, console)
    stages.line("model", f"{model_name(lvlm)}, {len(protocol.test)} test queries", time.perf_counter() - began)

    vector = fitted_vector(stages, lvlm, protocol, vector_text)
    prompts: dict[str, Prompt] = {
        "davsp": VisualSafetyPrompt.create(lvlm.canvas, padding, text=safety_text),
        "additive": AdditiveNoise.create(lvlm.canvas, eps, text=safety_text),
    }
    folders = {"davsp": out / "prompt", "additive": out / "additive"}
    trained = {
        name: trained_prompt(stages, name, start, lvlm, protocol, vector, settings, folders[name])
        for name, start in prompts.items()
    }
    defenses: dict[str, Defense] = {
        "none": NoDefense(),
        "safety-text": SafetyText(safety_text),
        "random-border": VisualPrompt(VisualSafetyPrompt.create(lvlm.canvas, padding, "random", seed, safety_text)),
        "additive": VisualPrompt(trained["additive"]),
        "davsp": VisualPrompt(trained["davsp"]),
        "gate": Gate(VisualPrompt(trained["davsp"]), name="gate"),
    }
    start = time.perf_counter()
    notes = pillow_notes(out) if (out / RESPONSES).exists() else []
    evaluation = evaluate(
        lvlm, defenses, protocol.test, out, vector, batch_size=batch_size, max_new_tokens=max_new_tokens, redo=True,
        seed=seed, console=console,
    )  # fmt: skip
    stages.line("evaluate", f"{len(defenses)} defenses", time.perf_counter() - start)
    stages.seconds["evaluate"] = round(sum(r.seconds for answers in evaluation.responses.values() for r in answers), 2)

    start = time.perf_counter()
    facts = manifest(
        **({"notes": notes} if notes else {}),
        **model_facts(lvlm), max_new_tokens=max_new_tokens or lvlm.longest, seed=seed, settings=settings.model_dump(),
        padding=padding, eps=eps, safety_text=safety_text, vector_text=vector_text, stages=stages.seconds,
        test={"queries": len(protocol.test), "sha256": queries_hash(protocol.test)},
        undefended=undefended.facts(lvlm, protocol.test),
    )  # fmt: skip
    write_json(out / "manifest.json", facts)
    finished = VisualSafetyPrompt.from_pretrained(out / "prompt").measured(out)
    if ships and finished.canaries is None:
        finished.canaries = _canaries(lvlm, finished, console)
    finished.save_pretrained(out / "prompt")
    page = _page(out, protocol, evaluation, defenses, trained, vector, facts)
    write_report(out / "report.html", page, show_unsafe)
    stages.line("report", str(out / "report.html"), time.perf_counter() - start)
    print_table(console, evaluation.rows, f"{model_name(lvlm)}, {time.perf_counter() - began:.0f} s in all")
    return evaluation


def _canaries(lvlm: LVLM, prompt: VisualSafetyPrompt, console: Console) -> Canaries | None:
    """Canaries for the prompt's folder; None, with a line that says why, if it flips too few."""
    from davsp.embedded.canaries import candidates

    try:
        return choose(lvlm, prompt, candidates())
    except DavspError as error:
        console.print(f"no canaries: {error}", markup=False, highlight=False)
        return None


def _page(
    out: Path,
    protocol: "Protocol",
    evaluation: Evaluation,
    defenses: Mapping[str, Defense],
    trained: Mapping[str, Prompt],
    vector: HarmfulnessVector,
    facts: dict[str, Any],
) -> report.Report:
    """The report, with the pictures of what was trained and the curves of its training."""
    return report.build(
        facts["model"],
        protocol.test,
        evaluation,
        defenses,
        pictures=_pictures(trained, facts["padding"], facts["eps"]),
        margins=_margins(trained["davsp"], vector),
        sweep=vector.table,
        layer=vector.layer,
        curves={name: records(out / "train" / name / METRICS) for name in trained},
        manifest=facts,
    )


def _margins(prompt: Prompt, vector: HarmfulnessVector) -> tuple[float, float]:
    """Those the prompt was trained with."""
    plus, minus = prompt.config.get("mu_plus"), prompt.config.get("mu_minus")
    return vector.mu_plus if plus is None else plus, vector.mu_minus if minus is None else minus


def _pictures(trained: Mapping[str, Prompt], padding: int, eps: float) -> list[report.Illustration]:
    border, noise = trained["davsp"], trained["additive"]
    assert isinstance(border, VisualSafetyPrompt)
    side = border.canvas
    return [
        report.Illustration(
            border.border(),
            "The visual safety prompt",
            "A square frame of coloured pixels around a grey field",
            f"{padding} pixels wide on a canvas of {side} × {side}; in the grey field stands the picture, untouched.",
        ),
        report.Illustration(
            noise.image(Image.new("RGB", (side, side), (128, 128, 128))),
            "Additive noise, for comparison",
            "Coloured noise over a grey field",
            f"The same objective; at most {round(255 * eps)} of 255 levels on every pixel, shown over mid grey.",
        ),
    ]
