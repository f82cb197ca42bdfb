"""From the names that --judge takes to judges and graders."""

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

NAMES = (
    "keyword, keyword-gcg, keyword-adashield, keyword-vlguard, keyword-lmms-eval; davsp, davsp-mmsafety, mm-safetybench, "
    "adashield; llama-guard-3, llama-guard-4, harmbench; of MM-Vet mm-vet or exact, of LLaVA-Bench llava-bench or overlap."
)


@dataclass(frozen=True)
class Asking:
    """How judges that ask a model are asked.

    Attributes:
        base_url: an OpenAI-compatible server; None: OpenAI, and guards run here.
        model: to ask; None: a guard's own weights, if it runs here.
        api_key_env: environment variable with the key; None: OPENAI_API_KEY for OpenAI, none else.
        concurrency: requests under way at most.
        timeout: of a request, seconds.
        cache: file of verdicts.
        device: of a guard that runs here.
        console: for progress.
    """

    base_url: str | None
    model: str | None
    api_key_env: str | None
    concurrency: int
    timeout: float
    cache: Path
    device: str | None
    console: "Console"


def named(name: str, asking: Asking) -> Any:
    """The judge or grader of that name.

    Raises:
        DavspError: no such name, or no model to ask.
    """
    from davsp.judges import keyword
    from davsp.judges.graders import GRADERS, exact, overlap
    from davsp.judges.keyword_lists import LISTS
    from davsp.judges.prompts import CHAT

    alone = {"keyword": keyword, **LISTS, "exact": exact, "overlap": overlap}
    if name in alone:
        return alone[name]
    from davsp.client import OPENAI
    from davsp.judges.cache import VerdictCache
    from davsp.judges.chat import ChatJudge
    from davsp.judges.guard import GUARDS, LocalGuard

    if name in GUARDS and asking.base_url is None:
        return LocalGuard(
            GUARDS[name], asking.model, device=asking.device, cache=VerdictCache(asking.cache), console=asking.console
        )
    prompts = CHAT | GUARDS | GRADERS
    if name not in prompts:
        raise DavspError(f"there is no judge {name!r}; choose one of {', '.join([*alone, *prompts])}.")
    if asking.model is None:
        raise DavspError(f"--judge-model is missing: the judge {name} asks a model on a server.")
    variable = asking.api_key_env or ("OPENAI_API_KEY" if asking.base_url is None else None)
    return ChatJudge(
        prompts[name], asking.model, asking.base_url or OPENAI, variable,
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
