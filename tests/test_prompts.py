"""T leaves the picture alone, and a prompt at rest is the prompt that was trained."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from davsp import LVLM, AdditiveNoise, DavspError, VisualSafetyPrompt
from davsp.prompts import load_prompt
from davsp.prompts.border import pad_to_square
from tiny import picture


@st.composite
def layouts(draw):
    canvas = draw(st.integers(3, 40))
    size = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    return canvas, draw(st.integers(1, (canvas - 1) // 2)), size, draw(st.integers(0, 1000))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_the_inner_region_is_untouched_bit_for_bit(layout):
    canvas, p, size, seed = layout
    prompt = VisualSafetyPrompt.create(canvas, p, start="random", seed=seed)
    interior = prompt.resize([picture(seed, size)])
    seen = prompt.apply(interior)[0]
    inside = slice(p, canvas - p)
    resized = pad_to_square(picture(seed, size)).resize((canvas - 2 * p,) * 2, Image.Resampling.BICUBIC)
    levels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    assert torch.equal(seen[:, inside, inside], interior[0, :, inside, inside])
    assert torch.equal(seen[:, inside, inside], levels.float() / 255)
    border = torch.ones(3, canvas, canvas, dtype=torch.bool)
    border[:, inside, inside] = False
    assert torch.equal(seen[border], prompt.delta[border])
    assert torch.count_nonzero(interior[0][border]) == 0


def test_pictures_are_padded_with_white():
    square = pad_to_square(Image.new("RGB", (10, 4), "black"))
    assert square.size == (10, 10)
    assert (square.getpixel((0, 2)), square.getpixel((0, 3)), square.getpixel((9, 6))) == (
        (255,) * 3,
        (0,) * 3,
        (0,) * 3,
    )


def test_only_delta_takes_a_gradient_and_only_on_the_border():
    prompt = VisualSafetyPrompt.create(12, 3)
    delta = prompt.delta.clone().requires_grad_()
    interior = prompt.resize([picture(0), picture(1)]).requires_grad_()
    (gradient,) = torch.autograd.grad(prompt.with_delta(delta).apply(interior).sum(), delta)
    assert torch.equal(gradient, 2 * prompt.mask.expand(3, -1, -1))
    assert prompt.delta.requires_grad is False


@pytest.mark.parametrize("padding", [0, -1, 28, 29, 100])
def test_a_padding_that_leaves_no_room_is_named(padding):
    with pytest.raises(DavspError, match=f"padding {padding} leaves no room on a canvas of 56 pixels.*less than 28"):
        VisualSafetyPrompt.create(56, padding)


def test_starts():
    grey, white = VisualSafetyPrompt.create(8, 2), VisualSafetyPrompt.create(8, 2, start="white")
    assert grey.delta.unique().tolist() == [0, torch.tensor(128 / 255).item()] and white.delta.unique().tolist() == [
        0,
        1,
    ]
    noise = [VisualSafetyPrompt.create(8, 2, start="random", seed=seed).delta for seed in (0, 0, 1)]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])


def test_the_question_follows_the_safety_text():
    assert VisualSafetyPrompt.create(8, 2, text="be safe").question("what?") == "be safe what?"
    assert VisualSafetyPrompt.create(8, 2).question("what?") == "what?"


def test_project_clamps():
    prompt = VisualSafetyPrompt.create(8, 2)
    prompt.delta[:, 0] = torch.tensor([-1.0, 0.5, 2, 1, 0, 3, -0.1, 0.2])
    assert prompt.project_() is prompt
    assert prompt.delta[0, 0].tolist() == pytest.approx([0, 0.5, 1, 1, 0, 1, 0, 0.2])


@pytest.fixture
def prompt():
    border = VisualSafetyPrompt.create(24, 5, start="random", seed=3, text="please be safe")
    border.config |= {"model_id": "m", "revision": "r", "layer": 2, "mu_plus": 1.5, "mu_minus": -0.5}
    border.config |= {"figures": {"rsr": 0.9731}, "data": {"train_malicious": "abc"}}
    return border


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("model_id", "m\x1b]0;title\x07", "field 'model_id' holds the control character '\\\\x1b'"),
        ("figures", {"rsr": float("nan")}, "field 'figures.rsr' holds nan, which is no figure"),
        ("figures", {"a\x1bb": 1.0}, "holds the control character"),
        ("model_id", "m\nfiles agree", "field 'model_id' holds the control character '\\\\n'"),
        ("model_id", "m\u202egnp.m", "field 'model_id' holds the control character"),
        ("model_id", "\ud800", "field 'model_id' holds the control character"),
        ("figures", {"a\nb": 1.0}, "holds the control character"),
        ("files", {"vsp.png\0": "0"}, "holds the control character '\\\\x00'"),
    ],
)
def test_a_strangers_configuration_is_refused_before_it_is_shown(prompt, tmp_path, field, value, says):
    prompt.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "vsp_config.json").read_text())
    (tmp_path / "vsp_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(DavspError, match=says):
        VisualSafetyPrompt.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["vsp_config.json", "vsp.safetensors", "vsp.png"])
def test_a_pipe_in_a_strangers_folder_is_not_waited_for(prompt, tmp_path, name):
    prompt.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DavspError, match=f"{name} is a pipe or a device"):
        VisualSafetyPrompt.from_pretrained(tmp_path)


def test_the_size_of_a_strangers_picture_is_seen_before_it_is_decoded(prompt, tmp_path, monkeypatch):
    prompt.save_pretrained(tmp_path)
    Image.new("1", (12000, 8000)).save(
        tmp_path / "vsp.png"
    )  # Pillow warns of such a size, and no warning is wanted here
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(DavspError, match="is 12000x8000, not 24x24"):
        VisualSafetyPrompt.from_pretrained(tmp_path)


def test_save_and_load(prompt, tmp_path):
    prompt.save_pretrained(tmp_path)
    loaded = VisualSafetyPrompt.from_pretrained(tmp_path)
    assert torch.equal(loaded.delta, prompt.quantised().delta) and loaded.delta.dtype == torch.float32
    assert loaded.config == prompt.config and (loaded.text, loaded.padding) == (prompt.text, 5)
    assert (loaded.delta - prompt.delta).abs().max() <= 0.5 / 255 + 1e-7
    card = (tmp_path / "README.md").read_text()
    assert "please be safe" in card and "| rsr | 0.9731 |" in card and "24 x 24" in card and 'base_model: "m"' in card
    loaded.save_pretrained(tmp_path / "again")
    for name in ("vsp_config.json", "vsp.safetensors", "vsp.png", "README.md"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_exported_png_is_the_canvas_the_model_sees(prompt, tmp_path):
    """The 8-bit canvas, saved and opened again, equals T with the quantised delta, bit for bit."""
    prompt.quantised().image(picture(7)).save(tmp_path / "canvas.png")
    reloaded = torch.from_numpy(np.array(Image.open(tmp_path / "canvas.png"))).permute(2, 0, 1).float() / 255
    assert torch.equal(reloaded, prompt.quantised().apply(prompt.resize([picture(7)]))[0])


def test_the_png_passes_the_model_unchanged(lvlm, tmp_path):
    prompt = VisualSafetyPrompt.create(56, 9, start="random")
    prompt.image(picture(7, (80, 50))).save(tmp_path / "canvas.png")
    reloaded = lvlm.preprocess([Image.open(tmp_path / "canvas.png")])
    canvas = prompt.quantised().apply(prompt.resize([picture(7, (80, 50))]))
    assert torch.equal(reloaded, canvas)
    question = ["what is this in the image"]
    assert lvlm.generate(reloaded, question) == lvlm.generate(canvas, question)


def broken(folder, change):
    """Save a good prompt, then break it."""
    config = json.loads((folder / "vsp_config.json").read_text())
    delta = load_file(folder / "vsp.safetensors")["delta"]
    change(folder, config, delta)


def edit(**fields):
    def change(folder, config, delta):
        (folder / "vsp_config.json").write_text(json.dumps(config | fields))

    return change


def tensor(function, name="delta"):
    def change(folder, config, delta):
        save_file({name: function(delta).contiguous()}, folder / "vsp.safetensors")

    return change


def poke(value):
    def function(delta):
        delta[0, 0, 0] = value
        return delta

    return tensor(function)


BROKEN = {
    "unknown key": (edit(colour="red"), r"vsp_config\.json: field 'colour'"),
    "wrong type": (edit(layer="high"), r"field 'layer'"),
    "canvas": (edit(canvas=30), r"vsp\.safetensors must hold one float tensor 'delta' of shape \(3, 30, 30\)"),
    "padding": (edit(padding=12), "padding 12 leaves no room"),
    "no json": (lambda folder, *_: (folder / "vsp_config.json").write_text("{"), r"vsp_config\.json is not JSON"),
    "no config": (lambda folder, *_: (folder / "vsp_config.json").unlink(), r"cannot read .*vsp_config\.json"),
    "no tensor": (lambda folder, *_: (folder / "vsp.safetensors").unlink(), r"cannot read .*vsp\.safetensors"),
    "no picture": (lambda folder, *_: (folder / "vsp.png").unlink(), r"cannot open image .*vsp\.png"),
    "NaN": (poke(float("nan")), r"vsp\.safetensors: delta holds NaN or values outside \[0, 1\]"),
    "too much": (poke(1.01), r"outside \[0, 1\]"),
    "too little": (poke(-0.01), r"outside \[0, 1\]"),
    "shape": (tensor(lambda d: d[:, :20]), "must hold one float tensor"),
    "integers": (tensor(lambda d: d.int()), "must hold one float tensor"),
    "name": (tensor(lambda d: d, "noise"), "must hold one float tensor"),
    "another picture": (poke(0.0), r"vsp\.png shows another border than .*vsp\.safetensors"),
    "picture size": (
        lambda folder, *_: Image.new("RGB", (9, 9)).save(folder / "vsp.png"),
        r"vsp\.png is 9x9, not 24x24",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_prompt_is_refused_by_name(prompt, tmp_path, case):
    change, message = BROKEN[case]
    prompt.delta[0, 0, 0] = 0.5
    prompt.save_pretrained(tmp_path)
    broken(tmp_path, change)
    with pytest.raises(DavspError, match=message):
        VisualSafetyPrompt.from_pretrained(tmp_path)


def test_neither_folder_nor_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DavspError, match="neither a folder nor reachable"):
        VisualSafetyPrompt.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_prompt(prompt, tmp_path, monkeypatch, call):
    prompt.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(DavspError, match="No space left"):
        VisualSafetyPrompt.create(24, 5).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_impossible_delta_is_not_saved(prompt, tmp_path):
    prompt.delta[0, 0, 0] = float("nan")
    with pytest.raises(DavspError, match="NaN"):
        prompt.save_pretrained(tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_prompt_for_another_canvas_is_refused(lvlm):
    with pytest.raises(DavspError, match=r"canvas is 24x24 pixels.*takes 56x56"):
        VisualSafetyPrompt.create(24, 5).check(lvlm)


@pytest.mark.parametrize(("canvas", "padding"), [(192, 16), (168, 14), (84, 7)])
def test_a_border_on_another_canvas_keeps_its_colours_and_its_share(canvas, padding):
    border = VisualSafetyPrompt.create(168, 14, "white", text="look")
    border.delta[0] *= 0.5  # half red everywhere on the border
    other = border.resized(canvas)
    assert (other.canvas, other.padding, other.text) == (canvas, padding, "look")
    on = other.mask[0] > 0
    torch.testing.assert_close(other.delta[0][on], torch.full((int(on.sum()),), 0.5))  # no zeros of the inside mixed in
    torch.testing.assert_close(other.delta[1][on], torch.ones(int(on.sum())))
    assert not other.delta[:, ~on].any()


# -- additive noise


@pytest.mark.parametrize("size", [(56, 56), (100, 70), (41, 200), (57, 56)])
def test_noise_stands_on_what_the_model_sees_undefended(tiny_folder, size):
    """As the processor shapes it; LLaVA's own code pads, the code of UniGuard and ESIII takes the processor's crop."""
    noise, lvlm = AdditiveNoise.create(56), LVLM.from_pretrained(tiny_folder, device_map="cpu", undefended="crop")
    assert torch.equal(noise.apply(noise.resize([picture(1, size)])), lvlm.preprocess([picture(1, size)]))


def test_noise_stays_within_eps_and_the_picture_within_white():
    noise = AdditiveNoise.create(8, eps=0.1, start="random", seed=1)
    assert 0.05 < noise.delta.abs().max() <= 0.1
    noise.delta *= 5
    assert noise.project_().delta.abs().max() == pytest.approx(0.1)
    seen = noise.apply(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8))
    assert 0 <= seen.min() and seen.max() <= 1
    levels = noise.quantised().delta * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert np.array(noise.image(picture(2))).shape == (8, 8, 3)
    with pytest.raises(DavspError, match="impossible"):
        AdditiveNoise.create(8, eps=0.0)


def test_noise_saves_and_loads(tmp_path):
    noise = AdditiveNoise.create(8, eps=0.1, start="random", seed=1, text="be safe")
    noise.config |= {"layer": 2, "figures": {"a": 0.5}}
    noise.save_pretrained(tmp_path)
    loaded = AdditiveNoise.from_pretrained(tmp_path)
    assert torch.equal(loaded.delta, noise.quantised().delta) and loaded.config == noise.config
    assert (loaded.eps, loaded.text) == (0.1, "be safe")
    save_file({"delta": noise.delta * 3}, tmp_path / "noise.safetensors")
    with pytest.raises(DavspError, match=r"noise\.safetensors: delta holds NaN or values outside"):
        AdditiveNoise.from_pretrained(tmp_path)
    noise.delta[0, 0, 0] = 1
    with pytest.raises(DavspError, match="outside"):
        noise.save_pretrained(tmp_path)


def test_load_prompt_picks_the_kind_by_the_file_that_is_there(prompt, tmp_path):
    noise = AdditiveNoise.create(32, eps=16 / 255, start="random")
    prompt.save_pretrained(tmp_path / "border")
    noise.save_pretrained(tmp_path / "noise")
    assert isinstance(load_prompt(tmp_path / "border"), VisualSafetyPrompt)
    loaded = load_prompt(str(tmp_path / "noise"))
    assert isinstance(loaded, AdditiveNoise) and torch.equal(loaded.delta, noise.quantised().delta)
    noise.save_pretrained(tmp_path / "border")
    with pytest.raises(DavspError, match=r"holds both vsp_config\.json and noise_config\.json"):
        load_prompt(tmp_path / "border")
    with pytest.raises(DavspError, match="no prompt at"):
        load_prompt(tmp_path / "nothing")
