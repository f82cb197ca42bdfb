"""What the judges that ask a model have in common: whom not to ask, what to remember, and what a verdict holds."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from davsp.errors import DavspError, Interrupted
from davsp.judges.cache import Finding, VerdictCache, cache_key
from davsp.judges.keyword import Label, has_words
from davsp.judges.prompts import Prompt
from davsp.query import Query, Response, Verdict

RAW_CHARACTERS = 1000

Item = tuple[Query, Response]
Keep = Callable[[str, Finding], None]


class PromptJudge(ABC):
    """A judge that puts a prompt to a model. It is also a `Judge`: a function of one answer and its question.

    Args:
        prompt: what is asked, and how the reply is read.
        model: as its server or hub knows it.
        where: the server's address, or "transformers" and what tells the weights apart.
        temperature: of the model.
        cache: where verdicts are looked up and kept; None keeps none.
        console: where progress goes; None is silent.
    """

    def __init__(
        self,
        prompt: Prompt,
        model: str,
        where: str,
        temperature: float = 0.0,
        cache: VerdictCache | None = None,
        console: Console | None = None,
    ) -> None:
        self.prompt, self.model, self.where = prompt, model, where
        self.temperature, self.cache = temperature, cache
        self.console = console or Console(quiet=True)

    @property
    def name(self) -> str:
        """Prompt, its version and the model: `davsp/1:deepseek-chat`."""
        return f"{self.prompt.name}/{self.prompt.version}:{self.model}"

    def judge_all(self, items: Sequence[Item]) -> list[Verdict]:
        """The verdicts, in the order of the items.

        Answers without words are unscored, and those that the cache knows are not asked for; the same answer (to the
        same question, where the judge sees it) is asked for once.

        Raises:
            DavspError: the model or its server can't be used at all.
            Interrupted: Ctrl-C; what was judged is in the cache.
        """
        found: dict[str, Finding] = {}
        pending: dict[str, tuple[Query, str]] = {}
        keys = [self._key(query, response.text) for query, response in items]
        for key, (query, response) in zip(keys, items, strict=True):
            if not has_words(response.text):
                found[key] = Finding("unscored", "the answer holds no words")
            elif key not in found and key not in pending:
                known = self.cache.get(key) if self.cache else None
                if known is None:
                    pending[key] = (query, response.text)
                else:
                    found[key] = known
        try:
            with _bar(self.console) as bar:
                task = bar.add_task(self.name, total=len(pending))

                def keep(key: str, finding: Finding) -> None:
                    raw = (
                        finding.raw[:RAW_CHARACTERS].encode(errors="replace").decode()
                    )  # JSON may hold what UTF-8 can't
                    found[key] = finding = finding._replace(raw=raw)
                    if self.cache and finding.label != "unscored":
                        self.cache.put(key, self.name, self.prompt.hash(pending[key][0]), finding)
                    bar.advance(task)

                if pending:
                    self._ask(pending, keep)
        except KeyboardInterrupt:
            kept = f"the verdicts so far are in {self.cache.path}" if self.cache else "no verdict was kept"
            raise Interrupted(f"stopped; {kept}: give the same command again to go on") from None
        return [
            Verdict(query.id, response.defense, self.name, *found[key], self.prompt.hash(query))
            for key, (query, response) in zip(keys, items, strict=True)
        ]

    def __call__(self, answer: str, question: str) -> tuple[Label, str]:
        """Judge one answer; a prompt that depends on the scenario needs `judge_all`."""
        verdict = self.judge_all([(Query("", question, "malicious", ""), Response("", "", answer))])[0]
        return verdict.label, verdict.reason

    @abstractmethod
    def _ask(self, pending: Mapping[str, tuple[Query, str]], keep: Keep) -> None:
        """Ask about each (query, answer) and call `keep(key, finding)` once for each, as soon as it is known."""

    def _key(self, query: Query, answer: str) -> str:
        return cache_key(
            response=answer,
            question=query.question if self.prompt.shows_question(query) else "",
            judge=f"{self.prompt.name}/{self.prompt.version}",
            prompt=self.prompt.hash(query),
            model=self.model,
            where=self.where,
            temperature=self.temperature,
        )


def read_reply(prompt: Prompt, reply: str) -> Finding:
    """A finished reply as a finding."""
    return Finding(*prompt.read(reply), reply)


def check_unscored(verdicts: Sequence[Verdict], limit: float = 0.02) -> None:
    """Refuse verdicts of which too many are unscored: what is left may no longer stand for all.

    Args:
        verdicts: of one defense.
        limit: the largest share that is accepted, 0 to 1.

    Raises:
        DavspError: the share is above the limit, or there are no verdicts.
    """
    if not verdicts:
        raise DavspError("there are no verdicts: the run holds no answer to a malicious query.")
    missing = [v for v in verdicts if v.label == "unscored"]
    if len(missing) > limit * len(verdicts):
        raise DavspError(
            f"{len(missing)} of {len(verdicts)} answers under {missing[0].defense!r} are unscored by "
            f"{missing[0].judge} ({100 * len(missing) / len(verdicts):.1f} %, --max-unscored is {100 * limit:g} %; "
            f"for one: {missing[0].reason}); mend the judge and run again, which asks for the unscored only."
        )


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=console.quiet)
