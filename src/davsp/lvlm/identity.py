"""What a model is called, and how to tell it from another."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from davsp.lvlm.answering import AnsweringLVLM
from davsp.lvlm.base import LVLM
from davsp.lvlm.templates import CHECKPOINT


def short_name(model_id: str) -> str:
    """A hub id as it is, of a folder its last part."""
    path = Path(model_id)
    return path.resolve().name if path.is_dir() else model_id


def model_name(lvlm: AnsweringLVLM) -> str:
    """The model's name in tables."""
    return short_name(lvlm.model_id)


def template_of(lvlm: AnsweringLVLM) -> str:
    """By which conversation template a model is asked, and what that is told; a served one by its server's, which is its checkpoint's."""
    return getattr(lvlm, "template", CHECKPOINT)


def template_record(lvlm: AnsweringLVLM) -> dict[str, str]:
    """What is kept beside texts that were found on a model: the template, where it is not the checkpoint's own."""
    template = template_of(lvlm)
    return {} if template == CHECKPOINT else {"template": template}


def model_facts(lvlm: AnsweringLVLM) -> dict[str, Any]:
    """What every manifest says of the model: name, revision, weights, template, and what of its generation settings does not count."""
    facts: dict[str, Any] = {"model": model_name(lvlm), "revision": lvlm.revision, "weights": fingerprint(lvlm)}
    facts["template"] = template_of(lvlm)
    if extra := getattr(lvlm, "extra_body", None):
        facts["extra_body"] = extra
    if attention := getattr(lvlm, "attention", None):
        facts["attn_implementation"] = attention
    if beginning := beginning_of(lvlm):
        facts["prefill"] = beginning
    if isinstance(lvlm, LVLM) and lvlm.barred:
        facts["barred"] = list(lvlm.barred)
    if isinstance(lvlm, LVLM) and lvlm.overridden:
        facts["generation_config_overridden"] = lvlm.overridden
    return facts


def beginning_of(lvlm: AnsweringLVLM) -> str | None:
    """With what every answer is made to begin; None: with nothing."""
    return (lvlm.beginning or None) if isinstance(lvlm, LVLM) else None


def fingerprint(lvlm: AnsweringLVLM) -> str:
    """A hash of the model, the first numbers of each of its tensors, and their number format; of a served one its address and what requests hold besides.

    Under another conversation template than the checkpoint's it is another model.
    """
    dtype = lvlm.dtype if isinstance(lvlm, LVLM) else None
    digest = sha256(f"{model_name(lvlm)} {lvlm.revision} {dtype} {lvlm.canvas}".encode())
    if (template := template_of(lvlm)) != CHECKPOINT:
        digest.update(template.encode())
    if not isinstance(lvlm, LVLM):
        digest.update(str(lvlm.server).encode())
        if extra := getattr(lvlm, "extra_body", None):
            digest.update(json.dumps(extra, sort_keys=True).encode())
        return digest.hexdigest()
    if lvlm.attention:
        digest.update(lvlm.attention.encode())
    for name, tensor in lvlm.model.state_dict().items():
        digest.update(name.encode() + tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()
