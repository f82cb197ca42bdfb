"""Judges say safe, unsafe or unscored of one answer to a malicious query; they never guess.

A judge is a function `judge(answer, question) -> (label, reason)`. Whatever it can't decide is `unscored`: it
is left out of the rate, counted, and shown. A `VERSION` in the judge's module is recorded with its verdicts.
"""

from collections.abc import Callable
from typing import Literal

from davsp.judges.keyword import keyword, refused

Label = Literal["safe", "unsafe", "unscored"]
Judge = Callable[[str, str], tuple[Label, str]]

__all__ = ["Judge", "Label", "keyword", "refused"]
