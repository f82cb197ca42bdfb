"""Graders of the utility benchmarks: MM-Vet's and LLaVA-Bench's by a chat model, with the published prompts, and two without.

The published scripts take what they cannot read for 0 or for (-1, -1) and average it in. Here a reply must be the scores
and nothing else; whatever is not is asked for again and then unscored.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from davsp.judges.base import PromptJudge
from davsp.judges.keyword import normalise
from davsp.judges.prompts import JudgePrompt, Message, Reading, bare, unreadable, values_of
from davsp.judges.verdicts import judge_name
from davsp.query import Grade, Query, Response
from davsp.runtime.thought import CUT

VERSION = 2
"""Of `exact` and `overlap`; raised with every change to them."""

Grader = PromptJudge | Callable[[Query, str], tuple[tuple[float, ...], str]]
"""A chat grader, or a function (query, answer) -> (scores, reason); no scores where it cannot tell."""


def grades_of(queries: Sequence[Query], responses: Sequence[Response], grader: Grader) -> list[Grade]:
    """The grader's grades of the responses; none of a thought that was cut. A grader that asks a model gets them all at once."""
    query_of = {q.id: q for q in queries}
    items = [(query_of[r.query_id], r) for r in responses if r.query_id in query_of]
    if isinstance(grader, PromptJudge):
        return grader.grade_all(items)
    name = judge_name(grader)
    return [Grade(q.id, r.defense, name, *(((), CUT) if r.cut else grader(q, r.text))) for q, r in items]


# ------------------------------------------------------------------------------------------------ without a model


def exact(query: Query, answer: str) -> tuple[tuple[float, ...], str]:
    """MM-Vet without a model: 1 if the answer is an alternative (<OR>) of the reference, else the best share of <AND> parts.

    Far stricter than the published grader, so its figures are another metric; meant for short references.
    """
    if not normalise(query.reference):
        return (), "the query has no reference"
    answer_words = f" {normalise(answer)} "
    shares = [0.0]
    for alternative in query.reference.split("<OR>"):
        parts = [part for part in map(normalise, alternative.split("<AND>")) if part]
        if not parts:
            continue  # "5<OR>": what is left out is no alternative
        matches = [f" {part} " in answer_words if len(parts) > 1 else f" {part} " == answer_words for part in parts]
        shares.append(sum(matches) / len(parts))
    return (max(shares),), "by its words"


def overlap(query: Query, answer: str) -> tuple[tuple[float, ...], str]:
    """LLaVA-Bench without a model: the reference has 10, the answer 1 to 10 by F1 of the words they share.

    It reads neither picture nor caption and says nothing of truth; its figures are another metric.
    """
    if not normalise(query.reference):
        return (), "the query has no reference"
    reference_words, answer_words = Counter(normalise(query.reference).split()), Counter(normalise(answer).split())
    common = (reference_words & answer_words).total()
    f1 = 2 * common / (reference_words.total() + answer_words.total())
    return (10.0, 1.0 + 9.0 * f1), "by the words it shares with the reference"


# ------------------------------------------------------------------------------------------------ MM-Vet

_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and "
    "Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland is "
    "mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of these "
    "countries do not accurately represent their landscapes. | "
)
_MM_VET = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in "
    "the ground truth means it is totally right only when all elements in the ground truth are present in the "
    "prediction, and <OR> means it is totally right when any one element in the ground truth is present in the "
    "prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right). Just complete the last space of the correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n"
    "--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
    f"{_MEME}The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very "
    "icy and Greenland isn't very green. | 0.4\n"
    f"{_MEME}The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, "
    "despite its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is "
    "why I have trust issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. "
    "The humor in this meme is derived from the unexpected contrast between the names of the countries and their actual "
    "physical characteristics. | 1.0\n"
)


def read_mm_vet(reply: str) -> Reading:
    """The whole reply as a number in [0, 1]. The published script reads the first word and drops the rest."""
    text = bare(reply)
    if re.fullmatch(r"0(\.\d+)?|1(\.0+)?", text):
        return text, "the grader says so"
    return unreadable(reply)


def _spaced(query: Query) -> dict[str, str]:
    """MM-Vet's script puts spaces around the tags of a reference."""
    values = values_of(query)
    return values | {"reference": values["reference"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")}


def _mm_vet(query: Query) -> list[Message]:
    return [{"role": "user", "content": f"{_MM_VET}\n{{question}} | {{reference}} | {{answer}} | "}]


MM_VET = JudgePrompt(
    "mm-vet",
    1,
    _mm_vet,
    read_mm_vet,
    max_tokens=16,  # published: 3, at which a server calls a whole "0.5" cut
    grades=True,
    temperatures=(0.0, 0.5, 1.0, 1.5, 2.0),
    again="\nPredict the correctness of the answer (digit): ",
    values=_spaced,
)
"""mm-vet_evaluator.py (arXiv 2308.02490; asked of gpt-4-0613): the question, the reference and the answer, no picture."""

# ------------------------------------------------------------------------------------------------ LLaVA-Bench

_LLAVA_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_LLAVA_RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with a few sentences describing the image. \n"
    "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
    "respectively. The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential bias "
    "and ensuring that the order in which the responses were presented does not affect your judgment."
)


def read_llava_bench(reply: str) -> Reading:
    """The first line as two numbers in [1, 10], with a space, comma or semicolon between, and nothing else."""
    first = reply.strip().split("\n", 1)[0].strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:\s*[,;]\s*|\s+)(\d+(?:\.\d+)?)", first)
    if match and all(1 <= float(value) <= 10 for value in match.groups()):
        return f"{match[1]} {match[2]}", "the grader says so"
    return unreadable(reply)


def _llava_bench(query: Query) -> list[Message]:
    text = (
        "[Context]\n{context}\n\n[Question]\n{question}\n\n[Assistant 1]\n{reference}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{{answer}}\n\n[End of Assistant 2]\n\n[System]\n{_LLAVA_RULE}\n\n"
    )
    return [{"role": "system", "content": _LLAVA_SYSTEM}, {"role": "user", "content": text}]


LLAVA_BENCH = JudgePrompt(
    "llava-bench", 1, _llava_bench, read_llava_bench, max_tokens=1024, grades=True, temperatures=(0.2,), first_line=True
)
"""LLaVA's eval_gpt_review_bench.py and rule.json (asked of gpt-4-0314): the caption stands for the picture, the reference
is Assistant 1."""

GRADERS = {prompt.name: prompt for prompt in (MM_VET, LLAVA_BENCH)}
