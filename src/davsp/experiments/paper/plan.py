"""`davsp reproduce --dry-run`: what would be run, how often the model is called, and how long that takes at a given pace."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from davsp.experiments.paper.methods import PROMPTS
from davsp.experiments.paper.run import needed

if TYPE_CHECKING:
    from davsp.embedded.data import Protocol

# the paper's test: MM-SafetyBench's 1,480 questions in three types, FigStep, MM-Vet's rest, MME, LLaVA-Bench
PUBLISHED = {"sd_typo": 1480, "sd": 1480, "typo": 1480, "figstep": 500, "mm_vet": 118, "mme": 2374, "llava_bench": 60}
CALLS = {"ecso": 4, "ecso+davsp": 4, "ecso-adaptive+davsp": 3}  # at most; a harmless answer takes two


def dry(
    names: Sequence[str], model: str, data: "Protocol | None", max_new_tokens: int, per_call: float | None = None
) -> str:
    """A table of cells in plain text.

    Args:
        names: of the tables.
        data: the embedded protocol; None: the published sets at their full size.
        max_new_tokens: the longest answer.
        per_call: seconds a model call takes, with batches counted in; None: a guess until it was measured, 0.3 for 48 tokens and
            2 ms for each token more, as if all answers were that long.
    """
    if per_call is None:
        per_call = 0.3 + 0.002 * (max_new_tokens - 48)
    sizes = dict(PUBLISHED)
    if data is not None:
        sizes = {}
        for query in data.test:
            sizes[query.benchmark] = sizes.get(query.benchmark, 0) + 1
    total = sum(sizes.values())
    defenses = needed(names)
    lines = [
        f"{', '.join(names)} on {model}: {total} test queries ({', '.join(f'{k} {v}' for k, v in sizes.items())})",
        "",
    ]
    lines.append(f"{'defense':<22}{'queries':>9}{'calls':>9}{'hours':>8}  trained here")
    calls_in_all = 0
    for name in defenses:
        calls = total * CALLS.get(name, 1)
        calls_in_all += calls
        trained_here = "yes" if name in PROMPTS else ""
        lines.append(f"{name:<22}{total:>9}{calls:>9}{calls * per_call / 3600:>8.2f}  {trained_here}")
    trained = [name for name in defenses if name in PROMPTS]
    lines += ["", f"{calls_in_all} calls at most, {calls_in_all * per_call / 3600:.1f} hours at {per_call:.3g} s a call "
              f"(answers of up to {max_new_tokens} tokens), and the training of {len(trained)} prompts ({', '.join(trained) or 'none'})."]  # fmt: skip
    return "\n".join(lines)
