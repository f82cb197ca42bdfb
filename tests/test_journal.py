"""The journal: what is kept under an identity goes on under the same alone, and appended lines outlive a kill."""

import errno
import json
import os
from pathlib import Path

import pytest

from davsp import DavspError
from davsp.runtime import journal
from davsp.runtime.files import write_json

IDENTITY = {"eps": (2, 8), "share": 0.1, "data": {"train": "abc"}}


def test_a_state_goes_on_under_the_same_identity_alone(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    assert journal.restore(path, IDENTITY, rows=list) is None
    write_json(path, {"identity": IDENTITY, "rows": [1]})
    assert journal.restore(path, IDENTITY, rows=list) == {"identity": {**IDENTITY, "eps": [2, 8]}, "rows": [1]}
    for other, names in (
        ({**IDENTITY, "eps": (2, 9), "share": 0.2}, "eps, share"),
        ({**IDENTITY, "data": {"train": "abd"}}, "data"),
        ({**IDENTITY, "more": None}, "more"),  # a field that is missing is not one that is None
        ({"eps": (2, 8), "share": 0.1}, "data"),
    ):
        with pytest.raises(
            DavspError, match=rf"search\.json is of a run with other settings \({names}\): choose another"
        ):
            journal.restore(path, other, rows=list)


@pytest.mark.parametrize("state", [[], {"rows": []}, {"identity": IDENTITY}, {"identity": IDENTITY, "rows": "x"}])
def test_what_is_no_state_is_refused(tmp_path: Path, state: object) -> None:
    write_json(tmp_path / "a.json", state)
    with pytest.raises(DavspError, match=r"a\.json is not a state to go on from .*; delete it to start anew"):
        journal.restore(tmp_path / "a.json", IDENTITY, rows=list)


def test_a_record_is_written_once_and_then_compared(tmp_path: Path) -> None:
    path = tmp_path / "run" / "attack.json"
    journal.record(path, IDENTITY)
    before = path.read_bytes()
    journal.record(path, IDENTITY, expected=True)
    assert path.read_bytes() == before and json.loads(before)["eps"] == [2, 8]
    with pytest.raises(
        DavspError, match=r"attack\.json is of a run with other settings \(share\): .* delete .*run to start anew"
    ):
        journal.record(path, {**IDENTITY, "share": 1})
    path.write_text("[]")
    with pytest.raises(DavspError, match="no record of a run"):
        journal.record(path, IDENTITY)
    path.unlink()
    with pytest.raises(DavspError, match=r"cannot read .*attack\.json"):
        journal.record(path, IDENTITY, expected=True)


def test_lines_are_on_the_disk_and_a_torn_one_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced, fsync = tmp_path / "a.jsonl", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size) or fsync(handle))
    journal.append(path, "one\n")
    journal.append(path, "two\u2028δ\n")
    assert synced == [4, 4 + len("two\u2028δ\n".encode())]
    assert journal.lines(path) == [b"one", "two\u2028δ".encode()]
    with path.open("a") as file:
        file.write("thr")
    assert len(journal.lines(path)) == 2

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DavspError, match=r"cannot write .*a\.jsonl: No space left on device; free space and run again"):
        journal.append(path, "four\n")
