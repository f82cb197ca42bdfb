"""Judges say safe, unsafe or unscored of one answer to a malicious query; they never guess.

A judge is a function `judge(answer, question) -> (label, reason)`. Whatever it can't decide is `unscored`: it
is left out of the rate, counted, and shown. A `VERSION` in the judge's module is recorded with its verdicts. Judges
that ask a model (`davsp.judges.chat`, `davsp.judges.guard`) are imported from there; docs/judges.md tells of all.
"""

from collections.abc import Callable

from davsp.judges.keyword import Label, keyword, refused, withheld

Judge = Callable[[str, str], tuple[Label, str]]

__all__ = ["Judge", "Label", "keyword", "refused", "withheld"]
