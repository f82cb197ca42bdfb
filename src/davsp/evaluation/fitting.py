"""Which queries a model has no room for: too many tokens, pictures that its family does not take. Known before a run starts."""

from collections.abc import Mapping, Sequence

from davsp.defenses.base import Defense
from davsp.errors import DavspError
from davsp.lvlm import LVLM, AnsweringLVLM
from davsp.query import Query


def fitting(
    lvlm: AnsweringLVLM,
    defenses: Mapping[str, Defense],
    queries: Sequence[Query],
    max_new_tokens: int | None = None,
    skip_broken: bool = False,
) -> tuple[list[Query], str]:
    """The queries that the model can take under every defense, and a sentence on those that are left out.

    Nothing is generated and no picture is decoded. Of a served model nothing is known: its server refuses what it cannot take.
    Later calls of a defense that has some (ECSO) hold answers, so their length is not known yet.

    Args:
        lvlm: the frozen model.
        defenses: by name.
        queries: as for `evaluate`.
        max_new_tokens: the longest answer; None: the model's own `longest`.
        skip_broken: leave out what does not fit, in place of raising.

    Raises:
        DavspError: a query does not fit, or with `skip_broken` none does.
    """
    if not isinstance(lvlm, LVLM):
        return list(queries), ""
    longest = max_new_tokens or lvlm.longest
    reasons = {query.id: why for query in queries if (why := _unfit(lvlm, defenses, query, longest))}
    if not reasons:
        return list(queries), ""
    first = next(iter(reasons))
    if not skip_broken or len(reasons) == len(queries):
        mend = "" if skip_broken else "; or leave out what does not fit by skip_broken=True"
        raise DavspError(f"query {first!r} cannot be asked {reasons[first]}{mend}")
    rest = f", and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    told = "; ".join(f"{name!r} {why}" for name, why in list(reasons.items())[:3])
    note = f"{len(reasons)} of {len(queries)} queries are left out, as the model cannot be asked them: {told}{rest}"
    return [query for query in queries if query.id not in reasons], note


def _unfit(lvlm: LVLM, defenses: Mapping[str, Defense], query: Query, max_new_tokens: int) -> str:
    """Why a query cannot be asked; empty if it can."""
    where = "at all"
    try:
        size = query.size()
        for name, defense in defenses.items():
            where = f"under {name}"
            defense.asked(lvlm).check_query(*defense.outline(query, size), max_new_tokens)
    except DavspError as error:
        return f"{where}: {error}"
    return ""
