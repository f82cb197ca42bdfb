"""Every family against plain transformers: pixels, prompt ids, hidden states, generation, prompts."""

import json
import shutil
import sys
from importlib import import_module
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    DeepseekVLHybridProcessor,
    DeepseekVLProcessor,
    Gemma3Processor,
    Glm4vProcessor,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from davsp import LVLM, DavspError, HarmfulnessVector, Query, TrainSettings, VisualSafetyPrompt, evaluate, train
from davsp.defenses import NoDefense, VisualPrompt
from davsp.lvlm import FAMILIES
from davsp.lvlm.loading import beside_decoder
from davsp.lvlm.resample import resample
from davsp.prompts import AdditiveNoise
from davsp.query import flatten
from families import save_family
from tiny import picture, queries

QUESTIONS = ["what is this", "how do you make a cake in the image", "is this a car", "please be safe what is this",
             "what is red", "how do you steal a car please", "yes", "no this is a red car in the image"]  # fmt: skip
ANSWERS = ["a cake", "sorry no", "yes", "this is a red car in the image", "no", "sorry", "a car", "yes yes"]
SIDE = 112  # of Qwen2-VL's canvas here
EXPANDS = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor,
           "qwen3_5": Qwen3VLProcessor, "internvl": InternVLProcessor, "glm4v": Glm4vProcessor,
           "mistral3": "pixtral.PixtralProcessor", "llava_onevision": "llava_onevision.LlavaOnevisionProcessor",
           "idefics3": "idefics3.Idefics3Processor", "smolvlm": "smolvlm.SmolVLMProcessor", "qwen3_vl_moe": Qwen3VLProcessor,
           "glm4v_moe": Glm4vProcessor, "glm46v": Glm4vProcessor, "gemma4": "gemma4.Gemma4Processor",
           "aya_vision": "aya_vision.AyaVisionProcessor"}  # fmt: skip
PROCESSORS = {
    "llava": LlavaProcessor,
    "deepseek_vl": DeepseekVLProcessor,
    "deepseek_vl_hybrid": DeepseekVLHybridProcessor,
    "gemma3": Gemma3Processor,
    "llava_next": LlavaNextProcessor,
}
SIDES = {
    "qwen2_vl": SIDE,
    "qwen2_5_vl": SIDE,
    "qwen3_vl": 128,
    "qwen3_5": 128,
    "qwen3_vl_moe": 128,
    "glm4v_moe": SIDE,
    "glm46v": SIDE,
    "glm4v": SIDE,
    "mistral3": SIDE,
}  # where there are many to choose from
READ = {"image_seq_length": 4, "image_seq_len": 4, "patch_size": 14, "spatial_merge_size": 2, "num_image_tokens": 16,
        "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_4", "global_image_tag": "<global-img>", "img_size": 28,
        "tile_token": "TILE", "tile_global_token": "TILE_GLOBAL"}  # fmt: skip
"""Of their processors' own settings."""
OPTIONS = {
    "mistral3": {"patch_size": 28},
    "internvl": {"crop_to_patches": True},
    "aya_vision": {"crop_to_patches": True},
}  # what the whole processor tells its image processor


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return save_family(request.param, tmp_path_factory.mktemp("family") / request.param)


@pytest.fixture(scope="module")
def model(folder):
    return LVLM.from_pretrained(folder, device_map="cpu", canvas=SIDES.get(folder.name))


@pytest.fixture(scope="module")
def canvas(model):
    return model.preprocess([picture(i, (model.canvas, model.canvas)) for i in range(8)])


def theirs(folder, images, **options):
    """What the family's own image processor gives."""
    options = OPTIONS.get(folder.name, {}) | options
    if folder.name in ("idefics3", "smolvlm"):
        images = [[image] for image in images]  # a list is of one question else
    encoded = AutoImageProcessor.from_pretrained(folder, backend="pil")(images, return_tensors="pt", **options)
    counts = ("num_crops", "num_patches", "batch_num_images", "num_soft_tokens_per_image")  # no argument of the model
    return {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor) and name not in counts}


def its_rule(processor):
    """A processor's class; some files import torchvision, which the rule for the text has no need of."""
    if not isinstance(processor, str):
        return processor
    family, name = processor.split(".")
    names = [
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.v2",
        "torchvision.transforms.v2.functional",
    ]
    with patch.dict(sys.modules, dict.fromkeys(names, MagicMock())):
        return getattr(import_module(f"transformers.models.{family}.processing_{family}"), name)


def test_a_finished_canvas_is_seen_exactly_as_the_processor_shows_it(folder, model, canvas):
    assert canvas.shape == (8, 3, model.canvas, model.canvas)
    images = [Image.fromarray((one * 255).round().byte().permute(1, 2, 0).numpy()) for one in canvas]
    assert all(np.array_equal(np.array(a), np.array(picture(i, a.size))) for i, a in enumerate(images))
    expected, got = theirs(folder, images), model.pixel_inputs(canvas)
    assert set(got) >= set(expected)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("size", [(100, 70), (41, 200), (300, 310)])
def test_an_undefended_picture_is_what_the_processor_makes_of_it(folder, model, size):
    images, model = (
        [picture(1, size), picture(2, (90, 60))],
        model.showing("tile" if "tile" in model.ways else model.ways[-1]),
    )
    expected, got = theirs(folder, images), model.pixel_inputs(model.preprocess(images))
    for name in expected:
        tolerance = (
            2 * 2 / 255 if name == "pixel_values" and len(expected) > 1 and "grid" not in str(expected.keys()) else 0
        )
        assert (got[name] - expected[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("size", [None, (41, 200)])
def test_prompt_ids_are_the_processors_own(folder, model, size):
    """Chat template and placeholder rule, token for token: of the canvas, and of an undefended picture."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[1]}]
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    image = picture(0, size or (model.canvas, model.canvas))
    tokens = model.encode([QUESTIONS[1]], model.sizes(model.preprocess([image])) if size else True)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if (
        folder.name in EXPANDS
    ):  # it cannot be made without torchvision; this is its own rule, on what it reads of itself
        rule, marks = its_rule(EXPANDS[folder.name]), model.tokenizer.init_kwargs | model.tokenizer.special_tokens_map
        marker = marks.get("context_image_token") or marks["image_token"]
        itself = object.__new__(rule)
        vars(itself).update(READ | marks | {"image_processor": processor, "image_token": marker})
        told = OPTIONS.get(folder.name, {}) | dict.fromkeys(["return_row_col_info"] * ("row_1_col_1" in marks), True)
        put = itself.replace_image_token(processor([image], **told), 0)
        expected = model.tokenizer(text.replace(marker, put))["input_ids"]
    else:
        extra = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        extra = {"llava": extra, "gemma3": {"image_seq_length": 4}, "llava_next": extra | {"patch_size": 7}}.get(
            folder.name, {"num_image_tokens": 16}
        )
        whole = PROCESSORS[folder.name](processor, model.tokenizer, **extra)
        twice = {"add_special_tokens": not text.startswith("<s>")}  # as `apply_chat_template` of a processor asks it
        encoded = whole(images=[image], text=[text], return_tensors="pt", **twice)
        expected = encoded["input_ids"][0].tolist()
        if "token_type_ids" in encoded:
            assert torch.equal(model.token_inputs(tokens.ids)["token_type_ids"], encoded["token_type_ids"].int())
    assert tokens.ids[0].tolist() == expected
    assert size or len(expected) > model.tokens_per_image + 8


def test_states_are_the_hidden_states_of_each_row_alone(model, canvas):
    states = model.states(canvas, QUESTIONS, [1, 2, 3])
    for row, question in enumerate(QUESTIONS):
        inputs = model.inputs(model.encode([question], True), canvas[row : row + 1], masked=True)
        hidden = model.model(**inputs, output_hidden_states=True).hidden_states
        expected = torch.stack([hidden[layer][0, -1] for layer in (1, 2, 3)])
        torch.testing.assert_close(states[row], expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_8_is_8_batches_of_1(model, canvas):
    together = model.step(canvas, QUESTIONS, 2, ANSWERS)
    apart = [model.step(canvas[i : i + 1], QUESTIONS[i : i + 1], 2, ANSWERS[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(together.state, torch.cat([one.state for one in apart]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.answer_loss, torch.cat([o.answer_loss for o in apart]), rtol=1e-4, atol=1e-4)


def test_a_step_without_answers_never_runs_the_upper_layers(model, canvas):
    seen = []
    handles = [layer.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, layer in enumerate(model.layers, 1)]
    output = model.step(canvas, QUESTIONS, 2)
    for handle in handles:
        handle.remove()
    assert seen in ([1], [1, 2]) and output.answer_loss is None
    torch.testing.assert_close(output.state, model.states(canvas, QUESTIONS, [2])[:, 0])


def test_generation_batched_is_one_by_one_and_leaves_nothing_behind(model, canvas):
    words = model.states(None, QUESTIONS, [2])
    together = model.generate(canvas, QUESTIONS, max_new_tokens=6)
    apart = [model.generate(canvas[i : i + 1], [QUESTIONS[i]], max_new_tokens=6)[0] for i in range(8)]
    assert together == apart and len(set(together)) > 2
    assert torch.equal(
        model.states(None, QUESTIONS, [2]), words
    )  # Qwen2-VL keeps position offsets of the last pictures
    bare = model.generate(None, QUESTIONS, max_new_tokens=6)
    assert bare == [model.generate(None, [question], max_new_tokens=6)[0] for question in QUESTIONS]


def test_the_gradient_is_that_of_the_whole_path(folder, canvas):
    """Against a finite difference along a random direction, in float64; where the whole is resampled, rounding is passed straight through."""
    rounds = folder.name in ("deepseek_vl_hybrid", "smolvlm")
    model = LVLM.from_pretrained(folder, device_map="cpu", dtype="float64", canvas=SIDES.get(folder.name))
    if folder.name.endswith("_moe"):
        model.model.set_experts_implementation("eager")  # the grouped product knows no float64
    point, direction = canvas[:2].double(), torch.randn(2, 3, model.canvas, model.canvas, dtype=torch.float64)

    def value(x):
        output = model.step(x, QUESTIONS[:2], 2, ANSWERS[:2])
        return output.state.sum() + output.answer_loss.sum()

    leaf = point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    assert gradient.abs().sum() > 0 and gradient.isfinite().all()
    if not rounds:
        step = 2e-4 if folder.name == "gemma4" else 1e-3  # the decoders' norms compute in float32
        with torch.no_grad():
            change = (value(point + step * direction) - value(point - step * direction)) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), change, rtol=2e-2, atol=1e-3)


def test_a_prompt_defends_and_is_measured(model, tmp_path):
    """Save, load, evaluate with and without: the same code for every family."""
    prompt = VisualSafetyPrompt.create(model.canvas, model.canvas // 8, "random", 0, "please be safe")
    prompt.save_pretrained(tmp_path / "prompt")
    prompt = VisualSafetyPrompt.from_pretrained(tmp_path / "prompt")
    queries = [Query(f"q{i}", QUESTIONS[i], "malicious" if i % 2 else "benign", "test", image=picture(i, (60 + 9 * i, 70)))
               for i in range(4)]  # fmt: skip
    result = evaluate(model, {"none": NoDefense(), "davsp": VisualPrompt(prompt)}, queries, max_new_tokens=5)
    texts = {name: [r.text for r in result.responses[name]] for name in ("none", "davsp")}
    assert texts["none"] != texts["davsp"]


def test_a_border_is_trained_six_steps(model, tmp_path):
    """Vector, layer, margins, hinge and answer loss as everywhere; blocks are computed again on the way back."""
    bad, good = queries("malicious", 6), queries("benign", 6)
    vector = HarmfulnessVector.fit(model, bad, good, progress=False)
    prompt = VisualSafetyPrompt.create(model.canvas, model.canvas // 8, text="please be safe")
    settings = TrainSettings(steps=6, batch_size=4, lr=4 / 255, refusal="sorry no", activation_checkpointing=True)
    trained = train(model, prompt, bad, good, vector, settings, tmp_path / "out", progress=False)
    moved = (trained.delta - prompt.delta).abs()
    assert moved.max() > 3 * 4 / 255 and len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) >= 6
    assert trained.delta.isfinite().all() and not moved[:, model.canvas // 2, model.canvas // 2].any()


def test_one_transparent_colour_is_white_with_and_without_a_prompt(model):
    clear = picture(0, (model.canvas, model.canvas)).quantize(4).convert("RGB")
    clear.info["transparency"] = clear.getpixel((0, 0))
    white = flatten(clear)
    assert white.getpixel((0, 0)) == (255, 255, 255) != clear.getpixel((0, 0))
    assert torch.equal(model.preprocess([clear]), model.preprocess([white]))
    for prompt in (VisualSafetyPrompt.create(model.canvas, 4), AdditiveNoise.create(model.canvas)):
        assert torch.equal(prompt.resize([clear]), prompt.resize([white]))


def test_a_canvas_that_would_be_resampled_is_refused(model, canvas):
    wrong = model.canvas + 14
    if "tile" not in model.ways:  # of these, every picture is taken that wants no gradient
        with pytest.raises(DavspError, match=f"{wrong}x{wrong} pixels, but .* takes"):
            model.states(torch.zeros(1, 3, wrong, wrong), ["yes"], [1])
    with pytest.raises(DavspError, match="use a prompt made for this model"):
        VisualPrompt(VisualSafetyPrompt.create(wrong, 4)).respond(model, [Query("a", "yes", "benign", "test")])


def test_a_canvas_that_the_model_does_not_take_is_not_passed_over(folder):
    with pytest.raises(DavspError, match=r"canvas.*61"):
        LVLM.from_pretrained(folder, device_map="cpu", canvas=61)


def test_a_processor_of_another_family_is_named(folder, tmp_path):
    other = "qwen2_vl" if folder.name == "llava" else "llava"
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    shutil.copy(save_family(other, tmp_path / "other") / "preprocessor_config.json", mixed)
    with pytest.raises(DavspError, match=r"comes with a \w+ImageProcessor, but its model needs .*preprocessor_config"):
        LVLM.from_pretrained(mixed, device_map="cpu")


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


@pytest.mark.parametrize("size", [(100, 70), (41, 200), (300, 310), (3, 600), (5, 5), (2000, 30)])
def test_the_size_of_an_undefended_picture_is_known_before_it_is_made(model, size):
    """Or that it is too thin."""
    assert model.preprocess([picture(0, size)]).shape[-2:] == model.seen(*size)


def test_a_canvas_is_taken_exactly_where_the_processor_would_leave_it_alone(model):
    """Of families that take many sizes; GLM counts every pixel twice."""
    for side in range(14, 400, 2) if model.ways == ("resize",) else ():
        try:
            model.check_canvas(side, side)
            taken = True
        except DavspError:
            taken = False
        assert taken == (model.seen(side, side) == (side, side)), side


@pytest.mark.parametrize("size", [(100, 70), (310, 300), (56, 56), (112, 112), (168, 168), (600, 30)])
def test_tiles_of_an_undefended_picture_are_its_processors(folder, model, size):
    """Tiles and the whole, to the bit, and as many features as placeholders; a canvas of k x k tiles gives the same from its own pixels."""
    if "tile" not in model.ways:
        return
    assert model.undefended == "tile"
    images = [picture(1, size), picture(2, (90, 60))]
    made, expected = model.preprocess(images), theirs(folder, images)
    got = model.pixel_inputs(made)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert [model.seen(*one.size) for one in images] == [tuple(one.shape[-2:]) for one in made]
    together = model.states(made, QUESTIONS[:2], [2])
    apart = torch.cat([model.states(one[None], [q], [2]) for one, q in zip(made, QUESTIONS[:2], strict=True)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


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


def test_a_picture_in_tiles_has_no_gradient_unless_it_is_a_canvas(model):
    if "tile" not in model.ways:
        return
    wrong = torch.rand(1, 3, model.canvas + 14, model.canvas + 14, requires_grad=True)
    with pytest.raises(DavspError, match="use a prompt made for this model"):
        model.states(wrong, ["yes"], [1])
    other = model.showing(model.ways[-1])  # on one tile: a gradient reaches what is shown so
    made = other.preprocess([picture(0, (100, 70))])
    assert made.shape[-2:] == other.seen(100, 70) and other.differentiable(*made.shape[-2:])
    (gradient,) = torch.autograd.grad(other.states(made.requires_grad_(), ["yes"], [1]).sum(), made)
    assert gradient.abs().sum() > 0


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


def test_what_is_not_the_decoder_stays_unquantised(folder, model):
    """Every linear layer is in the decoder or in what is named; the decoder is not."""
    keep = beside_decoder(AutoConfig.from_pretrained(folder))
    decoder = {id(module) for module in model.model.get_decoder().modules()}
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert should_convert_module(name, keep) == (id(module) in decoder), name
    assert "lm_head" in keep and len(keep) >= 2


def test_quantization_says_what_it_needs(tmp_path, monkeypatch):
    folder = save_family("llava", tmp_path / "llava")
    with pytest.raises(DavspError, match="choose 4bit or 8bit"):
        LVLM.from_pretrained(folder, device_map="cpu", quantization="3bit")
    monkeypatch.setattr("davsp.lvlm.loading.find_spec", lambda name: None)
    with pytest.raises(DavspError, match=r"needs bitsandbytes.*davsp\[quantization\]"):
        LVLM.from_pretrained(folder, device_map="cpu", quantization="4bit")


@pytest.mark.parametrize("kernel", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
@pytest.mark.parametrize(("size", "side"), [(128, 56), (56, 128), (336, 276), (1024, 384), (100, 99)])
def test_resample_is_pillows(kernel, size, side):
    image = picture(3, (size, size))
    canvas = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    expected = torch.from_numpy(np.array(image.resize((side, side), kernel))).permute(2, 0, 1)[None]
    assert torch.equal((resample(canvas, side, kernel) * 255).round().byte(), expected)


def test_the_gradient_of_a_resample_is_that_of_its_weights():
    leaf = torch.rand(1, 3, 20, 20, requires_grad=True)
    (gradient,) = torch.autograd.grad(resample(leaf, 10, Image.Resampling.BILINEAR).sum(), leaf)
    torch.testing.assert_close(gradient.sum(), torch.tensor(300.0))  # every output's weights sum to 1
    with pytest.raises(ValueError, match="no matrix for BOX"):
        resample(leaf, 10, Image.Resampling.BOX)
