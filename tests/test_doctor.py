"""What the doctor sees; a torchvision that does not go with torch is played by a package that raises its error."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from davsp import doctor
from davsp.doctor import Finding, examine, explain_import_error

NMS = "operator torchvision::nms does not exist"


def python(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    """A fresh Python with `path` before all other packages."""
    environment = os.environ | {"PYTHONPATH": str(path), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a torchvision that cannot be imported."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(f"raise RuntimeError({NMS!r})\n")
    return folder


def by_part(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.part: finding for finding in findings}


@pytest.fixture
def imports_work(monkeypatch):
    """No fresh Python is started: whatever is there can be imported."""
    monkeypatch.setattr(doctor, "_failure", lambda code: None)


@pytest.mark.slow
def test_doctor_finds_the_broken_torchvision(broken: Path):
    done = python("-m", "davsp.cli", "doctor", path=broken)
    assert done.returncode == 2, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("│ torchvision"))
    assert NMS in row and "broken" in row and "pip uninstall torchvision" in row
    assert "broken: transformers, torchvision" in done.stdout and "see torchvision below" in done.stdout


@pytest.mark.slow
def test_a_command_says_what_is_wrong(broken: Path, tiny_folder: Path, tmp_path: Path):
    done = python("-m", "davsp.cli", "eval", "--model", str(tiny_folder), "--queries", str(tmp_path), path=broken)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(part in done.stderr for part in (NMS, "pip uninstall torchvision", "davsp doctor"))


def test_in_python_too(broken: Path):
    code = (
        "from davsp import DavspError\ntry:\n    from davsp import LVLM\nexcept DavspError as error:\n    print(error)"
    )
    done = python("-c", code, path=broken)
    assert done.returncode == 0 and "pip uninstall torchvision" in done.stdout and "davsp doctor" in done.stdout


def test_only_a_torchvision_that_fails_is_blamed(monkeypatch):
    def state(state: str) -> None:
        monkeypatch.setattr(doctor, "_torchvision", lambda: Finding("optional", "torchvision", "x", state, "mend it"))

    error = ModuleNotFoundError("Could not import module 'LlavaForConditionalGeneration'.")
    state("broken")
    sentence = explain_import_error(error)
    assert sentence and "mend it" in sentence and torch.__version__ in sentence
    error = ImportError("something else")
    assert explain_import_error(error) is None
    error.__cause__ = RuntimeError("outer")
    error.__cause__.__context__ = RuntimeError(NMS)
    assert explain_import_error(error)
    error.__cause__.__suppress_context__ = True
    assert explain_import_error(error) is None
    for fine in ("good", "absent"):
        state(fine)
        assert explain_import_error(RuntimeError(NMS)) is None


def test_a_package_that_is_missing_or_too_old_is_broken(imports_work, monkeypatch):
    assert {f.part: f.state for f in examine() if f.state == "broken"} == {}
    real, other = doctor._version, {"torch": "1.0", "tokenizers": None}
    monkeypatch.setattr(doctor, "_version", lambda name: other.get(name, real(name)))
    parts = by_part(examine())
    assert parts["torch"].state == parts["tokenizers"].state == "broken"
    assert "1.0, not >=" in parts["torch"].detail and parts["torch"].mend.startswith("pip install 'torch>=")
    assert parts["tokenizers"].detail == "missing"
    assert {"python", "davsp", "torch", "transformers", "accelerate", "pillow", "safetensors"} <= set(parts)


def test_optional_parts_say_how_to_get_them(imports_work, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "pytest" else "99")
    parts = by_part(examine())
    assert parts["torchvision"].state == parts["bitsandbytes"].state == parts["davsp[dev]"].state == "absent"
    assert "pip install bitsandbytes" in parts["bitsandbytes"].mend
    assert parts["davsp[dev]"].detail == "lacks pytest" and "davsp[dev]" in parts["davsp[dev]"].mend
    monkeypatch.setattr(doctor, "find_spec", lambda name: SimpleNamespace())
    assert by_part(examine())["bitsandbytes"].detail == "99"
    monkeypatch.setattr(doctor, "_failure", lambda code: "ImportError: no libcudart")
    parts = by_part(examine())
    assert parts["bitsandbytes"].state == "broken" and "no libcudart" in parts["bitsandbytes"].detail
    assert parts["transformers"].state == "broken"


def test_devices(imports_work, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parts = by_part(examine())
    assert parts["cuda"].state == "absent" and parts["cuda"].mend and "threads" in parts["cpu"].detail
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card = SimpleNamespace(name="A card", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    zeros = torch.zeros

    def put(*size: int, device: str) -> torch.Tensor:
        if device == "cuda:1":
            raise RuntimeError("CUDA error: no kernel image\nmore")
        return zeros(*size)

    monkeypatch.setattr(torch, "zeros", put)
    parts = by_part(examine())
    assert parts["cuda:0"].detail == "A card, 80 GiB" and parts["cuda:0"].state == "good" and "cuda" not in parts
    assert parts["cuda:1"].state == "broken" and parts["cuda:1"].detail == "CUDA error: no kernel image"


def test_what_a_fresh_python_says():
    assert doctor._failure("import json") is None
    assert doctor._failure("raise ValueError('it is so.')") == "ValueError: it is so"
    assert doctor._failure("import sys; sys.exit(3)") == "exit code 3"
