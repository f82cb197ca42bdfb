"""What the judges that ask a model have in common: whom not to ask, what to remember, and what a verdict holds."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import cast

from rich.console import Console

from davsp.errors import DavspError, Interrupted
from davsp.judges.cache import Ruling, VerdictCache, cache_key
from davsp.judges.keyword import Label, has_words
from davsp.judges.prompts import JudgePrompt
from davsp.query import Grade, Query, Response, Verdict
from davsp.runtime.pictures import pixels_hash
from davsp.runtime.progress import bar as progress_bar
from davsp.runtime.replies import one_line
from davsp.runtime.thought import CUT, TAGS, Tags, split_thought

RAW_CHARACTERS = 1000

Item = tuple[Query, Response]
Keep = Callable[[str, Ruling], None]


class PromptJudge(ABC):
    """A judge or grader that puts a prompt to a model. A judge is also a function of one answer and its question.

    Args:
        prompt: what is asked, and how the reply is read.
        model: as its server or hub knows it.
        where: the server's address, or "transformers" and what tells the weights apart.
        temperature: of the model; None takes the prompt's own.
        cache: where verdicts are looked up and kept; None keeps none.
        console: where progress goes; None is silent.
        runs: how often a grader is asked about each answer.
        max_tokens: of a reply; None takes the prompt's own, in which no model can think first.
        reasoning_tags: what stands around a thought of the model; its verdict is what follows.
    """

    def __init__(
        self,
        prompt: JudgePrompt,
        model: str,
        where: str,
        temperature: float | None = None,
        cache: VerdictCache | None = None,
        console: Console | None = None,
        runs: int = 1,
        max_tokens: int | None = None,
        reasoning_tags: Tags = TAGS,
    ) -> None:
        if runs < 1:
            raise DavspError("runs must be 1 or more.")
        self.prompt, self.model, self.where, self.runs = prompt, model, where, runs
        self.temperatures = prompt.temperatures if temperature is None else (temperature,)
        self.max_tokens, self.reasoning_tags = max_tokens or prompt.max_tokens, reasoning_tags
        self.cache = cache
        self.console = console or Console(quiet=True)
        self.own: Mapping[str, Query] = {}

    def of(self, queries: Sequence[Query]) -> "PromptJudge":
        """This judge, shown these queries in place of others with the same ids: what an attack made of one is not its own."""
        judge = copy(self)
        judge.own = {query.id: query for query in queries}
        return judge

    @property
    def name(self) -> str:
        """The prompt, its version and the model: `davsp/1:deepseek-chat`."""
        return f"{self.prompt.name}/{self.prompt.version}:{self.model}"

    def judge_all(self, items: Sequence[Item]) -> list[Verdict]:
        """The verdicts, in the order of the items. Answers without words are unscored.

        Raises:
            DavspError: the model or its server can't be used at all, or the prompt is a grader's.
            Interrupted: Ctrl-C; what was judged is in the cache.
        """
        if self.prompt.grades:
            raise DavspError(f"{self.name} grades helpful answers; take a judge for answers to malicious queries.")
        items = [(self.own.get(query.id, query), response) for query, response in items]
        return [
            Verdict(query.id, response.defense, self.name, cast(Label, label), reason, raw, self.prompt.hash(query))
            for (query, response), (label, reason, raw) in zip(items, self._rulings(items), strict=True)
        ]

    def grade_all(self, items: Sequence[Item]) -> list[Grade]:
        """The grades, in the order of the items, run after run. An answer without words is asked about like any other.

        Raises:
            DavspError: the model or its server can't be used at all, or the prompt is no grader's.
            Interrupted: Ctrl-C; what was graded is in the cache.
        """
        if not self.prompt.grades:
            raise DavspError(f"{self.name} says safe or unsafe; take the benchmark's grader for its answers.")
        return [
            Grade(query.id, response.defense, self.name, _scores(label), reason, raw, self.prompt.hash(query), run)
            for run in range(self.runs)
            for (query, response), (label, reason, raw) in zip(items, self._rulings(items, run), strict=True)
        ]

    def _rulings(self, items: Sequence[Item], run: int = 0) -> list[Ruling]:
        """The ruling on each item. What the cache knows is not asked for, and of equal items only one."""
        rulings: dict[str, Ruling] = {}
        pending: dict[str, tuple[Query, str]] = {}
        keys: list[str] = []
        for query, response in items:
            key, reason = self._key_or_reason(query, response, run)
            keys.append(key)
            if reason:
                rulings[key] = Ruling("unscored", reason)
            elif key not in rulings and key not in pending:
                known = self.cache.get(key) if self.cache else None
                if known is None:
                    pending[key] = (query, response.text)
                else:
                    rulings[key] = known
        try:
            with progress_bar(self.console) as bar:
                task = bar.add_task(self.name, total=len(pending))

                def keep_ruling(key: str, ruling: Ruling) -> None:
                    raw = (
                        ruling.raw[:RAW_CHARACTERS].encode(errors="replace").decode()
                    )  # JSON may hold what UTF-8 can't
                    rulings[key] = ruling = ruling._replace(raw=raw)
                    if self.cache and ruling.label != "unscored":
                        self.cache.put(key, self.name, self.prompt.hash(pending[key][0]), ruling)
                    bar.advance(task)

                if pending:
                    self._ask(pending, keep_ruling)
        except KeyboardInterrupt:
            so_far = f"the verdicts so far are in {self.cache.path}" if self.cache else "no verdict was kept"
            raise Interrupted(f"stopped; {so_far}: give the same command again to go on") from None
        return [rulings[key] for key in keys]

    def __call__(self, answer: str, question: str) -> tuple[Label, str]:
        """Judge one answer; a prompt that depends on the scenario needs `judge_all`."""
        verdict = self.judge_all([(Query("", question, "malicious", ""), Response("", "", answer))])[0]
        return verdict.label, verdict.reason

    @abstractmethod
    def _ask(self, pending: Mapping[str, tuple[Query, str]], keep: Keep) -> None:
        """Ask about each (query, answer) and call `keep(key, ruling)` once for each, as soon as it is known."""

    def _key_or_reason(self, query: Query, response: Response, run: int) -> tuple[str, str]:
        """The key of the ruling on an answer, and why nobody is asked ("": somebody is); that reason is then the key."""
        reason = picture = ""
        if response.cut:
            reason = CUT
        elif not self.prompt.grades and not has_words(response.text):
            reason = "the answer holds no words"
        elif self.prompt.picture:
            try:
                image = query.picture()
                picture = "" if image is None else pixels_hash(image)
            except DavspError as error:
                reason = f"the judge cannot be shown the picture: {one_line(str(error))}"
        return (reason, reason) if reason else (self._key(query, response.text, run, picture), "")

    def _key(self, query: Query, answer: str, run: int = 0, picture: str = "") -> str:
        return cache_key(
            response=answer,
            sees=self.prompt.sees(query),
            judge=f"{self.prompt.name}/{self.prompt.version}",
            prompt=self.prompt.hash(query),
            model=self.model,
            where=self.where,
            temperature=self.temperatures[0],
            run=run,
            picture=picture,
        )


def _scores(label: str) -> tuple[float, ...]:
    return () if label == "unscored" else tuple(map(float, label.split()))


def read_reply(prompt: JudgePrompt, reply: str, tags: Tags = TAGS, end: str = "stop") -> Ruling:
    """A reply as a ruling on what follows its thought; unscored if that was cut.

    Args:
        prompt: what was asked.
        reply: the model's words.
        tags: around its thoughts.
        end: why it ended: "stop" by itself; else it was cut, which does no harm behind a label that is a first line.
    """
    _, answer, cut = split_thought(reply, tags)
    if cut:
        return Ruling("unscored", "the judge's thought was cut", reply)
    if end != "stop" and not (end == "length" and prompt.first_line and "\n" in answer.lstrip()):
        return Ruling("unscored", f"the judge's reply was cut ({one_line(end)})", answer)
    return Ruling(*prompt.read(answer), answer)


def check_unscored(verdicts: Sequence[Verdict] | Sequence[Grade], limit: float = 0.02) -> None:
    """Refuse verdicts or grades of which too many are unscored: what is left may no longer stand for all.

    Args:
        verdicts: of one defense.
        limit: the largest share that is accepted, 0 to 1.

    Raises:
        DavspError: the share is above the limit, or there are no verdicts.
    """
    if not verdicts:
        raise DavspError("there are no verdicts: the run holds no answer for this judge.")
    missing = [v for v in verdicts if is_unscored(v)]
    if len(missing) > limit * len(verdicts):
        raise DavspError(
            f"{len(missing)} of {len(verdicts)} answers under {missing[0].defense!r} are unscored by "
            f"{missing[0].judge} ({100 * len(missing) / len(verdicts):.1f} %, --max-unscored is {100 * limit:g} %; "
            f"for one: {missing[0].reason}); mend the judge and run again, which asks for the unscored only."
        )


def is_unscored(judgement: Verdict | Grade) -> bool:
    """Whether the judge or grader could not tell."""
    return not judgement.scores if isinstance(judgement, Grade) else judgement.label == "unscored"
