"""Other people's files, played by tensors of their layouts.

A border of the authors' code is float16, normalised by CLIP's constants, zero inside; their vector a dictionary of a direction a layer;
UniGuard's noise float32 in pixel units.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from davsp import DavspError, HarmfulnessVector, TrainSettings, VisualSafetyPrompt, train
from davsp.defenses import VisualPrompt
from davsp.prompts import AdditiveNoise, ExactBorder, load_prompt
from davsp.prompts.border import border_mask
from davsp.prompts.published import (
    CLIP_MEAN,
    CLIP_STD,
    import_published,
    published_noise,
    published_prompt,
    save_published,
)
from tiny import picture, queries

MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))


def published(display: Float[Tensor, "3 s s"], padding: int) -> Float[Tensor, "1 3 s s"]:
    """What the authors' code would have saved of a border with these values in display space."""
    return (((display - MEAN) / STD) * border_mask(display.shape[-1], padding)).half()[None]


@pytest.fixture
def noise() -> Float[Tensor, "1 3 56 56"]:
    """A border of 8 pixels with values in [-0.1, 1.1]."""
    return published(torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1, 8)


@pytest.fixture
def file(noise, tmp_path: Path) -> Path:
    """The border in a file."""
    torch.save(noise, tmp_path / "noise-1200.pt")
    return tmp_path / "noise-1200.pt"


def test_the_model_is_shown_the_authors_values(noise, file: Path, lvlm):
    prompt = ExactBorder(import_published(file, 8)[0], 8)
    canvas = prompt.apply(prompt.resize([picture(1)]))
    assert len(lvlm.generate(canvas, [prompt.question("what is this")])) == 1
    seen = lvlm.pixel_inputs(canvas)["pixel_values"][0]
    border = border_mask(56, 8).expand(3, -1, -1) > 0
    assert (seen - noise[0].float())[border].abs().max() < 2e-6  # float16 itself is a thousand times as coarse
    assert torch.equal(canvas[0][~border], prompt.resize([picture(1)])[0][~border])


def test_the_report_counts_and_measures(noise, file: Path):
    delta, rows = import_published(file, 8)
    assert [row.channel for row in rows] == ["red", "green", "blue", "all"]
    raw = noise[0].double().numpy()
    ring = np.ones((56, 56), bool)
    ring[8:-8, 8:-8] = False
    assert not delta[:, ~torch.from_numpy(ring)].any()
    values = [raw[c][ring] * CLIP_STD[c] + CLIP_MEAN[c] for c in range(3)]
    for row, of_channel in zip(rows, [*values, np.concatenate(values)], strict=True):
        beyond = 255 * np.maximum(np.maximum(of_channel - 1, -of_channel), 0)
        assert row.values == of_channel.size and row.outside == (beyond > 0).sum() > 0
        assert row.share == pytest.approx((beyond > 0).mean())
        assert row.largest == pytest.approx(beyond.max(), abs=1e-4)
        assert row.mean == pytest.approx(beyond[beyond > 0].mean(), abs=1e-4)
    assert rows[3].outside == sum(row.outside for row in rows[:3])


def test_a_border_within_the_range_is_reported_as_that(tmp_path: Path):
    torch.save(published(torch.rand(3, 24, 24) * 0.9 + 0.05, 5)[0], tmp_path / "n.pt")  # (3, s, s)
    delta, rows = import_published(tmp_path / "n.pt", 5)
    assert [(row.outside, row.share, row.largest, row.mean) for row in rows] == [(0, 0, 0, 0)] * 4
    assert delta.shape == (3, 24, 24) and delta.dtype == torch.float32


def test_other_constants(tmp_path: Path):
    torch.save(torch.full((1, 3, 8, 8), 2.0) * border_mask(8, 1), tmp_path / "n.pt")
    delta, rows = import_published(tmp_path / "n.pt", 1, (0.5, 0.25, -3), (0.5, 0.25, 0.5))
    assert delta[:, 0, 0].tolist() == [1.5, 0.75, -2] and delta[:, 1:-1, 1:-1].abs().max() == 0
    assert [row.largest for row in rows] == [127.5, 0, 510, 510]
    assert rows[3].mean == (127.5 + 510) / 2 and rows[3].share == 2 / 3


def test_displayable_is_a_prompt_like_any_other(file: Path, tmp_path: Path):
    delta, rows = import_published(file, 8)
    prompt, _ = published_prompt(file, 8, model_id="m", text="be safe", layer=20)
    save_published(prompt, tmp_path / "p")
    loaded = load_prompt(tmp_path / "p")
    assert type(loaded) is VisualSafetyPrompt and (loaded.text, loaded.padding) == ("be safe", 8)
    assert torch.equal(loaded.delta, torch.round(delta.clamp(0, 1) * 255) / 255)
    figures = loaded.config["figures"]
    assert figures["published_blue_outside"] == rows[2].outside and len(figures) == 20
    assert figures["published_all_overshoot_max_levels"] == rows[3].largest
    assert (loaded.config["layer"], loaded.config["model_id"]) == (20, "m") and len(loaded.config["data"]) == 1
    assert "published_all_outside_share" in (tmp_path / "p" / "README.md").read_text()


def test_exact_keeps_every_bit_and_is_no_picture(file: Path, tmp_path: Path):
    prompt, _ = published_prompt(file, 8, "exact", text="be safe", layer=20)
    assert torch.equal(prompt.delta, import_published(file, 8)[0])
    save_published(prompt, tmp_path / "p")
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"exact.safetensors", "vsp_config.json"}
    loaded = load_prompt(tmp_path / "p")
    assert type(loaded) is ExactBorder and loaded.config == prompt.config and loaded.text == "be safe"
    assert torch.equal(loaded.delta, prompt.delta)
    assert torch.equal(loaded.project_().delta, prompt.delta) and float(loaded.delta.max()) > 1.05
    for refuse in (loaded.quantised, loaded.border, lambda: loaded.image(picture(0)), lambda: VisualPrompt(loaded)):
        with pytest.raises(DavspError, match="--form displayable"):
            refuse()


def test_an_exact_border_is_trained_without_a_clamp(file: Path, tmp_path: Path, lvlm, vector):
    start, _ = published_prompt(file, 8, "exact")
    settings = TrainSettings(steps=2, batch_size=2, objective="projection", mu_plus=50, mu_minus=-50)
    both = queries("malicious", 2), queries("benign", 2)
    trained = train(lvlm, start, *both, vector, settings, tmp_path / "run", progress=False)
    moved = (trained.delta - start.delta)[:, border_mask(56, 8)[0] > 0].abs()
    assert type(trained) is ExactBorder and moved.max() == pytest.approx(2 / 255, abs=1e-6)
    outside = (start.delta < -0.01) | (start.delta > 1.01)
    assert ((trained.delta < 0) | (trained.delta > 1))[outside].all() and outside.any()
    trained.save_pretrained(tmp_path / "p")
    again = load_prompt(tmp_path / "p")
    assert torch.equal(again.delta, trained.delta) and again.config["figures"]["published_all_values"] == 3 * 1536


def test_one_folder_holds_one_form(file: Path, tmp_path: Path):
    displayable, exact = (published_prompt(file, 8, form)[0] for form in ("displayable", "exact"))
    for first, second in ((displayable, exact), (exact, displayable)):
        folder = tmp_path / first.kind
        save_published(first, folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(DavspError, match="in its other form"):
            save_published(second, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        second.save_pretrained(folder)
        with pytest.raises(DavspError, match=r"holds both vsp\.safetensors and exact\.safetensors"):
            load_prompt(folder)


def test_a_broken_exact_border_is_refused(file: Path, tmp_path: Path):
    prompt, _ = published_prompt(file, 8, "exact")
    prompt.delta[0, 0, 0] = float("inf")
    with pytest.raises(DavspError, match="this prompt holds NaN or infinity"):
        prompt.save_pretrained(tmp_path / "p")
    assert not (tmp_path / "p").exists()
    prompt.delta[0, 0, 0] = 7
    prompt.save_pretrained(tmp_path / "p")
    (tmp_path / "p" / "vsp_config.json").write_text('{"canvas": 50, "padding": 8}')
    with pytest.raises(DavspError, match=r"exact\.safetensors must hold one float tensor 'delta' of shape"):
        load_prompt(tmp_path / "p")


def spoilt(noise: Tensor, at: tuple[int, int], value: float) -> Tensor:
    noise[0, 1, at[0], at[1]] = value
    return noise


REFUSED = {
    "dict": (lambda n: {"noise": n}, 8, "holds a dict, not one tensor"),
    "two": (lambda n: torch.cat([n, n]), 8, r"a tensor of shape \(2, 3, 56, 56\)"),
    "flat": (lambda n: n[0, 0], 8, r"a tensor of shape \(56, 56\)"),
    "four channels": (lambda n: n[:, [0, 1, 2, 0]], 8, r"shape \(1, 4, 56, 56\)"),
    "not square": (lambda n: n[..., :40], 8, r"shape \(1, 3, 56, 40\)"),
    "empty": (lambda n: n[..., :0, :0], 8, r"shape \(1, 3, 0, 0\)"),
    "one number": (lambda n: n[0, 0, 0, 0], 8, r"shape \(\)"),
    "sparse": (lambda n: n.float().to_sparse(), 8, "is dense floats"),
    "integers": (lambda n: n.int(), 8, "type torch.int32"),
    "NaN": (lambda n: spoilt(n, (0, 0), float("nan")), 8, "holds NaN or infinity"),
    "infinity": (lambda n: spoilt(n, (0, 0), float("-inf")), 8, "holds NaN or infinity"),
    "inside": (lambda n: spoilt(n, (20, 30), 1e-3), 8, "is not zero inside a border of 8 pixels.* 21 pixels in"),
    "padding too small": (lambda n: n, 7, "is not zero inside a border of 7 pixels.*give --padding 8"),
    "no padding": (lambda n: n, 0, "give --padding 8"),
    "padding too large": (lambda n: n, 9, "holds a border of 8 pixels, not of 9; give --padding 8"),
    "padding beyond": (lambda n: n, 28, "holds a border of 8 pixels, not of 28; give --padding 8"),
    "full": (lambda n: n + 1, 8, "has values up to its middle"),
    "untrained": (torch.zeros_like, 8, "holds only zeros"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_published_border_is_refused(case: str, noise, tmp_path: Path):
    change, padding, says = REFUSED[case]
    torch.save(change(noise), tmp_path / "n.pt")
    with pytest.raises(DavspError, match=rf"n\.pt.*{says}"):
        import_published(tmp_path / "n.pt", padding)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_no_code_of_a_file_is_run(tmp_path: Path):
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "n.pt")
    with pytest.raises(DavspError, match=r"n\.pt is not read, for it holds more than tensors"):
        import_published(tmp_path / "n.pt", 8)
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "n.pt", weights_only=False)  # the trap does work
    assert (tmp_path / "sprung").exists()


def test_a_file_that_is_missing_or_cut(file: Path, tmp_path: Path):
    with pytest.raises(DavspError, match=r"cannot read .*none\.pt"):
        import_published(tmp_path / "none.pt", 8)
    spoilt = {
        b"": "is empty", b"no tensor": "is no file of torch.save", file.read_bytes()[:500]: "is cut", b"\x80\x02": "cannot be taken apart",
    }  # fmt: skip
    for content, why in spoilt.items():
        file.write_bytes(content)
        with pytest.raises(DavspError, match=rf"noise-1200\.pt is not read, for it {why}"):
            import_published(file, 8)


# -- the vector


def directions(layers: int, width: int, norm: float = 1.0) -> dict[str, Float[Tensor, " d"]]:
    """What the authors' code would have saved: a direction a layer under its name, of the same length each."""
    drawn = torch.randn(layers, width, generator=torch.Generator().manual_seed(1))
    drawn = norm * drawn / drawn.norm(dim=1, keepdim=True)
    return {f"layer_{n}": row.clone() for n, row in enumerate(drawn, 1)}


def test_the_authors_vector_has_their_layer_and_margins(tmp_path: Path, lvlm):
    given = directions(40, 5120)
    torch.save(given, tmp_path / "v.pt")
    HarmfulnessVector.from_published(tmp_path / "v.pt").save(tmp_path / "v")
    vector = HarmfulnessVector.load(tmp_path / "v")
    assert vector.vectors.shape == (39, 5120) and not vector.fitted  # their last one is after the final norm
    for layer in (1, 20, 39):
        torch.testing.assert_close(vector.direction(layer), given[f"layer_{layer}"])
    assert (vector.layer, vector.mu_plus, vector.mu_minus) == (20, 27, -2) and vector.half_gap() == 14.5
    assert (vector.model_id, vector.text, vector.auroc, vector.by_layer()) == ("", None, {}, [])
    assert (vector.template, vector.undefended) == ("llava_v1", "pad")  # their extract_hs.py has no other way
    with pytest.raises(
        DavspError, match=r"margins at layer 20 alone.* of layer 18 .*--layer 18, --mu-plus and --mu-minus"
    ):
        vector.margins(18)
    with pytest.raises(DavspError, match=r"39 layers of 5120 numbers, but .* has 3 of 32"):
        vector.check(lvlm)


def test_a_vector_of_their_code_for_another_model_is_trained_with(tmp_path: Path, lvlm):
    """Layers are theirs: `layer_k` is `hidden_states[k]`, so training along it raises what their code would measure."""
    given = directions(4, 32, norm=7)  # as get_vector.py leaves them
    torch.save(given, tmp_path / "v.pt")
    vector = HarmfulnessVector.from_published(tmp_path / "v.pt", 2, 3.0, -1.0, "m", "be safe")
    assert vector.vectors.shape == (3, 32) and (vector.model_id, vector.text) == ("m", "be safe")
    canvas = lvlm.preprocess([picture(0)])
    inputs = lvlm.inputs(lvlm.encode(["what is this"], lvlm.sizes(canvas)), canvas)
    hidden = lvlm.model(**inputs, output_hidden_states=True).hidden_states
    theirs = hidden[2][0, -1] @ (given["layer_2"] / given["layer_2"].norm())
    ours = vector.project(lvlm.states(canvas, ["what is this"], [2])[0, 0])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    settings = TrainSettings(steps=1, batch_size=2, objective="both")
    both, start = (queries("malicious", 2), queries("benign", 2)), VisualSafetyPrompt.create(56, 8)
    trained = train(lvlm, start, *both, replace(vector, model_id=""), settings, tmp_path / "run", progress=False)
    facts = {name: trained.config[name] for name in ("layer", "mu_plus", "mu_minus")}
    assert facts == {"layer": 2, "mu_plus": 3, "mu_minus": -1} and not torch.equal(trained.delta, start.delta)
    rows = torch.stack(list(given.values()))
    torch.save(rows, tmp_path / "rows.pt")  # the same as one matrix
    again = HarmfulnessVector.from_published(tmp_path / "rows.pt", 2, 3.0, -1.0)
    assert torch.equal(again.vectors, vector.vectors)


def spoilt_direction(value: float) -> dict[str, Tensor]:
    rows = directions(4, 32)
    rows["layer_3"] *= value
    return rows


NO_VECTOR = {
    "a name is missing": (lambda d: {n: row for n, row in d.items() if n != "layer_2"}, "holds no harmfulness vector"),
    "other names": (lambda d: {n.replace("_", ""): row for n, row in d.items()}, "a dictionary layer_1 to layer_L"),
    "two widths": (lambda d: d | {"layer_2": d["layer_2"][:5]}, "holds no harmfulness vector"),
    "states of queries": (lambda d: {"q1": d, "q2": d}, "holds no harmfulness vector"),
    "integers": (lambda d: {n: row.int() for n, row in d.items()}, "holds no harmfulness vector"),
    "one layer": (lambda d: {"layer_1": d["layer_1"]}, "holds no harmfulness vector"),
    "empty": (lambda d: {}, "holds no harmfulness vector"),
    "a border": (lambda d: torch.ones(1, 3, 8, 8), "holds no harmfulness vector"),
    "a list": (lambda d: list(d.values()), "holds no harmfulness vector"),
    "NaN": (lambda d: spoilt_direction(float("nan")), "NaN, infinity or a direction of zeros"),
    "zeros": (lambda d: spoilt_direction(0), "NaN, infinity or a direction of zeros"),
}


@pytest.mark.parametrize("case", NO_VECTOR)
def test_what_is_no_published_vector_is_refused(case: str, tmp_path: Path):
    change, says = NO_VECTOR[case]
    torch.save(change(directions(4, 32)), tmp_path / "v.pt")
    with pytest.raises(DavspError, match=rf"v\.pt.*{says}"):
        HarmfulnessVector.from_published(tmp_path / "v.pt", 2, 3.0, -1.0)


def test_margins_are_not_made_up_for_another_model_or_layer(tmp_path: Path):
    torch.save(directions(4, 32), tmp_path / "small.pt")
    torch.save(directions(40, 5120), tmp_path / "theirs.pt")
    for name, *given in (("small", None, None, None), ("small", 2, 3.0, None), ("theirs", 18, None, None)):
        with pytest.raises(
            DavspError, match="are known for layer 20 of 40 layers of 5120 alone: give --layer, --mu-plus"
        ):
            HarmfulnessVector.from_published(tmp_path / f"{name}.pt", *given)
    with pytest.raises(DavspError, match=r"mu_plus \(-3\) must be above mu_minus \(-2\)"):
        HarmfulnessVector.from_published(tmp_path / "theirs.pt", mu_plus=-3.0)
    with pytest.raises(DavspError, match="layer 4 is out of range"):
        HarmfulnessVector.from_published(tmp_path / "small.pt", 4, 3.0, -1.0)
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "trap.pt")
    with pytest.raises(DavspError, match="holds more than tensors"):
        HarmfulnessVector.from_published(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


# -- UniGuard's noise


def test_noise_has_the_bound_of_its_values_whatever_its_name_says(tmp_path: Path):
    delta = torch.randint(-64, 65, (3, 56, 56), generator=torch.Generator().manual_seed(2)) / 255
    delta[0, 0, :2] = torch.tensor([64, -64]) / 255
    torch.save(delta, tmp_path / "safety_patch_eps32.pt")
    noise, seen = published_noise(tmp_path / "safety_patch_eps32.pt", "m")
    assert seen.bound == pytest.approx(64) and seen.below_zero == pytest.approx(float((delta < 0).float().mean()))
    noise.save_pretrained(tmp_path / "n")
    loaded = load_prompt(tmp_path / "n")
    assert type(loaded) is AdditiveNoise and torch.equal(loaded.delta, delta) and loaded.eps == pytest.approx(64 / 255)
    assert loaded.config["figures"]["published_bound_levels"] == seen.bound and loaded.config["model_id"] == "m"
    shown = loaded.apply(loaded.resize([picture(3)]))
    assert torch.equal(shown, (loaded.resize([picture(3)]) + delta).clamp(0, 1))


NO_NOISE = {
    "a border": (lambda n: published(n.abs().half().float(), 8), "it is a border, not noise; give --kind border"),
    "zeros": (torch.zeros_like, "holds only zeros, which is no noise"),
    "levels": (lambda n: 255 * n, "where white is 1, so they are not in pixel units"),
    "NaN": (lambda n: n * float("nan"), "holds NaN or infinity, so it is not noise"),
    "a vector": (lambda n: directions(4, 32), "holds a dict, not one tensor, so it is not noise"),
    "bytes": (lambda n: (255 * n).to(torch.uint8), "noise is dense floats of shape"),
    "not square": (lambda n: n[..., :40], r"shape \(3, 56, 40\)"),
}


@pytest.mark.parametrize("case", NO_NOISE)
def test_what_is_no_noise_is_refused(case: str, tmp_path: Path):
    change, says = NO_NOISE[case]
    torch.save(change(torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(2)) / 4), tmp_path / "n.pt")
    with pytest.raises(DavspError, match=rf"n\.pt.*{says}"):
        published_noise(tmp_path / "n.pt")
