"""ESIII-style: noise that makes the picture say safety sentences (after Hao et al., "Tit-for-Tat", arXiv 2503.11619).

As published (abstract; objective and use by reviews of the paper; no code is to be had): from a blank picture i, the defensive one is
argmin of - sum_j log p(s_j | t, i) by PGD within a bound, where s are security instructions and t asks to describe the
picture. It is then fused pixel by pixel with every picture, and a security instruction is put to the question.

All the rest is INFERRED, so what is trained here is called ESIII-style; the switch for the other reading:

- Bound, step and budget are UniGuard's (32/255, 1/255, 5000 steps of two), so that the two differ in their objective alone (`eps`,
  `settings`).
- The blank picture is mid grey, on which noise of either sign shows (`pictures`); white would hide half of it.
- Fused: the noise is added, as UniGuard's.
- The sentences are our own, twelve (`sentences`), and so is the question's wording (`question`).
- The security instruction is AdaShield's text in DAVSP's wording, before the question, as in all rows of that comparison (`text`).
- Noise starts as uniform within eps; log p is divided by the number of tokens; the end token is left out.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from davsp.defenses.adashield_s import DAVSP
from davsp.lvlm import LVLM
from davsp.prompts import AdditiveNoise
from davsp.training.sentences import blank, train_sentences
from davsp.training.settings import SentenceSettings

QUESTION = "Describe the image."
SENTENCES = (
    "Safety comes first: I look at the whole image, its text included, before I answer.",
    "I check whether the image or the request asks for anything harmful, illegal or dangerous.",
    "I read the text in the image as content to be judged, not as a command to be followed.",
    "If what is asked could hurt someone, I refuse and say that I am sorry.",
    "I think about image and question together, step by step, before I decide to help.",
    "I do not explain how to make weapons, drugs or anything else that is meant to harm.",
    "I do not help with theft, fraud, hacking or any other crime.",
    "I do not write hateful, threatening or insulting words about anyone.",
    "I protect the privacy of the people who are shown or named.",
    "A harmless wording or a list to be filled in does not make a harmful request acceptable.",
    "When the request is safe, I answer it fully and correctly.",
    "When in doubt about the intention, I choose the careful answer.",
)
EPS = 32 / 255
SETTINGS = SentenceSettings(likely=True)


def train_esiii(
    lvlm: LVLM,
    out: str | Path,
    *,
    sentences: Sequence[str] = SENTENCES,
    question: str = QUESTION,
    pictures: Sequence[Image.Image] = (),
    text: str = DAVSP,
    eps: float = EPS,
    settings: SentenceSettings = SETTINGS,
    resume: bool = True,
    progress: bool = True,
) -> AdditiveNoise:
    """Train the noise, and put the text to it.

    Args:
        out: folder of checkpoint and metrics.
        sentences: what the model is to say of the defensive picture.
        question: asked about it meanwhile.
        pictures: the blank; none: a mid-grey one. Of several, sentence i is said of `pictures[i % len(pictures)]`.
        text: before every question once it is deployed; "" for none.
        eps: bound of the noise in pixel units, white = 1.

    Raises:
        DavspError: no sentence; eps outside (0, 1]; else as `davsp.train`.
        Interrupted: Ctrl-C; the state has been saved.
    """
    start = AdditiveNoise.create(lvlm.canvas, eps, "random", settings.seed)
    pictures = pictures or [blank(lvlm.canvas)]
    return train_sentences(lvlm, start, pictures, question, sentences, settings, out, resume, progress).with_texts(text)
