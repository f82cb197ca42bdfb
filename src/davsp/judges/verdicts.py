"""A judge's name, and its verdicts of a run's answers."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from davsp.judges import Judge
from davsp.judges.base import PromptJudge
from davsp.query import Query, Response, Verdict
from davsp.runtime.thought import CUT


def judge_name(judge: Callable[..., Any]) -> str:
    """The judge's `name` if it has one, else its function's, and behind it the VERSION of its module: "keyword/1"."""
    if attribute := getattr(judge, "name", None):
        return str(attribute)
    name = getattr(judge, "__name__", type(judge).__name__)
    version = getattr(sys.modules.get(judge.__module__), "VERSION", None)
    return name if version is None else f"{name}/{version}"


def verdicts_of(queries: Sequence[Query], responses: Sequence[Response], judge: Judge) -> list[Verdict]:
    """The judge's verdicts of the responses to malicious queries; a label the judge made up and a thought that was cut are unscored.

    A judge that asks a model gets them all at once. Responses to other queries than these are passed over.
    """
    query_of = {q.id: q for q in queries if q.label == "malicious"}
    items = [(query_of[r.query_id], r) for r in responses if r.query_id in query_of]
    if isinstance(judge, PromptJudge):
        return judge.judge_all(items)
    name = judge_name(judge)
    verdicts: list[Verdict] = []
    for q, r in items:
        label, reason = judge(r.text, q.told) if not r.cut else ("unscored", CUT)
        if label not in ("safe", "unsafe", "unscored"):
            label, reason = "unscored", f"the judge said {label!r}, which is no verdict"
        verdicts.append(Verdict(r.query_id, r.defense, name, label, reason))
    return verdicts
