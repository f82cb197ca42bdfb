"""Shapes and types of every signature are checked while the tests run."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may reach the hub

import jaxtyping
import pytest

jaxtyping.install_import_hook("davsp", "checker.checked")  # before davsp is imported

import torch  # noqa: E402

from davsp import LVLM, HarmfulnessVector  # noqa: E402
from tiny import queries, save_tiny  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the tiny model."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def lvlm(tiny_folder: Path) -> LVLM:
    """The tiny model, loaded as any checkpoint is."""
    return LVLM.from_pretrained(tiny_folder, device_map="cpu")


@pytest.fixture(scope="session")
def vector(lvlm: LVLM) -> HarmfulnessVector:
    """A harmfulness vector of the tiny model."""
    return HarmfulnessVector.fit(lvlm, queries("malicious", 8), queries("benign", 8), progress=False)
