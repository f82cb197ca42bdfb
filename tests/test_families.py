"""What every family keeps, with random weights, against plain transformers: processors' pixels and ids, states, batches, gradients, prompts, tiles."""

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
from davsp.prompts import AdditiveNoise
from davsp.query import flatten
from families import OPTIONS, QUESTIONS, SIDE, save_family, theirs
from tiny import picture, queries

ANSWERS = ["a cake", "sorry no", "yes", "this is a red car in the image", "no", "sorry", "a car", "yes yes"]
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
WAYS = {
    "tile": ["internvl", "llava_next", "llava_onevision", "idefics3", "smolvlm", "aya_vision"],
    "resize": ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "gemma4", "glm4v", "glm4v_moe", "glm46v", "mistral3"],
}  # fmt: skip
"""How a picture is shown by its authors' code -> the families; in the others it is padded or stretched to the one canvas."""


def showing_by(way):
    """A test that is of these families alone."""
    return pytest.mark.parametrize("folder", WAYS[way], indirect=True)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return save_family(request.param, tmp_path_factory.mktemp("family") / request.param)


@pytest.fixture(scope="module")
def model(folder):
    return LVLM.from_pretrained(folder, device_map="cpu", canvas=SIDES.get(folder.name))


@pytest.fixture(scope="module")
def canvas(model):
    return model.preprocess([picture(i, (model.canvas, model.canvas)) for i in range(8)])


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
    counted = {(row["defense"], row["metric"]): row["n"] for row in result.rows}
    assert [counted[name, metric] for name in texts for metric in ("unscored", "over_refusal", "calls")] == [
        2,
        2,
        4,
    ] * 2


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


@pytest.mark.parametrize("size", [(100, 70), (41, 200), (300, 310), (3, 600), (5, 5), (2000, 30)])
def test_the_size_of_an_undefended_picture_is_known_before_it_is_made(model, size):
    """Or that it is too thin."""
    assert model.preprocess([picture(0, size)]).shape[-2:] == model.seen(*size)


def test_the_families_show_pictures_as_listed(folder, model):
    assert ("tile" in model.ways) == (folder.name in WAYS["tile"])
    assert (model.ways == ("resize",)) == (folder.name in WAYS["resize"])


@showing_by("resize")
def test_a_canvas_is_taken_exactly_where_the_processor_would_leave_it_alone(model):
    """GLM counts every pixel twice."""
    for side in range(14, 400, 2):
        try:
            model.check_canvas(side, side)
            taken = True
        except DavspError:
            taken = False
        assert taken == (model.seen(side, side) == (side, side)), side


@showing_by("tile")
@pytest.mark.parametrize("size", [(100, 70), (310, 300), (56, 56), (112, 112), (168, 168), (600, 30)])
def test_tiles_of_an_undefended_picture_are_its_processors(folder, model, size):
    """Tiles and the whole, to the bit, and as many features as placeholders; a canvas of k x k tiles gives the same from its own pixels."""
    assert model.undefended == "tile"
    images = [picture(1, size), picture(2, (90, 60))]
    made, expected = model.preprocess(images), theirs(folder, images)
    got = model.pixel_inputs(made)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert [model.seen(*one.size) for one in images] == [tuple(one.shape[-2:]) for one in made]
    together = model.states(made, QUESTIONS[:2], [2])
    apart = torch.cat([model.states(one[None], [q], [2]) for one, q in zip(made, QUESTIONS[:2], strict=True)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@showing_by("tile")
def test_a_picture_in_tiles_has_no_gradient_unless_it_is_a_canvas(model):
    wrong = torch.rand(1, 3, model.canvas + 14, model.canvas + 14, requires_grad=True)
    with pytest.raises(DavspError, match="use a prompt made for this model"):
        model.states(wrong, ["yes"], [1])
    other = model.showing(model.ways[-1])  # on one tile: a gradient reaches what is shown so
    made = other.preprocess([picture(0, (100, 70))])
    assert made.shape[-2:] == other.seen(100, 70) and other.differentiable(*made.shape[-2:])
    (gradient,) = torch.autograd.grad(other.states(made.requires_grad_(), ["yes"], [1]).sum(), made)
    assert gradient.abs().sum() > 0


def test_what_is_not_the_decoder_stays_unquantised(folder, model):
    """Every linear layer is in the decoder or in what is named; the decoder is not."""
    keep = beside_decoder(AutoConfig.from_pretrained(folder))
    decoder = {id(module) for module in model.model.get_decoder().modules()}
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert should_convert_module(name, keep) == (id(module) in decoder), name
    assert "lm_head" in keep and len(keep) >= 2
