"""`davsp doctor`: what is installed, what it runs on, what is broken and how to mend it. Cheap to import."""

import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import davsp
from davsp.errors import DavspError

if TYPE_CHECKING:
    from rich.console import Console

CLASSES = "from transformers import AutoImageProcessor, AutoModelForImageTextToText, LlavaForConditionalGeneration"
SECONDS = 300  # a first import of torch from a slow disk takes a minute


@dataclass(frozen=True)
class Finding:
    """One row: a part, what is there of it, whether davsp can use it ("absent": it can do without), and the mend."""

    section: Literal["needed", "devices", "optional"]
    part: str
    detail: str
    state: Literal["good", "absent", "broken"] = "good"
    mend: str = ""


def examine() -> list[Finding]:
    """Look at this Python: needed packages, devices, optional parts. Takes as long as three imports of torch.

    Raises:
        DavspError: davsp itself was not installed by pip.
    """
    return [*_needed(), *_devices(), *_optional()]


def print_findings(console: "Console", findings: list[Finding]) -> None:
    """One table with a section a kind, and a last line that says whether all can be used."""
    from rich.text import Text

    from davsp.runtime.table import TextTable

    table = TextTable("part", "what is here", "state", "what to do", right=False)
    colours = {"good": "green", "absent": "dim", "broken": "bold red"}
    for before, finding in zip([None, *findings], findings, strict=False):
        if before and before.section != finding.section:
            table.add_section()
        state = Text(finding.state, colours[finding.state])
        table.add_row(Text(finding.part), Text(finding.detail), state, Text(finding.mend))  # davsp[dev] is no markup
    table.print(console)
    broken = [finding.part for finding in findings if finding.state == "broken"]
    console.print(f"broken: {', '.join(broken)}" if broken else "all that davsp needs can be used", markup=False)


def explain_import_error(error: BaseException) -> str | None:
    """One sentence, if this error comes from a torchvision that does not go with torch; None if not.

    The PyPI wheel beside a CPU build of torch cannot be imported, and then most classes of transformers cannot either.
    It says "Could not import module"; the reason stands in the error's causes. The torchvision that is installed is
    tried in a fresh Python before it is blamed.
    """
    messages = " ".join(str(cause) for cause in _causes(error)).lower()
    if "torchvision" not in messages and "could not import module" not in messages:
        return None
    torchvision = _torchvision()
    if torchvision.state != "broken":
        return None
    return (
        f"torchvision {torchvision.detail} beside torch {_version('torch') or ''}, and transformers fails with it: "
        f"{torchvision.mend}; `davsp doctor` shows what else is installed."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


# -- needed ------------------------------------------------------------------------------------------------------------


def _needed() -> Iterator[Finding]:
    yield Finding("needed", "python", f"{platform.python_version()} ({platform.system()}, {platform.machine()})")
    yield Finding("needed", "davsp", davsp.__version__)
    for requirement in _requirements():
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        yield _package(requirement)


def _package(requirement: Any) -> Finding:
    name, version, mend = requirement.name, _version(requirement.name), f"pip install '{requirement}'"
    if version is None:
        return Finding("needed", name, "missing", "broken", mend)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding("needed", name, f"{version}, not {requirement.specifier}", "broken", mend)
    if name == "torch":
        return _torch(version)
    if name == "transformers" and (why := _failure(CLASSES)):
        mend = (
            "see torchvision below" if _torchvision().state == "broken" else f"pip install --force-reinstall '{name}'"
        )
        return Finding("needed", name, f"{version}, but {why}", "broken", mend)
    return Finding("needed", name, version)


def _torch(version: str) -> Finding:
    try:
        import torch
    except Exception as error:  # a library of the system is missing, or a file of the wheel
        why = f"{version}, but {type(error).__name__}: {error}"
        return Finding("needed", "torch", why, "broken", "install torch anew: https://pytorch.org/get-started")
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    build = f"CUDA {cuda} build" if cuda else f"ROCm {hip} build" if hip else "CPU build"
    return Finding("needed", "torch", f"{version} ({build})")


def _requirements() -> list[Any]:
    """What davsp's own metadata asks for, extras included, as `packaging` reads it."""
    from packaging.requirements import Requirement  # transformers and accelerate bring it

    try:
        lines = metadata.requires("davsp") or []
    except metadata.PackageNotFoundError as error:
        raise DavspError("davsp is not installed, so its requirements are unknown; run `pip install -e .`") from error
    return [Requirement(line) for line in lines]


# -- devices -----------------------------------------------------------------------------------------------------------


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except Exception:  # said above, with the reason
        return
    yield Finding("devices", "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    with warnings.catch_warnings(record=True) as caught:  # of a driver too old, torch speaks by a warning
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        yield _cuda(index)
    if not count:
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        why = str(caught[0].message).splitlines()[0] if caught else "no GPU is seen"
        mend = (
            "for one: check the driver with nvidia-smi"
            if built
            else "for one: a CUDA build of torch, https://pytorch.org/get-started"
        )
        yield Finding("devices", "cuda", why, "absent", mend)
    mps = torch.backends.mps.is_available()
    yield Finding("devices", "mps", "there" if mps else "no Apple GPU", "good" if mps else "absent")


def _cuda(index: int) -> Finding:
    import torch

    part = f"cuda:{index}"
    try:
        properties = torch.cuda.get_device_properties(index)
        torch.zeros(1, device=part).cpu()
    except Exception as error:  # torch has several classes for it
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return Finding("devices", part, why, "broken", "see nvidia-smi, or choose --device cpu")
    return Finding("devices", part, f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")


# -- optional ----------------------------------------------------------------------------------------------------------


def _optional() -> Iterator[Finding]:
    yield _torchvision()
    yield _bitsandbytes()
    requirements = _requirements()
    for extra in metadata.metadata("davsp").get_all("Provides-Extra") or []:
        names = [r.name for r in requirements if r.marker and r.marker.evaluate({"extra": extra})]
        if missing := [name for name in names if _version(name) is None]:
            mend = f"pip install 'davsp[{extra}]'"
            yield Finding("optional", f"davsp[{extra}]", f"lacks {', '.join(missing)}", "absent", mend)
        else:
            yield Finding("optional", f"davsp[{extra}]", "complete")


def _torchvision() -> Finding:
    if find_spec("torchvision") is None:
        return Finding("optional", "torchvision", "not needed", "absent")
    if why := _failure("import torchvision"):
        mend = "run `pip uninstall torchvision` (davsp does without)"
        return Finding("optional", "torchvision", f"cannot be imported ({why})", "broken", mend)
    return Finding("optional", "torchvision", f"{_version('torchvision') or 'there'}, not needed")


def _bitsandbytes() -> Finding:
    if find_spec("bitsandbytes") is None:
        mend = "for 4-bit models on a GPU: pip install bitsandbytes"
        return Finding("optional", "bitsandbytes", "not installed", "absent", mend)
    if why := _failure("import bitsandbytes"):
        mend = "pip install --upgrade bitsandbytes, or uninstall it"
        return Finding("optional", "bitsandbytes", f"cannot be imported ({why})", "broken", mend)
    return Finding("optional", "bitsandbytes", _version("bitsandbytes") or "there")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _failure(code: str) -> str | None:
    """The last line of the error, if a fresh Python cannot run `code`; a failed import may leave halves behind here."""
    try:
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"not done after {SECONDS} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].rstrip(".")
