"""The rows of the paper's tables as defenses, trained where they have to be; what a model's cells share is made once."""

from collections.abc import Callable

from davsp.defenses import Defense, NoDefense, SafetyText, VisualPrompt
from davsp.defenses.ecso import ECSO
from davsp.defenses.intervention import Intervention
from davsp.errors import DavspError
from davsp.experiments.paper import baselines
from davsp.experiments.paper.kit import Kit
from davsp.experiments.paper.tables import FROM
from davsp.experiments.stages import trained_prompt
from davsp.prompts import AdditiveNoise, Prompt, VisualSafetyPrompt

PROMPTS = (  # trained for the tables
    "davsp", "border-answer", "additive-projection", "additive-answer", "adashield-a", "pat", "uniguard", "esiii",
)  # fmt: skip
STEER = 0.75  # of the distance between the class means: how far the projection is moved (INFERRED; the paper gives no figure)


def prompt(kit: Kit, name: str) -> Prompt:
    """Border or noise by the name of its row, trained once and kept in `prompts/NAME`."""
    if name not in kit.trained:
        start: Prompt = kit.border()
        if name.startswith("additive"):
            start = AdditiveNoise.create(kit.lvlm.canvas, kit.eps, text=kit.text)
        objective = "answer" if name.endswith("answer") else kit.settings.objective
        settings = kit.settings.model_copy(update={"objective": objective})
        saved = kit.stages.out / "prompts" / name
        kit.trained[name] = trained_prompt(kit.stages, name, start, kit.lvlm, kit.data, kit.vector, settings, saved)
    return kit.trained[name]


def _pixels(name: str) -> Callable[[Kit], Defense]:
    return lambda kit: VisualPrompt(prompt(kit, name), name)


def _davsp(kit: Kit) -> VisualPrompt:
    return VisualPrompt(prompt(kit, "davsp"), "davsp")


METHODS: dict[str, Callable[[Kit], Defense]] = {
    "none": lambda kit: NoDefense(),
    "adashield-a": baselines.adashield_a,
    "pat": baselines.pat,
    "uniguard": baselines.uniguard,
    "esiii": baselines.esiii,
    "adashield-s": lambda kit: SafetyText(kit.text, "adashield-s"),
    "davsp": _davsp,
    "border-answer": _pixels("border-answer"),
    "additive-projection": _pixels("additive-projection"),
    "additive-answer": _pixels("additive-answer"),
    "vector-added": lambda kit: Intervention(kit.vector, times=STEER, name="vector-added"),
    "vector-removed": lambda kit: Intervention(kit.vector, times=-STEER, name="vector-removed"),
    "ecso": lambda kit: ECSO(templates=kit.templates, name="ecso"),
    "ecso+davsp": lambda kit: ECSO(_davsp(kit), templates=kit.templates, name="ecso+davsp"),
    "ecso-adaptive+davsp": lambda kit: ECSO(instead=_davsp(kit), templates=kit.templates, name="ecso-adaptive+davsp"),
}


def lacking(kit: Kit) -> dict[str, str]:
    """The methods that can't be had here, and why."""
    if kit.shipped:
        return {}
    missing = {} if kit.corpus else {"uniguard": "no corpus was given (--corpus)"}
    return missing | ({} if kit.defender else {"adashield-a": "no defender was given (--defender)"})


def transferred(kit: Kit) -> dict[str, Defense]:
    """The borders of other models on this one: resized, the width along; nothing is trained (Table 3).

    Raises:
        DavspError: a folder that holds no border, or a size that this model does not take.
    """
    defenses: dict[str, Defense] = {}
    for name, folder in kit.borrowed.items():
        if not folder.is_dir():
            raise DavspError(f"there is no prompt of {name} in {folder}: reproduce that model first, or leave it out")
        border = VisualSafetyPrompt.from_pretrained(folder).resized(kit.lvlm.canvas)
        border.text = kit.text
        border.check(kit.lvlm)
        defenses[FROM + name] = VisualPrompt(border, FROM + name)
    return defenses
