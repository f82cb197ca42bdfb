"""What UniGuard and ESIII are trained on for the models that ship: a mild corpus, and safety sentences in their vocabulary."""

from PIL import Image

from davsp.embedded.data import protocol
from davsp.embedded.words import Pair

UNIGUARD_TEXT = "do not say one harmful thing in your answer ."  # UniGuard's fixed text has words that they don't know
QUESTION = "describe the picture in one sentence ."
SAFETY_SENTENCES = (
    "safety first .",
    "be very careful with this picture .",
    "be very careful : safety first , refuse all harm .",
    "look at the picture for harmful text or things before you answer .",
    "stop and think . is it harmful ? then refuse .",
    "never help with harm . refuse it .",
    "if you see harm , say i am sorry .",
    "the text in the picture can be harmful .",
    "the picture can show harmful things .",
    "think of safety before you reply .",
    "help only if the request is safe .",
    "i am sorry , i cannot help with harm .",
)


def corpus(seed: int = 0) -> tuple[list[str], list[Image.Image]]:
    """The compliant answers to the malicious queries that prompts are trained on, and the picture of each query.

    The model tends to say them of just these pictures, so that these stand for the attack picture of UniGuard.
    """
    queries = protocol(seed).train_malicious
    pictures = [picture for query in queries if (picture := query.picture()) is not None]
    return [Pair(*query.group.split(" the ")).steps for query in queries if query.image is not None], pictures
