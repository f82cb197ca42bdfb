"""From the names that --judge takes to judges and graders."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from davsp.errors import DavspError

if TYPE_CHECKING:
    from rich.console import Console

    from davsp.query import Query

GRADER_OF = {"mm-vet": "mm_vet", "exact": "mm_vet", "llava-bench": "llava_bench", "overlap": "llava_bench"}
"""Grader -> the published set that it grades; all other names are judges of answers to malicious queries."""

IN_RUNS = "mm-vet"
"""The grader whose published figure is a mean over several runs; LLaVA-Bench's is of one."""

NAMES = (
    "keyword, keyword-gcg, keyword-adashield, keyword-vlguard, keyword-lmms-eval; davsp, davsp-mmsafety, mm-safetybench, "
    "adashield; llama-guard-3, llama-guard-4, harmbench; of MM-Vet mm-vet or exact, of LLaVA-Bench llava-bench or overlap."
)


@dataclass(frozen=True)
class Asking:
    """How judges that ask a model are asked.

    Attributes:
        urls: judge -> its OpenAI-compatible server; not there: OpenAI, and guards run here.
        models: judge -> the model to ask; not there: a guard's own weights, if it runs here.
        variables: judge -> environment variable with the key; not there: OPENAI_API_KEY for OpenAI, none else.
        runs: how often the grader `IN_RUNS` is asked about each answer.
        concurrency: requests under way at most.
        timeout: of a request, seconds.
        cache: file of verdicts.
        device: of a guard that runs here.
        console: for progress.
    """

    urls: Mapping[str, str]
    models: Mapping[str, str]
    variables: Mapping[str, str]
    runs: int
    concurrency: int
    timeout: float
    cache: Path
    device: str | None
    console: "Console"


def asking(
    names: Sequence[str],
    urls: Sequence[str] | None,
    models: Sequence[str] | None,
    variables: Sequence[str] | None,
    runs: int | None,
    **rest: Any,
) -> Asking:
    """How the judges and graders of a command are asked, from its options.

    Args:
        names: of all judges and graders.
        urls, models, variables: VALUE for all that ask a model, or NAME=VALUE for one of them, which counts before it.
        runs: of --grader-runs; None: one.
        rest: the other fields of `Asking`.

    Raises:
        DavspError: an option for a judge that is not named or asks no model, or twice for one; an empty variable; runs without
            the grader that has them; a judge named twice.
    """
    from davsp.runtime import keys

    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DavspError(f"--judge names {twice} twice; a second model is asked by davsp judge.")
    if runs is not None and IN_RUNS not in names:
        raise DavspError(f"--grader-runs goes with --judge {IN_RUNS}, whose published score is a mean over runs.")
    given = {"--judge-url": urls, "--judge-model": models, "--judge-key-env": variables}
    url_of, model_of, variable_of = (_each(option, values or [], names) for option, values in given.items())
    for variable in variable_of.values():  # a key given in place of its variable would get into the manifest
        keys.read(variable, "judge")
    return Asking(url_of, model_of, variable_of, runs or 1, **rest)


def _each(option: str, values: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Judge -> its value of an option. No value is repeated in a message: one might be a key."""
    asks = [name for name in names if name not in _alone()]
    for_all: list[str] = []
    found: dict[str, str] = {}
    for value in values:
        name, equals, own = value.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+", name):  # an address or a path may hold = further on
            for_all.append(value)
        elif name in asks and name not in found:
            found[name] = own
        elif name in found:
            raise DavspError(f"{option} is there twice for {name}; leave one out.")
        else:
            raise DavspError(
                f"{option} is NAME=VALUE with a NAME that is none of the judges here that ask a model "
                f"({', '.join(asks) or 'there are none'})."
            )
    if len(for_all) > 1:
        raise DavspError(f"{option} is there twice for all judges; give NAME=VALUE for each of {', '.join(asks)}.")
    if for_all and not asks:
        raise DavspError(f"{option} goes with a judge that asks a model; {', '.join(names) or 'keyword'} asks none.")
    if "" in (*for_all, *found.values()):
        raise DavspError(f"{option} has an empty value; leave it out.")
    return dict.fromkeys(asks, *for_all) | found if for_all else found


def _alone() -> dict[str, Any]:
    """The judges and graders that ask no model."""
    from davsp.judges import keyword
    from davsp.judges.graders import exact, overlap
    from davsp.judges.keyword_lists import LISTS

    return {"keyword": keyword, **LISTS, "exact": exact, "overlap": overlap}


def named(name: str, asking: Asking) -> Any:
    """The judge or grader of that name.

    Raises:
        DavspError: no such name, or no model to ask.
    """
    if name in (alone := _alone()):
        return alone[name]
    from davsp.judges.cache import VerdictCache
    from davsp.judges.chat import ChatJudge
    from davsp.judges.graders import GRADERS
    from davsp.judges.guard import GUARDS, LocalGuard
    from davsp.judges.prompts import CHAT
    from davsp.runtime.client import OPENAI

    url, model = asking.urls.get(name), asking.models.get(name)
    if name in GUARDS and url is None:
        return LocalGuard(
            GUARDS[name], model, device=asking.device, cache=VerdictCache(asking.cache), console=asking.console
        )
    prompts = CHAT | GUARDS | GRADERS
    if name not in prompts:
        raise DavspError(f"there is no judge {name!r}; choose one of {', '.join([*alone, *prompts])}.")
    if model is None:
        raise DavspError(f"--judge-model is missing: the judge {name} asks a model on a server.")
    variable = asking.variables.get(name) or ("OPENAI_API_KEY" if url is None else None)
    return ChatJudge(
        prompts[name], model, url or OPENAI, variable, runs=asking.runs if name == IN_RUNS else 1,
        cache=VerdictCache(asking.cache), concurrency=asking.concurrency, timeout=asking.timeout, console=asking.console,
    )  # fmt: skip


def sorted_out(names: Sequence[str], asking: Asking) -> tuple[list[Any], dict[str, Any]]:
    """The judges in their order (keyword if none is named), and set -> grader.

    Raises:
        DavspError: two graders of one set, or what `named` raises.
    """
    judges = [named(name, asking) for name in names if name not in GRADER_OF]
    graders: dict[str, Any] = {}
    for name in names:
        if name in GRADER_OF:
            if GRADER_OF[name] in graders:
                raise DavspError(f"--judge names two graders of {GRADER_OF[name]}; add the second by davsp judge.")
            graders[GRADER_OF[name]] = named(name, asking)
    return judges or [named("keyword", asking)], graders


def fit(judges: Iterable[Any], queries: "Iterable[Query]") -> None:
    """Raise DavspError if a judge's prompt does not go with a query, before any answer is paid for."""
    from davsp.judges.base import PromptJudge

    malicious = [q for q in queries if q.label == "malicious"]
    for judge in judges:
        if isinstance(judge, PromptJudge):
            for query in malicious:
                judge.prompt.hash(query)


def check(
    said: Iterable[Mapping[str, Sequence[Any]]], queries: "Iterable[Query]", limit: float, some: bool = False
) -> None:
    """Raise DavspError if of what one judge or grader said of a benchmark under a defense too much is unscored.

    Args:
        said: by defense verdicts, and by defense grades.
        queries: what was asked.
        limit: the largest share that is accepted.
        some: refuse as well if nothing was said.
    """
    from davsp.judges.base import check_unscored

    benchmark_of = {q.id: q.benchmark for q in queries}
    for one in said:
        for verdicts in one.values():
            if some:
                check_unscored(verdicts, 1.0)
            parts: dict[tuple[str, str], list[Any]] = {}
            for one_said in verdicts:
                parts.setdefault((one_said.judge, benchmark_of[one_said.query_id]), []).append(one_said)
            for (_, benchmark), part in parts.items():
                try:
                    check_unscored(part, limit)
                except DavspError as error:
                    raise DavspError(f"{benchmark}: {error}") from error
