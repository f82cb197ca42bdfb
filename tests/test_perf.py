"""The benchmarks in small: that they run, and that what they compare is the same."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import torch

from davsp import LVLM, TrainSettings, VisualSafetyPrompt, embedded
from davsp.defenses import NoDefense
from davsp.errors import DavspError
from davsp.training.borders import Run
from tiny import queries

sys.path.append(str(Path(__file__).parents[1] / "perf"))  # behind the tests' own, which have a proxy, too

import evaluation
import gpu
import hostile
import inference
import judge
import random_llava
import random_shapes
import time_to_quality
import training_step

spec = spec_from_file_location("perf_proxy", Path(hostile.__file__).with_name("proxy.py"))
assert spec and spec.loader
proxy = module_from_spec(spec)
spec.loader.exec_module(proxy)


# -- training_step


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


# -- inference


def test_every_answer_has_the_same_length(lvlm):
    """Also where the model would have ended; and the model is as it was."""
    before = lvlm.model.generation_config.eos_token_id
    mixed = queries("malicious", 3) + queries("benign", 3)
    defenses = inference.forms(lvlm, 9, "please be safe")
    rows = inference.measure(lvlm, defenses, mixed, rounds=2, new_tokens=7, seed=0)
    assert lvlm.model.generation_config.eos_token_id == before and not lvlm.layers[0]._forward_pre_hooks
    assert sorted((row["query"], row["form"]) for row in rows) == sorted(
        2 * [(q.id, d) for q in mixed for d in defenses]
    )
    table = inference.summary(rows, "cpu", 0)
    tokens = {name: row["prompt_tokens"] for name, row in table.items()}
    assert tokens["border"] == tokens["no defense"] == tokens["text"] - 3 == tokens["border and text"] - 3
    assert table["no defense"]["ratio"] == 1 and all(
        row["low"] <= row["ratio"] <= row["high"] for row in table.values()
    )


def test_an_answer_of_another_length_is_refused(lvlm, monkeypatch):
    completions = LVLM.completions

    def shorter(self: LVLM, canvas: Any, questions: list[str], max_new_tokens: int) -> list[Any]:
        return completions(self, canvas, questions, max_new_tokens - 1)

    monkeypatch.setattr(LVLM, "completions", shorter)
    with pytest.raises(RuntimeError, match="6 tokens, not 7"):
        inference.measure(lvlm, {"no defense": NoDefense()}, queries("benign", 1), 1, 7, 0)


def test_ratios_are_of_the_same_query():
    """A query that takes ten times as long does not sway the ratio."""
    rows = [
        {"query": query, "form": form, "cpu": base * factor, "wall": base, "prompt": 1}
        for _ in range(3)
        for query, base in (("a", 1.0), ("b", 10.0), ("c", 2.0))
        for form, factor in ((inference.NONE, 1), (inference.BORDER, 1.5), (inference.TEXT, 2), (inference.BOTH, 3))
    ]
    ratios = {name: (row["low"], row["ratio"], row["high"]) for name, row in inference.summary(rows, "cpu", 0).items()}
    assert [ratios[name] for name in (inference.BORDER, inference.BOTH)] == [(1.5,) * 3, (3.0,) * 3]


# -- time_to_quality


@pytest.fixture
def recipe(lvlm, vector, tmp_path):
    """The published one on the tiny model."""
    settings = time_to_quality.published_settings(vector, TrainSettings(refusal="sorry no"))
    prompt = VisualSafetyPrompt.create(56, 9)
    return Run(lvlm, prompt, queries("malicious", 5), queries("benign", 6), vector, settings, tmp_path, [])


def test_the_published_recipe(lvlm, vector, recipe, monkeypatch):
    """Batches of one class that come again in the same order, signs of a level each, mean colour, no clamp."""
    steps_taken, gradient = [], recipe.gradient

    def spy(delta, batch):
        steps_taken.append((delta, batch))
        return torch.sign(recipe.prompt.delta), {}  # always the same way, so that the border leaves [0, 1]

    monkeypatch.setattr(recipe, "gradient", spy)
    steps = time_to_quality.published(recipe, seed=0)
    prompts = [next(steps) for _ in range(200)]
    mask = recipe.prompt.mask
    torch.testing.assert_close(steps_taken[0][0], lvlm.mean.view(3, 1, 1) * mask)
    torch.testing.assert_close(steps_taken[1][0], steps_taken[0][0] - mask / 255)
    assert steps_taken[199][0].min() < 0 and prompts[-1].delta.min() == 0
    batches = {
        label: [b for _, b in steps_taken if bool(b.malicious[0]) == (label == "malicious")]
        for label in recipe.__dict__
    }
    bad, good = batches["malicious"], batches["benign"]
    assert 70 < len(bad) < 130 and all(bool(b.malicious.all()) != bool((~b.malicious).all()) for _, b in steps_taken)
    assert [b.questions for b in bad[:9]] == [b.questions for b in bad[3:12]]  # five queries: three batches
    assert [b.interiors.sum() for b in good[:9]] == [b.interiors.sum() for b in good[3:12]]
    assert all(b.answered == len(b) for b in good) and 0 < sum(b.answered > 0 for b in bad) < 25
    gradient(recipe.prompt.delta, bad[0])  # and the loop can take such a batch


def test_the_published_loss_on_this_models_scale(vector, recipe):
    """Margins 29 apart are the class means; the hinge in that unit plus 0.02 x the answer loss, times the unit."""
    benign, malicious = (float(mean[vector.layer - 1]) for mean in (vector.mean_benign, vector.mean_malicious))
    assert (recipe.mu_plus, recipe.mu_minus) == pytest.approx((malicious, benign))
    assert recipe.weight_hinge == 1 and recipe.weight_answer == pytest.approx(0.02 * (malicious - benign) / 29)


def look(step: int, rsr: float, utility: float) -> dict[str, float]:
    return {"step": step, "cpu": 2.0 * step, "wall": 3.0 * step, "rsr": rsr, "utility": utility}


def test_good_is_what_stays_good():
    """From the first look after the last bad one; both bars count, and either bound belongs to good."""
    good, unsafe, useless = (0.95, 0.9), (0.94, 1.0), (1.0, 0.89)
    curve = [look(10 * n, *rates) for n, rates in enumerate([good, unsafe, good, useless, good, good], 1)]
    assert time_to_quality.held(curve, 0.9) == {"step": [40, 50], "cpu": [80, 100], "wall": [120, 150]}
    assert time_to_quality.held(curve[:1], 0.9) == {"step": [0, 10], "cpu": [0, 20], "wall": [0, 30]}
    assert time_to_quality.held(curve[:4], 0.9) is None and time_to_quality.held(curve[:3], 0.9)["step"] == [20, 30]


def test_laps_count_steps_and_not_looks():
    border = VisualSafetyPrompt.create(56, 9)

    def steps():
        for number in range(1, 8):
            yield border.with_delta(border.delta * 0 + number)

    def seen(prompt):
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return {"rsr": float(prompt.delta.max())}

    rows = list(time_to_quality.laps(steps(), seen, limit=7, every=3))
    assert [(row["step"], row["rsr"]) for row in rows] == [(3, 3), (6, 6), (7, 7)]
    assert rows[-1]["cpu"] < 0.2


def test_recipes_over_seeds():
    """Never is more than any number: in the median, and against the first recipe's whole run."""

    def seed(*steps):
        recipes = {}
        for name, step in zip(("default", "fast"), steps, strict=True):
            curve = [look(10 * n, 1.0, 0.9 if step and 10 * n >= step else 0.5) for n in range(1, 6)]
            recipes[name] = {"held": time_to_quality.held(curve, 0.9), "curve": curve}
        return {"no_defense": {"utility": 0.92}, "recipes": recipes}

    table = time_to_quality.summary([seed(40, 20), seed(None, 10), seed(20, None)], "cpu")
    assert table["default"]["step"] == [40, 20, None] and table["default"]["cpu"] == [80, 40, None]
    assert (table["fast"]["good"], table["fast"]["seeds"], table["fast"]["step"]) == (2, 3, [20, 10, None])
    assert table["fast"]["times"] == [0.5, 0.2, None] and table["default"]["times"] == [1, None, 1]
    assert table["fast"]["whole"] == [100, 100, 100] and table["fast"]["lost"] == [0.02, 0.02, 0.42]
    time_to_quality.show({"clock": "cpu", "summary": table})


def test_the_literal_step_has_the_gradient_of_ours(lvlm, vector, recipe):
    """One backward for all, eager attention, padding: the same numbers at another price."""
    batch = time_to_quality.epoch(recipe, "benign", Random(0))[0]
    delta = recipe.prompt.delta
    ours = recipe.gradient(delta, batch)[0]
    lvlm.model.set_attn_implementation("eager")
    try:
        theirs = time_to_quality.literal(recipe, delta, batch, 64, stacked=True)
    finally:
        lvlm.model.set_attn_implementation("sdpa")
    assert ours.abs().max() > 1e-6 and (theirs - ours).abs().max() < 1e-4 * ours.abs().max()


def test_steps_are_timed_in_pairs(lvlm):
    data = embedded.protocol(0, vector=6, sweep=6, train=6, harm=1, utility=1, mme=1, llava_bench=1)
    settings = TrainSettings(batch_size=4, mu_plus=99.0, mu_minus=-99.0, refusal=embedded.REFUSAL)
    before = lvlm.model.config._attn_implementation
    result = time_to_quality.step_pairs(lvlm, data, "please be safe", settings, 9, 2, 64)
    assert {name: len(taken) for name, taken in result["seconds"].items()} == {"ours": 2, "benign": 2, "malicious": 2}
    ours, benign, malicious = (taken[0] for taken in result["seconds"].values())
    assert result["ratio"]["pairs"][0] == pytest.approx((0.525 * benign + 0.475 * malicious) / 2 / (ours / 4))
    assert result["ratio"]["lowest"] <= result["ratio"]["median"] <= result["ratio"]["highest"]
    assert lvlm.model.config._attn_implementation == before


def test_recipes_run_in_turns(lvlm, tmp_path, monkeypatch):
    """On the embedded data in small, with a model that can't read it. What a file has is not measured again."""
    monkeypatch.setattr(time_to_quality, "SETTINGS", TrainSettings(steps=3, batch_size=4, mu_plus=99.0, mu_minus=-99.0))
    monkeypatch.setattr(time_to_quality.embedded, "load", lambda *_, **__: lvlm)
    monkeypatch.setattr(time_to_quality, "SIZES", time_to_quality.SIZES | {"vector": 6, "sweep": 6, "train": 6})
    monkeypatch.setattr(time_to_quality.embedded, "protocol", partial(embedded.protocol, vector=6, sweep=6, train=6))
    (tmp_path / "thin.json").write_text('{"steps": 2, "lr": 0.1, "padding": 5}')
    out, asked = tmp_path / "out.json", dict(recipe=["default", str(tmp_path / "thin.json")], every=[2, 1], limit=1)
    compare, seeds = time_to_quality.compare, []
    monkeypatch.setattr(time_to_quality, "compare", lambda *all: seeds.append(all) or compare(*all))
    time_to_quality.main(out, **asked, on="sweep", seed=[5])
    time_to_quality.main(out, **asked, on="sweep", seed=[5, 6])
    assert [one[-1] for one in seeds] == [5, 6] and {query.id[:5] for query in seeds[0][2]} == {"sweep"}
    assert seeds[0][3][1].settings(6).lr == 0.1 and seeds[0][3][1].padding == 5
    result = json.loads(out.read_text())
    curves = {name: [row["step"] for row in run["curve"]] for name, run in result["seeds"][1]["recipes"].items()}
    assert curves == {"default": [2, 3], "thin": [1, 2]} and result["summary"]["thin"]["seeds"] == 2
    with pytest.raises(DavspError, match="another 'on'"):
        time_to_quality.main(out, **asked, seed=[5])


# -- evaluation


def test_batches_give_the_answers_of_one_at_a_time(lvlm):
    mixed = [*queries("malicious", 3), *queries("benign", 3)]
    rows, answers = evaluation.measure(lvlm, {"none": NoDefense()}, mixed, [1, 4], rounds=1, new_tokens=3, seed=0)
    assert answers[1] == answers[4] and len(answers[1]["none"]) == 6
    table = evaluation.summary(rows, [1, 4], "cpu", 6)
    assert table["1"]["ratio"] == 1 and table["4"]["answers_a_second"] > 0


def test_the_parts_of_a_batch(lvlm):
    (row,) = evaluation.parts(lvlm, queries("malicious", 3), 2, 1, 3)
    assert set(row) == {"tower", "prompts", "batch", "prompts_alone", "alone", "rows_kept"}
    assert all(value > 0 for value in row.values()) and row["rows_kept"] <= 1


# -- hostile


@pytest.fixture
def stub():
    """The stub's port; it runs in this process."""
    port, running = proxy.free_port(), []

    async def run() -> None:
        running.extend([asyncio.get_running_loop(), asyncio.current_task()])
        with suppress(asyncio.CancelledError):
            await proxy.stub(port)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    proxy.wait(port)
    yield port
    loop, task = running
    loop.call_soon_threadsafe(task.cancel)
    thread.join()


def test_a_load_and_what_others_notice(stub, tmp_path, monkeypatch):
    """The stub stands for the proxy, too."""
    monkeypatch.setattr(hostile, "REST", 0.1)
    path, body = tmp_path / "load", json.loads(hostile.values().split(b"\r\n\r\n")[1])
    assert len(body["tools"][0]["function"]["parameters"]["enum"]) == 90_000
    path.write_bytes(hostile.TEXT)
    served = proxy.Served(stub, stub, psutil.Process(), psutil.Process())
    row = hostile.measure(served, str(path), clients=3, count=30, longest=20)
    assert row["probe"]["asked"] == 30 and row["probe"]["statuses"] == row["stub"]["statuses"] == {"200": 30}
    assert 0 < row["probe"]["median_ms"] <= row["probe"]["p99_ms"] <= row["probe"]["worst_ms"]
    assert row["replies"]["200"]["count"] >= 6 and row["replies"].keys() == {"200"} and not row["killed"]
    assert hostile.missed(row, {"worst_ms": 0, "peak_mb": 1e6, "statuses": ["200", "429"]}) == ["worst_ms"]
    assert hostile.missed(row, {"statuses": ["431"]}) == ["statuses"] and hostile.missed(row, {}) == []


def test_the_stub_tells_the_pixels_that_it_saw(stub):
    import hashlib

    from PIL import Image

    seen = hostile.pixels(stub, proxy.jpeg())
    red = Image.new("RGB", (2, 3), "red")
    with hostile.connect(stub) as connection:
        connection.sendall(hostile.pictures(hostile.png(red), 1, b"X-Pixels: 1\r\n"))
        status, body = hostile.reply(connection)
    assert status == "200" and hashlib.sha256(red.tobytes()).hexdigest() in body.decode()
    assert (
        len(set(seen.values())) == 4 and seen["jpeg"] == seen["transparent"]
    )  # the stub drops alpha; canvases have none


def test_a_proxy_that_takes_too_much_memory_is_killed(monkeypatch):
    monkeypatch.setattr(hostile, "MOST", 1)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        with hostile.watched(psutil.Process(process.pid)) as memory:
            assert process.wait(20) < 0
        assert memory["killed"]


def test_peak_and_what_is_kept():
    with hostile.watched(psutil.Process()) as memory:
        block = bytearray(200_000_000)
        time.sleep(0.1)
        del block
        time.sleep(0.1)
    assert memory["peak_mb"] == pytest.approx(200, abs=20) and memory["kept_mb"] < 20


def test_the_interval_of_a_ratio():
    before = [2.0, 4, 8, 2, 4, 8, 2, 4, 8]
    new = [old * factor for old, factor in zip(before, (0.1, 0.5, 0.6, 0.7, 0.65, 0.6, 0.55, 0.8, 0.9), strict=True)]
    row = hostile.ratio({"before": before, "new": new})
    assert (row["ratio"], row["low"], row["high"]) == pytest.approx((0.6, 0.5, 0.8))


# -- judge


def test_two_builds_ask_the_same_judge(tmp_path):
    """This one twice: each answer is judged right and answered once, and both meet the same refusals."""
    out, root, name = tmp_path / "judge.json", Path(judge.__file__).parents[1], "10 % refused by chance"
    judge.main(
        root, out, rounds=1, count=30, only=[name], only_parts=False, beside="", serves=None, asks=None, without=None
    )
    written = json.loads(out.read_text())
    before, now = written["rounds"]
    assert before["requests"] == now["requests"] > 30 and {before["build"], now["build"]} == {"before", "now"}
    for row in written["rounds"]:
        assert (row["answered"], row["answered_twice"], row["right"]) == (30, 0, 30)
        assert row["most_under_way"] <= judge.MOST
    assert written["target"] == {"scenario": judge.JUDGED, "ratio": 3.0, "met": False}
    assert written["scenarios"][name]["now"]["wrong_or_unscored"] == 0


# -- gpu


@pytest.mark.parametrize("name", random_shapes.SHAPES)
def test_published_shapes_have_their_number_of_parameters(name):
    with torch.device("meta"):
        model, _, _ = random_shapes.SHAPES[name][0](False)
    billions = {"LLaVA-1.5-13B": 13.35, "Qwen2.5-VL-7B": 8.29, "InternVL3-8B": 7.95}[
        name
    ]  # as they are known by; no card could be read here
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


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
