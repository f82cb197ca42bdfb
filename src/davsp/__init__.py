"""DAVSP: a visual safety prompt, trained on a frozen vision-language model's own sense of harm.

`import davsp` is cheap: torch and transformers are imported when a public name is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AdditiveNoise": "davsp.prompts.additive",
    "DavspError": "davsp.errors",
    "DefendedModel": "davsp.defended",
    "HarmfulnessVector": "davsp.vector",
    "LVLM": "davsp.lvlm",
    "Query": "davsp.query",
    "Response": "davsp.query",
    "TrainSettings": "davsp.training.settings",
    "Verdict": "davsp.query",
    "VisualSafetyPrompt": "davsp.prompts.border",
    "evaluate": "davsp.evaluation",
    "train": "davsp.training",
}
__all__ = [
    "LVLM",
    "AdditiveNoise",
    "DavspError",
    "DefendedModel",
    "HarmfulnessVector",
    "Query",
    "Response",
    "TrainSettings",
    "Verdict",
    "VisualSafetyPrompt",
    "__version__",
    "evaluate",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use.

    Raises:
        DavspError: transformers cannot be imported, because of a torchvision that does not go with torch.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'davsp' has no attribute '{name}'")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except (ImportError, RuntimeError) as error:
        from davsp.doctor import explain_import_error
        from davsp.errors import DavspError

        if why := explain_import_error(error):
            raise DavspError(why) from error
        raise


def __dir__() -> list[str]:
    return sorted(__all__)
