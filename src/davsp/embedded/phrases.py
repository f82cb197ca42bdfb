"""Who writes AdaShield-A's prompts for the models that ship: a small grammar of texts that they know."""

from random import Random
from typing import Any

from davsp.defenses.adashield_a.wording import Proposal
from davsp.embedded.words import PLAIN_TEXTS, SAFETY_TEXT, STRONG_TEXTS

PHRASES = (SAFETY_TEXT, *STRONG_TEXTS, *PLAIN_TEXTS)


class PhraseDefender:
    """One or two of the texts that the embedded LVLM was trained on; no model writes anything here.

    prompt = phrase | phrase phrase, where the two are different and phrase is one of the safety text, the strong
    texts and the plain ones: 49 prompts, drawn by the seed. It does not read the LVLM's answer.
    """

    def describe(self) -> dict[str, Any]:
        return {"kind": "grammar", "phrases": list(PHRASES)}

    def propose(self, scenario: str, prompt: str, output: str, seed: str) -> Proposal:
        rng = Random(seed)
        others = [(a, b) for a in PHRASES for b in ("", *PHRASES) if a != b and f"{a} {b}".strip() != prompt]
        return Proposal("drawn from a grammar of phrases; no defender model", " ".join(rng.choice(others)).strip())
