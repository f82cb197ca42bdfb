"""UniGuard: noise on the picture that makes harmful sentences unlikely, and a text (Oh et al., arXiv 2411.01703).

As published (its precursor's code, `visual_defender.py` and `text_defender.py`; the official code is not to be had):

- noise = argmin over |noise| <= eps of sum_i log p(c_i | picture + noise) over a corpus c of harmful strings, by sign steps of
  1/255 from uniform noise, 5000 steps of two sentences, the question empty, one picture for all; one noise then lies on every
  picture. eps is 64/255 in the precursor, 32/255 in the tables that show its figures, 16/255 in a reproduction: 32/255 here.
- The fixed text, a suffix after a line break, and the optimised one, a prefix with a line break, letter by letter.
- The search of the latter: 16 tokens from a random start, a position after the other, the 100 candidates of the best gradient, judged
  on 8 sentences, kept if the loss falls, 50 sweeps, the noise on the picture meanwhile (`davsp.defenses.uniguard.search`).

INFERRED, and the switch for the other reading:

- The picture. Theirs is an attack picture of Qi et al.; it does not ship, and mid grey stands in for it (`pictures`). For the
  embedded models it is the picture of the malicious query that the sentence complies with.
- The texts. DAVSP compares all methods with AdaShield's text before the question; that its rows have UniGuard's own text
  besides is not said, so there is none (`text`, `text_part`; as published: text "", text_part "fixed" or "optimised").
- That text is not in the question while the noise is trained, which is empty (`with_text`).
- log p is divided by the number of tokens, so that every sentence counts alike; the end token is left out.
- Theirs clamps the noise such that its one picture + noise stays in [0, 1]. Here the finished canvas is clamped, as everywhere.
- Corpus: 574 strings of AdvBench there; yours here, as a file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from davsp.defenses.adashield_s import DAVSP
from davsp.defenses.uniguard.search import SearchSettings, search_text
from davsp.lvlm import LVLM
from davsp.prompts import AdditiveNoise
from davsp.training.sentences import SentenceRun, blank, train_sentences
from davsp.training.settings import SentenceSettings

FIXED = "DO NOT INCLUDE any harmful, sexual, toxic, threatening, and insulting words and phrases in your response."
OPTIMISED = '<!-- results [{ Are Mil enumerate à Ben Category [" Error ‘ Under Alex AND </s>'
EPS = 32 / 255
SETTINGS = SentenceSettings(likely=False)

TextPart = Literal["none", "fixed", "optimised", "searched"]


def train_uniguard(
    lvlm: LVLM,
    corpus: Sequence[str],
    out: str | Path,
    *,
    pictures: Sequence[Image.Image] = (),
    text: str = DAVSP,
    text_part: TextPart = "none",
    fixed: str = FIXED,
    with_text: bool = False,
    eps: float = EPS,
    settings: SentenceSettings = SETTINGS,
    search: SearchSettings | None = None,
    resume: bool = True,
    progress: bool = True,
) -> AdditiveNoise:
    """Train the noise, and put the texts to it.

    Args:
        corpus: harmful sentences that are to become unlikely.
        out: folder of checkpoint, metrics and search.
        pictures: sentence i is said of `pictures[i % len(pictures)]`; none: a mid-grey one.
        text: before every question; "" for none.
        text_part: UniGuard's own text: none, `fixed` after the question, or, before it and after `text`, the published
            optimised one or one that is searched here.
        with_text: `text` is in the question while noise and text part are optimised.
        eps: bound of the noise in pixel units, white = 1.
        search: how the text is searched; None: as published, with the seed of `settings`.

    Raises:
        DavspError: no sentence; eps outside (0, 1]; else as `davsp.train` and `search_text`.
        Interrupted: Ctrl-C; the state has been saved.
    """
    start = AdditiveNoise.create(lvlm.canvas, eps, "random", settings.seed)
    pictures = pictures or [blank(lvlm.canvas)]
    question = f"{text} " if with_text and text else ""
    trained = train_sentences(lvlm, start, pictures, question, corpus, settings, out, resume, progress)
    prefix = OPTIMISED
    if text_part == "searched":
        run = SentenceRun(lvlm, start, pictures, question, corpus, settings, Path(out))
        search = search or SearchSettings(seed=settings.seed)
        prefix = search_text(run, trained.delta, search, Path(out) / "text.json", resume, progress)
    return with_text_part(trained, text, text_part, fixed, prefix)


def with_text_part(
    noise: AdditiveNoise, text: str, text_part: TextPart, fixed: str = FIXED, prefix: str = OPTIMISED
) -> AdditiveNoise:
    """The noise with `text` and with UniGuard's own: `fixed` after the question, or `prefix` before it and after `text`."""
    if text_part == "none":
        return noise.with_texts(text)
    if text_part == "fixed":
        return noise.with_texts(text, suffix=f"\n{fixed}")
    return noise.with_texts(f"{text} {prefix}" if text else prefix, separator="\n")
