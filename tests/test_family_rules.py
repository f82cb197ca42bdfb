"""What single families ask for or refuse: sizes, tiles, templates and settings of their processors."""

import json

import pytest
import torch
from PIL import Image

from davsp import LVLM, DavspError, HarmfulnessVector, TrainSettings, VisualSafetyPrompt, train
from families import QUESTIONS, SIDE, save_family, theirs
from tiny import picture, queries


def test_qwen_takes_prompts_of_many_sizes_and_pictures_of_their_own(tmp_path):
    folder = save_family("qwen2_vl", tmp_path / "qwen2_vl")
    model = LVLM.from_pretrained(folder, device_map="cpu", canvas=SIDE)
    ragged = model.preprocess([picture(0, (100, 70)), picture(1, (57, 171))])
    assert isinstance(ragged, list) and [tuple(x.shape[1:]) for x in ragged] == [(56, 112), (168, 56)]
    together = model.states(ragged, QUESTIONS[:2], [2])
    apart = torch.cat([model.states(one[None], [q], [2]) for one, q in zip(ragged, QUESTIONS[:2], strict=True)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert model.generate(ragged, QUESTIONS[:2], max_new_tokens=4) == [
        model.generate(one[None], [q], max_new_tokens=4)[0] for one, q in zip(ragged, QUESTIONS[:2], strict=True)
    ]
    for side in (56, 84, 168):  # a prompt of another size than the model's own
        VisualSafetyPrompt.create(side, 8).check(model)
    with pytest.raises(DavspError, match="multiples of 28"):
        LVLM.from_pretrained(folder, device_map="cpu", canvas=100)
    with pytest.raises(DavspError, match=r"1x300 pixels is too thin: .*qwen2_vl takes up to 1:200"):
        model.preprocess([picture(0, (1, 300))])
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"merge_size": 1}))
    with pytest.raises(DavspError, match="restore its files"):
        LVLM.from_pretrained(folder, device_map="cpu")


def test_an_undefended_picture_is_held_to_the_familys_rule_not_to_the_prompts(tmp_path):
    """1:166 and small max_pixels: the processor's own smallest picture has more pixels than that, and the tower takes it."""
    folder = save_family("qwen2_vl", tmp_path / "qwen2_vl")
    model = LVLM.from_pretrained(folder, device_map="cpu", canvas=SIDE)
    wide = picture(0, (10000, 60))
    expected, got = theirs(folder, [wide]), model.preprocess([wide])
    height, width = got.shape[-2:]
    assert height * width > model.most and torch.equal(
        model.pixel_inputs(got)["pixel_values"], expected["pixel_values"]
    )
    assert model.seen(10000, 60) == (height, width) and len(model.generate(got, ["what is this"], 2)) == 1
    with pytest.raises(DavspError, match="use a prompt made for this model"):
        model.check_canvas(height, width)
    with pytest.raises(DavspError, match=r"60x56 pixels, but .* takes multiples of 28"):
        model.states(torch.zeros(1, 3, 56, 60), ["yes"], [1])


@pytest.mark.parametrize("name", ["internvl", "llava_next", "llava_onevision"])
def test_a_border_is_trained_on_four_tiles_and_the_whole(tmp_path, name):
    folder = save_family(name, tmp_path / name)
    model = LVLM.from_pretrained(folder, device_map="cpu", canvas=2 * LVLM.from_pretrained(folder).canvas)
    bad, good = queries("malicious", 4), queries("benign", 4)
    vector = HarmfulnessVector.fit(model, bad, good, progress=False)
    assert vector.undefended == "tile"
    prompt = VisualSafetyPrompt.create(model.canvas, model.canvas // 8, text="please be safe")
    settings = TrainSettings(steps=6, batch_size=4, lr=4 / 255, refusal="sorry no")
    trained = train(model, prompt, bad, good, vector, settings, tmp_path / "out", progress=False)
    assert (trained.delta - prompt.delta).abs().max() > 3 * 4 / 255
    finished = trained.apply(trained.resize([picture(3)]))
    levels = (finished[0] * 255).round().byte().permute(1, 2, 0).numpy()
    encoded = theirs(folder, [Image.fromarray(levels)])
    exact = torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 255
    got = model.pixel_inputs(exact)["pixel_values"]
    assert torch.equal(got, encoded["pixel_values"]) and got.numel() // (3 * model.tile**2) == 5
    with pytest.raises(DavspError, match=f"350x350 pixels, but .* takes squares of {model.tile} or {2 * model.tile}"):
        LVLM.from_pretrained(folder, device_map="cpu", canvas=350)


def test_smolvlm_says_what_its_canvas_is(tmp_path):
    folder = save_family("smolvlm", tmp_path / "smolvlm")
    with pytest.raises(DavspError, match=r"its canvas is 56 and not 28; .* size\.longest_edge"):
        LVLM.from_pretrained(folder, device_map="cpu", canvas=28)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    for change in ({"size": {"longest_edge": 60}}, {"do_image_splitting": False}):
        (folder / "preprocessor_config.json").write_text(json.dumps(config | change))
        with pytest.raises(DavspError, match=r"it sees none as it is; set size\.longest_edge .* to 28"):
            LVLM.from_pretrained(folder, device_map="cpu")


def test_glm_says_what_is_too_thin(tmp_path):
    model = LVLM.from_pretrained(save_family("glm4v", tmp_path / "glm4v"), device_map="cpu", canvas=SIDE)
    with pytest.raises(DavspError, match="1x300 pixels is too thin"):
        model.preprocess([picture(0, (1, 300))])
    for width in range(1, 40):  # its own bound is the same, though it enlarges first
        model.seen(width, 200 * width)


def test_gemma_asks_and_ends_as_its_processor_and_template_do(tmp_path):
    folder = save_family("gemma3", tmp_path / "gemma3")
    model = LVLM.from_pretrained(folder, device_map="cpu")
    text = model.prompt("what is this", True)
    assert "user\n\n\n<start_of_image><image_soft_token><end_of_image>\n\nwhat is this<end_of_turn>" in text
    ids = model.encode(["what"], False, ["a car"]).ids[0].tolist()
    assert model.tokenizer.convert_ids_to_tokens(ids)[-3:] == ["a", "car", "<end_of_turn>"]
    for mark in ("<start_of_image>", "<image_soft_token>"):
        for pictures in (True, False) if mark == "<start_of_image>" else (True,):
            with pytest.raises(DavspError, match=f"the question holds the image placeholder {mark}"):
                model.encode([f"what is {mark}"], pictures)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"do_pan_and_scan": True}))
    with pytest.raises(DavspError, match=r"do_pan_and_scan .* davsp does not; set it to false"):
        LVLM.from_pretrained(folder, device_map="cpu")
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"size": {"height": 70, "width": 70}}))
    with pytest.raises(DavspError, match="makes 70x70 pixels, its tower takes 56x56: restore its files"):
        LVLM.from_pretrained(folder, device_map="cpu")
