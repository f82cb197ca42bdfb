"""From the names that --judge takes to judges and graders."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from davsp.cli.inputs import say, terminal
from davsp.errors import DavspError

if TYPE_CHECKING:
    from rich.console import Console

    from davsp.cli.options import JudgeOptions, RequestOptions
    from davsp.query import Query
    from davsp.runtime.thought import Tags

GRADER_OF = {"mm-vet": "mm_vet", "exact": "mm_vet", "llava-bench": "llava_bench", "overlap": "llava_bench"}
"""Grader -> the published set that it grades; all other names are judges of answers to malicious queries."""

IN_RUNS = "mm-vet"
"""The grader whose published figure is a mean over several runs; LLaVA-Bench's is of one."""

NAMES = (
    "keyword (agrees with a strong judge on 58 % of real answers), keyword-gcg, keyword-adashield, keyword-vlguard, keyword-lmms-eval; davsp, davsp-mmsafety, mm-safetybench, "
    "adashield; llama-guard-3, llama-guard-4, harmbench; of MM-Vet mm-vet or exact, of LLaVA-Bench llava-bench or overlap."
)


@dataclass(frozen=True)
class JudgeSettings:
    """How judges that ask a model do so.

    Attributes:
        urls: judge -> its OpenAI-compatible server; not there: OpenAI, and guards run here.
        models: judge -> the model to ask; not there: a guard's own weights, if it runs here.
        variables: judge -> environment variable with the key; not there: OPENAI_API_KEY for OpenAI, none else.
        runs: how often the grader `IN_RUNS` is asked about each answer.
        requests: under way at most, and seconds for one.
        cache: file of verdicts.
        device: of a guard that runs here.
        console: for progress, on stderr.
        max_tokens: of a reply; None: as long as a label needs.
        reasoning_tags: around thoughts, of the judges and of the model that is judged.
        sees: judge -> "picture"; not there: text alone.
    """

    urls: Mapping[str, str]
    models: Mapping[str, str]
    variables: Mapping[str, str]
    runs: int
    requests: "RequestOptions"
    cache: Path
    device: str | None
    console: "Console"
    max_tokens: int | None
    reasoning_tags: "Tags"
    sees: Mapping[str, str]


def judge_settings(
    names: Sequence[str],
    options: "JudgeOptions",
    requests: "RequestOptions",
    cache: Path,
    device: str | None,
    runs: int | None = None,
) -> JudgeSettings:
    """How the judges and graders of a command ask, from its options.

    Args:
        names: of all judges and graders.
        options: each VALUE for all that ask a model, or NAME=VALUE for one of them, which counts before it.
        cache: where verdicts are kept.
        runs: of --grader-runs; None: one.

    Raises:
        DavspError: an option for a judge that is not named or asks no model, or twice for one; an empty variable; runs without
            the grader that has them; a judge named twice; a picture for a judge that sees none.
    """
    from davsp.runtime import keys
    from davsp.runtime.thought import read_tags

    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DavspError(f"--judge names {twice} twice; a second model is asked by davsp judge.")
    if runs is not None and IN_RUNS not in names:
        raise DavspError(f"--grader-runs goes with --judge {IN_RUNS}, whose published score is a mean over runs.")
    url_of = _each("--judge-url", options.judge_url or [], names)
    model_of = _each("--judge-model", options.judge_model or [], names)
    variable_of = _each("--judge-key-env", options.judge_key_env or [], names)
    for variable in variable_of.values():  # a key given in place of its variable would get into the manifest
        keys.read(variable, "judge")
    return JudgeSettings(
        url_of, model_of, variable_of, runs or 1, requests, cache, device, terminal(), options.judge_max_tokens,
        read_tags(options.reasoning_tags), _seeing(options.judge_sees or [], names),
    )  # fmt: skip


def _seeing(values: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The judges of --judge-sees: all of the command, or those that NAME=picture names."""
    from davsp.judges.prompts import CHAT

    here, sees = list(names) or ["keyword"], {}
    for value in values:
        name, equals, what = value.rpartition("=")
        if what != "picture" or (equals and name not in here):
            raise DavspError(
                f"--judge-sees {value!r} is not picture, or NAME=picture with a NAME of the judges here ({', '.join(here)})."
            )
        for one in [name] if equals else here:
            if one not in CHAT:
                others = "; of several judges give NAME=picture for those" if len(here) > 1 else ""
                raise DavspError(f"--judge-sees picture: {one} sees no picture, {', '.join(CHAT)} can{others}.")
            sees[one] = what
    return sees


def _each(option: str, values: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Judge -> its value of an option. No value is repeated in a message: one might be a key."""
    asks = [name for name in names if name not in _alone()]
    for_all: list[str] = []
    for_one: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+", name):  # an address or a path may hold = further on
            for_all.append(value)
        elif name in asks and name not in for_one:
            for_one[name] = rest
        elif name in for_one:
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
    if "" in (*for_all, *for_one.values()):
        raise DavspError(f"{option} has an empty value; leave it out.")
    return dict.fromkeys(asks, *for_all) | for_one if for_all else for_one


def _alone() -> dict[str, Any]:
    """The judges and graders that ask no model."""
    from davsp.judges import keyword
    from davsp.judges.graders import exact, overlap
    from davsp.judges.keyword_lists import LISTS

    return {"keyword": keyword, **LISTS, "exact": exact, "overlap": overlap}


def judge_or_grader(name: str, settings: JudgeSettings) -> Any:
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
    from davsp.judges.seeing import seeing
    from davsp.runtime.client import OPENAI

    url, model = settings.urls.get(name), settings.models.get(name)
    if name in GUARDS and url is None:
        return LocalGuard(
            GUARDS[name], model, device=settings.device, cache=VerdictCache(settings.cache), console=settings.console,
            max_tokens=settings.max_tokens, reasoning_tags=settings.reasoning_tags,
        )  # fmt: skip
    prompts = CHAT | GUARDS | GRADERS
    if name not in prompts:
        raise DavspError(f"there is no judge {name!r}; choose one of {', '.join([*alone, *prompts])}.")
    if model is None:
        raise DavspError(f"--judge-model is missing: the judge {name} asks a model on a server.")
    prompt = seeing(prompts[name]) if name in settings.sees else prompts[name]
    variable = settings.variables.get(name) or ("OPENAI_API_KEY" if url is None else None)
    return ChatJudge(
        prompt, model, url or OPENAI, variable, runs=settings.runs if name == IN_RUNS else 1,
        cache=VerdictCache(settings.cache), concurrency=settings.requests.concurrency,
        timeout=settings.requests.timeout, trust_env=settings.requests.trust_env, console=settings.console,
        max_tokens=settings.max_tokens, reasoning_tags=settings.reasoning_tags,
    )  # fmt: skip


def judges_and_graders(names: Sequence[str], settings: JudgeSettings) -> tuple[list[Any], dict[str, Any]]:
    """The judges in their order (keyword if none is named), and set -> grader.

    Raises:
        DavspError: two graders of one set, or what `judge_or_grader` raises.
    """
    judges = [judge_or_grader(name, settings) for name in names if name not in GRADER_OF]
    graders: dict[str, Any] = {}
    for name in names:
        if name in GRADER_OF:
            if GRADER_OF[name] in graders:
                raise DavspError(f"--judge names two graders of {GRADER_OF[name]}; add the second by davsp judge.")
            graders[GRADER_OF[name]] = judge_or_grader(name, settings)
    return judges or [judge_or_grader("keyword", settings)], graders


def warn_of_keyword(judges: Sequence[Any], shipped: bool) -> str:
    """What is to stand by every table that the first judge makes, if it is the keyword judge of a real model; says so if it is alone."""
    from davsp.judges.keyword import caveat

    sentence = caveat(judges[0], shipped)
    if sentence and len(judges) == 1:
        say(f"warning: keyword is the only judge here. {sentence}")
    return sentence


def caveat_of(judges: Sequence[Any], shipped: bool, queries: "Sequence[Query]") -> str:
    """What is to stand by every table that the first judge makes: what it is worth (`warn_of_keyword`), or that it saw pictures."""
    from davsp.judges.seeing import note

    return " ".join(filter(None, (warn_of_keyword(judges, shipped), note(judges[0], queries))))


def check_prompts(judges: Iterable[Any], queries: "Iterable[Query]") -> None:
    """Raise DavspError if a judge's prompt does not go with a query, before any answer is paid for."""
    from davsp.judges.base import PromptJudge

    malicious = [q for q in queries if q.label == "malicious"]
    for judge in judges:
        if isinstance(judge, PromptJudge):
            for query in malicious:
                judge.prompt.hash(query)


def check_scored(
    groups: Iterable[Mapping[str, Sequence[Any]]], queries: "Iterable[Query]", limit: float, some: bool = False
) -> None:
    """Raise DavspError if one judge or grader left too much of a benchmark under a defense unscored.

    Args:
        groups: of each judge or grader, defense -> verdicts or grades.
        queries: those that were answered.
        limit: the largest share that is accepted.
        some: refuse as well if there is no verdict at all.
    """
    from davsp.judges.base import check_unscored

    benchmark_of = {q.id: q.benchmark for q in queries}
    for group in groups:
        for verdicts in group.values():
            if some:
                check_unscored(verdicts, 1.0)
            parts: dict[tuple[str, str], list[Any]] = {}
            for verdict in verdicts:
                parts.setdefault((verdict.judge, benchmark_of[verdict.query_id]), []).append(verdict)
            for (_, benchmark), part in parts.items():
                try:
                    check_unscored(part, limit)
                except DavspError as error:
                    raise DavspError(f"{benchmark}: {error}") from error
