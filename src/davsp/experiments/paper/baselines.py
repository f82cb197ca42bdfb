"""The methods beside DAVSP that are trained: AdaShield-A, PAT, UniGuard, ESIII-style; each is kept in `prompts/NAME`.

On the models that ship they take small budgets, texts in their vocabulary, and a grammar in place of AdaShield-A's defender. On others they are as
published, as far as that is known (docs/defenses.md); UniGuard then needs a corpus, AdaShield-A a defender.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from davsp.defenses import Defense, VisualPrompt
from davsp.embedded.recipes import NOISE, POOL, TOKENS
from davsp.experiments.paper.kit import Kit
from davsp.lvlm import fingerprint
from davsp.lvlm.undefended import in_records
from davsp.prompts import AdditiveNoise
from davsp.runtime import parallel
from davsp.runtime.files import sha256_bytes
from davsp.store import queries_hash


def uniguard(kit: Kit) -> Defense:
    """Noise against a corpus, with AdaShield's text before the question."""
    from davsp.defenses.uniguard import SETTINGS, train_uniguard
    from davsp.embedded.corpus import corpus

    settings = SETTINGS.model_copy(update={"seed": kit.settings.seed, **(NOISE if kit.shipped else {})})
    sentences, pictures = corpus(settings.seed) if kit.shipped else (kit.corpus, [])

    def make(out: Path, resume: bool) -> None:
        noise = train_uniguard(
            kit.lvlm, sentences, out, pictures=pictures, text=kit.text, eps=kit.eps, settings=settings, resume=resume,
            progress=not kit.stages.console.quiet,
        )  # fmt: skip
        if parallel.rank() == 0:
            noise.save_pretrained(saved)

    saved = kit.stages.out / "prompts" / "uniguard"
    inputs = [settings.model_dump(), kit.eps, sha256_bytes("\n".join(sentences).encode())]
    noise = _once(kit, "uniguard", inputs, make, lambda: AdditiveNoise.from_pretrained(saved), together=True)
    return VisualPrompt(noise, "uniguard")


def esiii(kit: Kit) -> Defense:
    """Noise that says safety sentences, with AdaShield's text before the question."""
    from davsp.defenses import esiii as method
    from davsp.embedded import corpus as small

    settings = method.SETTINGS.model_copy(update={"seed": kit.settings.seed, **(NOISE if kit.shipped else {})})
    sentences = small.SAFETY_SENTENCES if kit.shipped else method.SENTENCES
    question = small.QUESTION if kit.shipped else method.QUESTION

    def make(out: Path, resume: bool) -> None:
        noise = method.train_esiii(
            kit.lvlm, out, sentences=sentences, question=question, text=kit.text, eps=kit.eps, settings=settings,
            resume=resume, progress=not kit.stages.console.quiet,
        )  # fmt: skip
        if parallel.rank() == 0:
            noise.save_pretrained(saved)

    saved = kit.stages.out / "prompts" / "esiii"
    inputs = [settings.model_dump(), kit.eps, question, sentences]
    noise = _once(kit, "esiii", inputs, make, lambda: AdditiveNoise.from_pretrained(saved), together=True)
    return VisualPrompt(noise, "esiii")


def pat(kit: Kit) -> Defense:
    """Tokens found with the picture present, behind AdaShield's text."""
    from davsp.defenses.pat import PAT, PatSettings, train_pat

    settings = PatSettings(seed=kit.settings.seed, **(TOKENS if kit.shipped else {}))

    def make(out: Path, resume: bool) -> None:
        data = kit.data
        tokens = train_pat(
            kit.lvlm, data.train_malicious, data.train_benign, kit.text, settings, out, resume, kit.stages.console
        )
        if parallel.rank() == 0:
            tokens.save(saved)

    saved = kit.stages.out / "prompts" / "pat"
    inputs = [settings.model_dump(), queries_hash(kit.data.train_malicious), queries_hash(kit.data.train_benign)]
    return _once(kit, "pat", inputs, make, lambda: PAT.load(saved), together=True)


def adashield_a(kit: Kit) -> Defense:
    """A pool of refined prompts, one fetched for each query."""
    from davsp.defenses.adashield_a import AdaShieldA, ClipEncoder, LVLMEncoder, RefineSettings, make_pool
    from davsp.embedded.phrases import PhraseDefender

    settings = RefineSettings(seed=kit.settings.seed, **(POOL | {"start": kit.text} if kit.shipped else {}))
    defender = kit.defender or PhraseDefender()

    def make(out: Path, resume: bool) -> None:
        encoder = LVLMEncoder(kit.lvlm) if kit.shipped else ClipEncoder(device=kit.lvlm.device)
        malicious = kit.data.train_malicious
        make_pool(kit.lvlm, malicious, defender, encoder, settings, out, resume, kit.stages.console).save(saved)

    saved = kit.stages.out / "prompts" / "adashield-a"
    inputs = [settings.model_dump(), defender.describe(), queries_hash(kit.data.train_malicious)]
    return _once(kit, "adashield-a", inputs, make, lambda: AdaShieldA.load(saved))


def _once(
    kit: Kit,
    name: str,
    inputs: list[Any],
    make: Callable[[Path, bool], None],
    load: Callable[[], Any],
    together: bool = False,
) -> Any:
    """What `load` reads, made once from the kit's model and text and from `inputs`; a stopped search goes on (`Stages.run`)."""
    folder = kit.stages.out / "train" / name
    whole = [fingerprint(kit.lvlm), kit.text, *inputs]
    if shaped := in_records(kit.lvlm, kit.data.train_malicious, kit.data.train_benign):
        whole.append(shaped)
    return kit.stages.run(name, whole, lambda resume: make(folder, resume), load, together)
