"""The GPU script on tiny shapes, and the published shapes' number of parameters."""

from typing import Any

import gpu
import pytest
import random_shapes
import torch


@pytest.mark.parametrize("name", random_shapes.SHAPES)
def test_published_shapes_have_their_number_of_parameters(name):
    with torch.device("meta"):
        model, _, _ = random_shapes.SHAPES[name][0](False)
    # as they are known by; no card could be read here
    billions = {"LLaVA-1.5-13B": 13.35, "Qwen2.5-VL-7B": 8.29, "InternVL3-8B": 7.95}
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions[name], abs=0.01)


def test_the_gpu_script_runs_on_a_tiny_shape(monkeypatch):
    monkeypatch.setattr(gpu, "TOKENS", 3)
    found = gpu.measure(random_shapes.build("Qwen2.5-VL-7B", True, "cpu", torch.float32), 1, True)
    assert set(found["ways"]) == {f"step, {way}" for way in gpu.WAYS} | {"generate, undefended", "generate, border"}
    assert all(len(row["seconds"]) == 1 for row in found["ways"].values())


def test_the_gpu_script_says_what_had_no_memory(monkeypatch):
    lvlm = random_shapes.build("InternVL3-8B", True, "cpu", torch.float32)

    def full(*arguments: Any, **options: Any) -> Any:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(gpu, "TOKENS", 3)
    monkeypatch.setattr(gpu, "published", full)
    found = gpu.measure(lvlm, 1, True)["ways"]
    assert found["step, published"] == {"error": "out of memory"} and found["step, ours"]["seconds"]
