"""The measured training step in small: both ways compute the same, and what is timed is the step."""

import json
from pathlib import Path

import pytest
import random_llava
import training_step


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    random_llava.build(folder, random_llava.SMALL)
    return training_step.measure(folder, random_llava.SMALL, "cpu", "float32", rounds=1, apart=False)


def test_the_published_step_and_ours_have_the_same_gradient(steps):
    """Each term apart, early stop and whole depth, micro-batches and checkpointing."""
    compared = {(g["term"], g["way"].removeprefix("benign ").removeprefix("malicious ")) for g in steps["gradients"]}
    ours = {"ours sdpa", "ours sdpa micro-batch 1"}
    less_memory = {"ours sdpa checkpointing", "ours sdpa micro-batch 1 checkpointing"}
    assert compared == {(term, way) for term in training_step.TERMS for way in ours} | {
        (term, way) for term in training_step.TERMS if term.startswith("benign") for way in less_memory
    }
    for g in steps["gradients"]:
        assert g["largest"] > 1e-6 and g["relative"] < 1e-5 and g["cosine"] > 1 - 1e-9, g


def test_both_ways_were_timed(steps):
    assert {(row["who"], row["step"], row["attention"]) for row in steps["ways"].values()} == {
        ("published", "benign", "sdpa"), ("published", "benign", "eager"), ("ours", "benign", "sdpa"),
        ("published", "malicious", "sdpa"), ("published", "malicious", "eager"), ("ours", "malicious", "sdpa"),
    }  # fmt: skip
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in steps["ways"].values())
    assert {t["met"] for t in steps["targets"] if t["target"].startswith("gradient")} == {True}
    training_step.show(json.loads(json.dumps(steps)))


def test_what_each_way_computes(tmp_path):
    """(rows, tokens) that reach the last block: published two passes a sample, the second of 16 + 64; ours one of all."""
    random_llava.build(tmp_path, random_llava.SMALL)
    bench, ways = training_step.Bench(tmp_path, random_llava.SMALL), {way.name: way for way in training_step.WAYS}
    shapes_seen: list[tuple[int, int]] = []
    bench.lvlm.layers[-1].register_forward_hook(
        lambda block, inputs, output: shapes_seen.append(tuple(output.shape[:2]))
    )
    expected = {
        "benign published sdpa": [(1, 31), (1, 80), (1, 31), (1, 80)],
        "malicious published eager": [(1, 31), (1, 31)],
        "benign ours sdpa": [(2, 38)],
        "benign ours sdpa micro-batch 1": [(1, 38), (1, 38)],
        "malicious ours sdpa": [],
    }
    for name, shapes in expected.items():
        bench.step(ways[name], bench.run("both", ways[name]))()
        assert shapes_seen == shapes, name
        shapes_seen.clear()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_of_the_step(tmp_path, monkeypatch):
    random_llava.build(tmp_path, random_llava.SMALL)
    bench = training_step.Bench(tmp_path, random_llava.SMALL)
    monkeypatch.setattr(bench, "step", lambda way, run: lambda: bytearray(300_000_000).count(1))
    assert training_step.peak(bench, training_step.WAYS[0]) == pytest.approx(3e8, rel=0.1)
