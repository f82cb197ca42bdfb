"""Verdicts of judges, kept in one sqlite file: a second run asks nothing, a killed one only what is missing.

A row's key is a hash of the response, what the judge sees of the question (of a picture the pixels), the judge, the hash of its
prompt, the model, where that runs, the temperature and the run. Labels are safe and unsafe, or a grader's scores ("0.5", "8 10").
What was unscored is not kept and is asked again. The file holds hashes and the judge's words, neither responses nor
questions nor keys of any service.
"""

import json
import sqlite3
import threading
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from davsp.errors import DavspError

SCHEMA = 2
_TABLE = """CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY, judge TEXT NOT NULL, prompt TEXT NOT NULL,
    label TEXT NOT NULL CHECK (label NOT IN ('', 'unscored')), reason TEXT NOT NULL, raw TEXT NOT NULL,
    time TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP)"""


class Ruling(NamedTuple):
    """A label (safe, unsafe, a grader's scores, or unscored), the reason for it, and the judge's own words."""

    label: str
    reason: str
    raw: str = ""


def cache_key(
    *,
    response: str,
    sees: str,
    judge: str,
    prompt: str,
    model: str,
    where: str,
    temperature: float,
    run: int = 0,
    picture: str = "",
) -> str:
    """The hash under which a verdict is kept; every argument matters.

    Args:
        picture: hash of the picture that the judge is shown; "" for none, which leaves the keys of before as they were.
    """
    parts = [response, sees, judge, prompt, model, where, temperature, run, *([picture] if picture else [])]
    return sha256(json.dumps(parts).encode()).hexdigest()


class VerdictCache:
    """The file. Threads share one object; processes share the file, each with its own object.

    Every verdict is a transaction of its own, so a kill loses none that was stored.

    Args:
        path: made if missing, with its folder; on a disk whose locks hold (not every network file system's do).

    Raises:
        DavspError: not such a file, or one of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._lock = Path(path), threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            # One transaction, so of several processes that make the file one does and the others wait. A write-ahead log
            # would not: whoever asks for that mode while another does is refused at once, whatever the timeout.
            with self._file:
                self._file.execute("BEGIN IMMEDIATE")
                version = self._file.execute("PRAGMA user_version").fetchone()[0]
                if version not in (0, SCHEMA):
                    raise DavspError(f"{path} was written by another version of davsp; give another --cache.")
                self._file.execute(_TABLE)
                self._file.execute(f"PRAGMA user_version={SCHEMA}")
        except (sqlite3.Error, OSError) as error:
            raise DavspError(f"{path} cannot be used to keep verdicts ({error}); give another --cache.") from error

    def get(self, key: str) -> Ruling | None:
        """The ruling under the key, if there is one."""
        row = self._run("SELECT label, reason, raw FROM verdicts WHERE key = ?", (key,)).fetchone()
        return None if row is None else Ruling(*row)

    def put(self, key: str, judge: str, prompt: str, ruling: Ruling) -> None:
        """Keep a verdict; the first one under a key stays.

        Raises:
            ValueError: the ruling is unscored.
            DavspError: the disk is full.
        """
        if ruling.label in ("", "unscored"):
            raise ValueError("what is unscored is not kept")
        self._run(
            "INSERT INTO verdicts (key, judge, prompt, label, reason, raw) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO NOTHING",
            (key, judge, prompt, *ruling),
        )

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _run(self, statement: str, values: tuple[str, ...]) -> sqlite3.Cursor:
        try:
            with self._lock:
                return self._file.execute(statement, values)
        except sqlite3.DatabaseError as error:
            raise DavspError(f"{self.path} cannot be used ({error}); free space or give another --cache.") from error
