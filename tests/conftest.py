"""Shapes and types of every signature are checked while the tests run. Models and data that many tests read are made once a worker.

davsp and torch are imported inside the fixtures: the process that only hands out tests to pytest-xdist's workers needs neither.
"""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).parents[1] / "perf"))  # behind the tests' own, which have a proxy, too
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may reach the hub
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in every program that a test starts

import jaxtyping
import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored
jaxtyping.install_import_hook("davsp", "checker.checked")  # before davsp is imported

if TYPE_CHECKING:
    from davsp import LVLM, HarmfulnessVector, VisualSafetyPrompt
    from davsp.embedded.data import Protocol


@pytest.fixture(scope="session", autouse=True)
def drawn_once() -> None:
    """The embedded protocol takes seconds to draw, and many commands draw the same one: here once a worker."""
    from dataclasses import fields
    from functools import cache

    from davsp import embedded
    from davsp.embedded.data import Protocol

    draw = cache(embedded.protocol)

    def protocol(*arguments: Any, **sizes: int) -> "Protocol":
        once = draw(*arguments, **sizes)
        return Protocol(**{field.name: list(getattr(once, field.name)) for field in fields(once)})

    embedded.protocol = protocol


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the tiny model."""
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def lvlm(tiny_folder: Path) -> "LVLM":
    """The tiny model, loaded as any checkpoint is."""
    from davsp import LVLM

    return LVLM.from_pretrained(tiny_folder, device_map="cpu")


@pytest.fixture(scope="session")
def vector(lvlm: "LVLM") -> "HarmfulnessVector":
    """A harmfulness vector of the tiny model."""
    from davsp import HarmfulnessVector
    from tiny import queries

    return HarmfulnessVector.fit(lvlm, queries("malicious", 8), queries("benign", 8), progress=False)


@pytest.fixture(scope="session")
def mini() -> "LVLM":
    """davsp-mini, the model that ships."""
    from davsp import embedded

    return embedded.load(device_map="cpu")


@pytest.fixture(scope="module")
def watched(mini: "LVLM") -> "VisualSafetyPrompt":
    """The border that ships for davsp-mini, with eight canaries and two benign ones, of short answers."""
    from davsp.app.compare import border_of, shipped_folder
    from davsp.defenses.effect import choose
    from davsp.embedded.canaries import candidates
    from upstreams import TOKENS

    folder = shipped_folder("davsp-mini")
    assert folder is not None
    shipped = border_of(folder / "vsp.png").quantised()
    shipped.canaries = choose(mini, shipped, candidates(12, 2), most=8, max_new_tokens=TOKENS)
    return shipped


@pytest.fixture(scope="session")
def protocol() -> "Protocol":
    """The vector's data and the test of davsp-mini's seed 0, whole; no test trains on it, so there is hardly more (drawing takes seconds)."""
    from davsp import embedded

    return embedded.protocol(0, sweep=1, train=1)
