"""The file of verdicts, shared by threads and processes."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from davsp import DavspError
from davsp.judges.cache import Ruling, VerdictCache


def test_threads_and_processes_share_a_cache(tmp_path: Path) -> None:
    """Each object stands for a process: it has its own connection."""
    caches = [VerdictCache(tmp_path / "c") for _ in range(3)]
    first = Ruling("safe", "r", "raw")

    def work(i: int) -> None:
        for n in range(40):
            caches[i % 3].put(f"{n}", "j", "p", first if n % 2 else Ruling("unsafe", f"{i}"))

    with ThreadPoolExecutor(9) as pool:
        list(pool.map(work, range(9)))
    again = VerdictCache(tmp_path / "c")
    assert [again.get(f"{n}") for n in range(1, 40, 2)] == [first] * 20
    first_ruling = again.get("0")
    again.put("0", "j", "p", first)
    assert (
        again.get("0") == first_ruling and first_ruling is not None and first_ruling.label == "unsafe"
    )  # the first one stays
    assert again.get("40") is None
    with pytest.raises(ValueError, match="not kept"):
        again.put("41", "j", "p", Ruling("unscored", "no reply"))


def test_a_cache_that_several_make_at_once(tmp_path: Path) -> None:
    """The first moment of `davsp judge --num-processes`: none is told that the file is locked, and no verdict is lost."""
    for turn in range(60):
        start = threading.Barrier(4)

        def make_and_put(i: int, path: Path = tmp_path / f"{turn}", start: threading.Barrier = start) -> None:
            start.wait()
            cache = VerdictCache(path)
            cache.put(f"{i}", "j", "p", Ruling("safe", "r"))
            cache.close()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(make_and_put, range(4)))
        kept = VerdictCache(tmp_path / f"{turn}")
        assert [kept.get(f"{i}") for i in range(4)] == [Ruling("safe", "r")] * 4
        kept.close()


def test_a_file_that_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a kite " * 1000)
    with pytest.raises(DavspError, match="cannot be used to keep verdicts"):
        VerdictCache(tmp_path / "text")
    with pytest.raises(DavspError, match="cannot be used to keep verdicts"):
        VerdictCache(tmp_path / "text" / "below")
    with sqlite3.connect(tmp_path / "later") as file:
        file.execute("PRAGMA user_version=99")
    file.close()
    with pytest.raises(DavspError, match="another version"):
        VerdictCache(tmp_path / "later")
