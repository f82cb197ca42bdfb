"""Whole files or none."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from davsp import DavspError
from davsp.runtime import files


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_round_trips(tmp_path):
    files.write_text(tmp_path / "deep" / "a.txt", "räksmörgås")
    assert (tmp_path / "deep" / "a.txt").read_text() == "räksmörgås"
    files.write_json(tmp_path / "a.json", {"b": [1, 0.5, "δ"]})
    assert files.read_json(tmp_path / "a.json") == {"b": [1, 0.5, "δ"]}
    tensors = {"x": torch.randn(2, 3), "y": torch.arange(4)}
    files.save_tensors(tmp_path / "t.safetensors", tensors, {"step": "3"})
    read, metadata = files.read_tensors_and_metadata(tmp_path / "t.safetensors")
    assert metadata == {"step": "3"} and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert files.sha256(tmp_path / "deep" / "a.txt") == files.sha256_bytes("räksmörgås".encode())


def test_json_takes_paths_and_nothing_else_it_does_not_know(tmp_path):
    files.write_json(tmp_path / "a.json", {"folder": tmp_path})
    assert files.read_json(tmp_path / "a.json") == {"folder": str(tmp_path)}
    with pytest.raises(TypeError, match="Tensor"):
        files.to_json({"loss": torch.zeros(1)})


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a.json"
    files.write_json(path, 1)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(DavspError, match=r"cannot write .*a\.json: No space left on device; free space"):
        files.write_json(path, 2)
    monkeypatch.undo()
    assert files.read_json(path) == 1 and list(tmp_path.iterdir()) == [path]


def test_several_files_are_staged_before_the_first_is_replaced(tmp_path, monkeypatch):
    files.write_all(tmp_path, {"a": b"1", "b": b"1"})
    calls, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: full() if len(calls) else calls.append(real(handle)))
    with pytest.raises(DavspError, match="cannot write"):
        files.write_all(tmp_path, {"a": b"2", "b": b"2"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"1", "b": b"1"}


def test_a_folder_is_one_process_s_until_it_dies(tmp_path):
    hold = "import sys, time; from davsp.runtime.files import alone\nwith alone(sys.argv[1]):\n print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "run")], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DavspError, match=r"another davsp is writing into .*run"), files.alone(tmp_path / "run"):
            pass
        other.kill()
    with files.alone(tmp_path / "run"):
        assert list((tmp_path / "run").iterdir()) == []


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", full)
    with pytest.warns(UserWarning, match="cannot be locked"), files.alone(tmp_path):
        pass


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(DavspError, match=r"cannot read .*nothing\.json"):
        files.read_json(tmp_path / "nothing.json")
    (tmp_path / "bad").write_bytes(b"\x00nonsense")
    with pytest.raises(DavspError, match="is not JSON"):
        files.read_json(tmp_path / "bad")
    with pytest.raises(DavspError, match="is not a safetensors file"):
        files.read_tensors(tmp_path / "bad")
    with pytest.raises(DavspError, match="not a finite number"):
        files.write_json(tmp_path / "nan.json", float("nan"))


def test_ordinary_permissions(tmp_path):
    files.write_text(tmp_path / "a", "")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_manifest_names_versions_and_what_it_is_given():
    facts = files.manifest(seed=3)
    assert facts["seed"] == 3 and facts["torch"] == torch.__version__
    assert {"davsp", "python", "transformers", "pillow", "platform", "cpus", "torch_threads", "time", "argv"} <= set(
        facts
    )
