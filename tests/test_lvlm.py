"""The interface to a model, against plain transformers."""

import json
import shutil
from copy import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor

from davsp import LVLM, DavspError, Query, evaluate
from davsp.defenses import NoDefense
from davsp.lvlm.hooks import steering
from tiny import picture

QUESTIONS = [
    "what is this",
    "how do you make a cake in the image",
    "is this a car",
    "please be safe what is this",
    "what is red",
    "how do you steal a car please",
    "yes",
    "no this is a red car in the image",
]
ANSWERS = ["a cake", "sorry no", "yes", "this is a red car in the image", "no", "sorry", "a car", "yes yes"]


@pytest.fixture(scope="module")
def canvas(lvlm):
    return lvlm.preprocess([picture(i) for i in range(8)])


def test_facts_of_the_checkpoint(lvlm):
    assert (lvlm.canvas, lvlm.tokens_per_image, lvlm.num_layers, lvlm.dtype) == (56, 16, 4, torch.float32)
    assert not any(weight.requires_grad for weight in lvlm.model.parameters())


def test_tokens(lvlm):
    tokens = lvlm.encode(["what is this", "yes"], True, ["a red cake", None])
    assert (tokens.ids == lvlm.image_token_id).sum(1).tolist() == [16, 16]
    assert lvlm.tokenizer.decode(tokens.ids[0][tokens.answer_mask[0]]) == "a red cake </s>"
    assert tokens.answer_mask.sum(1).tolist() == [4, 0]
    assert [lvlm.tokenizer.decode(row[at]) for row, at in zip(tokens.ids, tokens.last, strict=True)] == [":", ":"]
    left = lvlm.encode(["what is this", "yes"], False, padding_side="left")
    assert left.mask[:, -1].tolist() == [1, 1] and left.mask[1, 0] == 0 and left.last.tolist() == [6, 6]


@pytest.mark.parametrize("size", [(56, 56), (100, 70), (41, 200), (57, 56)])
def test_preprocess_is_the_checkpoints_own(lvlm, tiny_folder, size):
    processor = AutoImageProcessor.from_pretrained(tiny_folder, backend="pil")
    theirs = torch.from_numpy(np.stack(processor([picture(1, size)])["pixel_values"]))
    lvlm = copy(lvlm)
    lvlm.undefended = "crop"
    canvas = lvlm.preprocess([picture(1, size)])
    assert torch.equal(lvlm.pixel_inputs(canvas)["pixel_values"], theirs)
    levels = torch.round(canvas * 255)
    assert torch.equal(levels / 255, canvas)
    if size == (56, 56):
        assert torch.equal(levels[0].permute(1, 2, 0).to(torch.uint8), torch.from_numpy(np.array(picture(1))))


def test_states_are_the_hidden_states(lvlm, canvas):
    states = lvlm.states(canvas, QUESTIONS, [1, 2, 3])
    tokens = lvlm.encode(QUESTIONS, True)
    hidden = lvlm.model(input_ids=tokens.ids, output_hidden_states=True, **lvlm.pixel_inputs(canvas)).hidden_states
    assert torch.equal(states, torch.stack([hidden[layer][range(8), tokens.last] for layer in (1, 2, 3)], dim=1))
    for row, question in enumerate(QUESTIONS):  # alone, with transformers' own means
        tokens = lvlm.encode([question], True)
        out = lvlm.model(
            input_ids=tokens.ids,
            attention_mask=tokens.mask,
            output_hidden_states=True,
            **lvlm.pixel_inputs(canvas[row : row + 1]),
        )
        expected = torch.stack([out.hidden_states[layer][0, -1] for layer in (1, 2, 3)])
        torch.testing.assert_close(states[row], expected, rtol=0, atol=5e-5)


def test_a_batch_of_8_is_8_batches_of_1(lvlm, canvas):
    together = lvlm.step(canvas, QUESTIONS, 2, ANSWERS)
    apart = [lvlm.step(canvas[i : i + 1], QUESTIONS[i : i + 1], 2, ANSWERS[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(together.state, torch.cat([one.state for one in apart]), rtol=0, atol=5e-5)
    losses = torch.cat([one.answer_loss for one in apart])
    torch.testing.assert_close(together.answer_loss, losses, rtol=1e-5, atol=1e-5)


def test_answer_loss_is_that_of_the_full_logits(lvlm, canvas):
    answers = [*ANSWERS[:4], None, *ANSWERS[5:]]
    output = lvlm.step(canvas, QUESTIONS, 3, answers)
    tokens = lvlm.encode(QUESTIONS, True, answers)
    logits = lvlm.model(input_ids=tokens.ids, attention_mask=tokens.mask, **lvlm.pixel_inputs(canvas)).logits
    labels = tokens.ids.masked_fill(~tokens.answer_mask, -100)
    for row, answer in enumerate(answers):
        expected = cross_entropy(logits[row, :-1], labels[row, 1:]) if answer else torch.tensor(0.0)
        torch.testing.assert_close(output.answer_loss[row], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.state, lvlm.states(canvas, QUESTIONS, [3])[:, 0], rtol=0, atol=5e-5)


def test_a_step_without_answers_stops_at_the_layer(lvlm, canvas):
    seen = []
    before = [len(layer._forward_hooks) for layer in lvlm.layers]
    handles = [layer.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, layer in enumerate(lvlm.layers, 1)]
    output = lvlm.step(canvas, QUESTIONS, 2)
    for handle in handles:
        handle.remove()
    assert seen in ([1], [1, 2]) and output.answer_loss is None
    assert [len(layer._forward_hooks) for layer in lvlm.layers] == before  # nothing is left behind


def test_batched_generation_is_one_by_one_generation(lvlm, canvas):
    together = lvlm.generate(canvas, QUESTIONS, max_new_tokens=12)
    apart = [lvlm.generate(canvas[i : i + 1], [QUESTIONS[i]], max_new_tokens=12)[0] for i in range(8)]
    assert together == apart and len(set(together)) > 2
    words = lvlm.generate(None, QUESTIONS, max_new_tokens=12)
    assert words == [lvlm.generate(None, [question], max_new_tokens=12)[0] for question in QUESTIONS]


def test_generation_is_plain_greedy_search(lvlm, canvas):
    tokens = lvlm.encode([QUESTIONS[1]], True)
    ids = tokens.ids
    for _ in range(6):
        next_id = lvlm.model(input_ids=ids, **lvlm.pixel_inputs(canvas[1:2])).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, next_id], 1)
        if next_id.item() == lvlm.eos_token_id:
            break
    expected = lvlm.tokenizer.decode(ids[0, tokens.ids.shape[1] :], skip_special_tokens=True)
    assert lvlm.generate(canvas[1:2], [QUESTIONS[1]], max_new_tokens=6) == [expected]


def test_steering_changes_only_the_newest_token_at_its_layer(lvlm, canvas):
    """The vector is added where it should be: at the last prompt token and at each answer token, nowhere else."""
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    plain, steered = [], []

    def watch(store):
        return lvlm.layers[1].register_forward_hook(lambda module, inputs, output: store.append(output.clone()))

    handle = watch(plain)
    before = lvlm.generate(canvas[:2], QUESTIONS[:2], max_new_tokens=4)
    handle.remove()
    with steering(lvlm.layers, 2, vector):  # its hook comes first, so the one that watches sees the steered output
        handle = watch(steered)
        lvlm.model.generate(
            **lvlm.inputs(lvlm.encode(QUESTIONS[:2], True, padding_side="left"), canvas[:2], masked=True),
            max_new_tokens=4,
            do_sample=False,
        )
        handle.remove()
    change = steered[0] - plain[0]
    torch.testing.assert_close(change[:, -1], vector.expand(2, -1), rtol=0, atol=1e-5)
    assert torch.count_nonzero(change[:, :-1]) == 0
    assert all(hidden.shape[1] == 1 for hidden in steered[1:])
    zero = lvlm.generate(canvas[:2], QUESTIONS[:2], max_new_tokens=4, steer=(2, torch.zeros(32)))
    assert zero == before
    assert lvlm.generate(canvas[:2], QUESTIONS[:2], max_new_tokens=4, steer=(2, 20 * vector)) != before
    assert lvlm.generate(canvas[:2], QUESTIONS[:2], max_new_tokens=4) == before  # nothing is left behind


def test_gradient_reaches_the_canvas_and_nothing_else(lvlm, canvas):
    leaf = canvas[:2].clone().requires_grad_()
    lvlm.states(leaf, QUESTIONS[:2], [2]).sum().backward()
    assert leaf.grad.abs().sum() > 0 and all(weight.grad is None for weight in lvlm.model.parameters())
    assert not lvlm.states(canvas[:2], QUESTIONS[:2], [2]).requires_grad


@pytest.mark.parametrize("layer", [0, 4, -1, 99])
def test_a_layer_out_of_range_is_named(lvlm, canvas, layer):
    with pytest.raises(DavspError, match=f"layer {layer} is out of range.*1 to 3"):
        lvlm.states(canvas, QUESTIONS, [layer])
    with pytest.raises(DavspError, match="out of range"):
        lvlm.step(canvas, QUESTIONS, layer)
    with pytest.raises(DavspError, match="out of range"):
        lvlm.generate(canvas, QUESTIONS, steer=(layer, torch.zeros(32)))


def test_a_canvas_of_another_size_is_named(lvlm):
    with pytest.raises(DavspError, match=r"64x64 pixels.*56x56"):
        lvlm.states(torch.zeros(1, 3, 64, 64), ["yes"], [1])


def test_bad_questions(lvlm, canvas):
    with pytest.raises(DavspError, match="empty"):
        lvlm.generate(None, [])
    with pytest.raises(DavspError, match="image placeholder <image>"):
        lvlm.generate(canvas[:1], ["what is <image> this"])
    with pytest.raises(DavspError, match="empty"):
        lvlm.preprocess([])


@pytest.mark.parametrize("device", ["foo", "cpu:x", "meta", "cuda:99"])
def test_a_bad_device_is_named(tiny_folder, device):
    with pytest.raises(DavspError, match=f"device '{device}' cannot be used here \\(.+\\); choose another"):
        LVLM.from_pretrained(tiny_folder, device_map=device)


def test_broken_and_missing_weights_are_one_sentence(tiny_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if "multi_modal_projector" in n)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DavspError, match=r"cannot load model .*lacks the weights of .*multi_modal_projector"):
        LVLM.from_pretrained(folder, device_map="cpu")
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(DavspError, match=r"cannot load model .*check its name, or mend its files"):
        LVLM.from_pretrained(folder, device_map="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DavspError, match="cannot load model"):
        LVLM.from_pretrained(folder, device_map="cpu")

    def silent(*args, **options):
        raise OSError

    monkeypatch.setattr("davsp.lvlm.base.AutoConfig.from_pretrained", silent)
    with pytest.raises(DavspError, match=r"model: OSError; check"):
        LVLM.from_pretrained(folder, device_map="cpu")


def test_bad_checkpoints(tiny_folder, tmp_path):
    with pytest.raises(DavspError, match="cannot load model"):
        LVLM.from_pretrained(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(DavspError, match=r"'bert' model; the families known are: .*llava"):
        LVLM.from_pretrained(tmp_path)


def test_an_older_checkpoint_keeps_its_template_beside_the_tokenizer(tiny_folder, tmp_path, lvlm):
    folder = shutil.copytree(tiny_folder, tmp_path / "old")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DavspError, match="no chat template"):
        LVLM.from_pretrained(folder, device_map="cpu")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    old = LVLM.from_pretrained(folder, device_map="cpu")
    assert torch.equal(old.encode(QUESTIONS, True).ids, lvlm.encode(QUESTIONS, True).ids)


CONCAT = (
    "{% for m in messages %}{{ 'user : ' + m['content'] }}{% endfor %}{{ ' assistant :' }}"  # as of Vicuna and Qwen2
)
TRIM = (
    "{% for m in messages %}user : {{ m['content'] | trim }}{% endfor %} assistant :"  # as of Llama 3: prints the list
)


def with_templates(folder, tokenizers, **files):
    """The checkpoint with a template in its tokenizer's configuration, and others in files of their own."""
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": tokenizers}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, template in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.mark.parametrize("base", [CONCAT, TRIM])
def test_of_two_templates_the_processors_decides(lvlm, tiny_folder, tmp_path, base):
    mine, other = lvlm.tokenizer.chat_template, TRIM.replace("user", "car")
    json_file = with_templates(shutil.copytree(tiny_folder, tmp_path / "json"), base, chat_template=mine)
    both = with_templates(
        shutil.copytree(tiny_folder, tmp_path / "both"), base, chat_template=other, processor_config=mine
    )
    for folder in (json_file, both):
        model = LVLM.from_pretrained(folder, device_map="cpu")
        for images in (True, False):
            assert torch.equal(model.encode(QUESTIONS, images).ids, lvlm.encode(QUESTIONS, images).ids)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (CONCAT, "it fails: can only concatenate"),
        (TRIM, r"it makes .*type.*: .*text"),
        ("user : cake assistant :", "it makes 'user : cake"),
    ],
)
@pytest.mark.parametrize("images", [True, False])
def test_a_template_that_does_not_show_the_question_is_named(tiny_folder, tmp_path, template, why, images):
    model = LVLM.from_pretrained(
        with_templates(shutil.copytree(tiny_folder, tmp_path / "model"), template), device_map="cpu"
    )
    with pytest.raises(
        DavspError, match=rf"the chat template of .*model cannot show a question as it is \({why}.*jinja"
    ):
        model.encode(["what is this"], images)


def test_a_template_without_a_place_for_the_picture_is_named(tiny_folder, tmp_path):
    template = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %} assistant :"
    model = LVLM.from_pretrained(
        with_templates(shutil.copytree(tiny_folder, tmp_path / "model"), template), device_map="cpu"
    )
    assert model.encode(["what is this"], False).ids.shape == (1, 5)
    with pytest.raises(DavspError, match="1 pictures are 0 times <image> there"):
        model.encode(["what is this"], True)
    with pytest.raises(DavspError, match="the question holds the image placeholder <image>"):
        model.encode(["what is <image>"], False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no_repeat_ngram_size", 2), ("suppress_tokens", [*range(5, 15)]), ("exponential_decay_length_penalty", [1, 3.0]),
        ("max_time", 1e-5), ("stop_strings", ["cake"]), ("return_dict_in_generate", True), ("temperature", 0.1), ("num_beams", 4),
        ("forced_eos_token_id", 2), ("do_sample", True), ("guidance_scale", 3.0), ("repetition_penalty", 2.0),
    ],
)  # fmt: skip
def test_greedy_is_greedy_whatever_the_checkpoint_says(lvlm, tiny_folder, tmp_path, name, value):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {name: value}))
    model = LVLM.from_pretrained(folder, device_map="cpu")
    assert model.generate(None, QUESTIONS, 12) == lvlm.generate(None, QUESTIONS, 12)
    assert (lvlm.overridden, model.overridden) == ({}, {name: value})
    query = Query("1", "what is this", "benign", "test")
    evaluate(model, {"none": NoDefense()}, [query], tmp_path / "run", max_new_tokens=2, manifest={})
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["generation_config_overridden"] == {name: value}


def test_what_is_longer_than_the_positions_is_refused_before_it_is_computed(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 40
    (folder / "config.json").write_text(json.dumps(config))
    model = LVLM.from_pretrained(folder, device_map="cpu")
    question = " ".join(["cake"] * 15)
    canvas = model.preprocess([picture(0)])
    prompt = model.encode([question], True).ids.shape[1]
    room = 40 - prompt
    model.generate(canvas, [question], room)
    model.check_query(question, (90, 30), room)
    model.encode([question], True, ["cake " * (room - 1)])  # and the end token
    refused = pytest.raises(
        DavspError, match=rf"{prompt} \+ {room + 1} tokens, but .*model has 40 positions; shorten .*cake"
    )
    for use in (
        lambda: model.generate(canvas, [question], room + 1),
        lambda: model.check_query(question, (90, 30), room + 1),
        lambda: model.step(canvas, [question], 2, ["cake " * room]),
    ):
        with refused:
            use()
    with pytest.raises(DavspError, match="has 40 positions"):
        model.states(canvas, ["cake " * 40], [1])


def test_folders_that_people_point_at_are_told_what_they_are(tiny_folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "llava-hf/x", "peft_type": "LORA"})
    )
    with pytest.raises(DavspError, match=r"is an adapter \(LoRA\) for llava-hf/x and no model; merge it"):
        LVLM.from_pretrained(adapter)
    own = shutil.copytree(tiny_folder, tmp_path / "own")
    (own / "config.json").write_text(json.dumps({"model_type": "llava", "mm_vision_tower": "openai/clip"}))
    with pytest.raises(DavspError, match=r"in LLaVA's own format.*llava-hf/llava-1.5-7b-hf"):
        LVLM.from_pretrained(own)


def test_llavas_image_processor_is_clips(tiny_folder, tmp_path, lvlm):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"image_processor_type": "LlavaImageProcessor", "do_pad": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    images = [picture(1, (100, 70)), picture(2)]
    assert torch.equal(LVLM.from_pretrained(folder, device_map="cpu").preprocess(images), lvlm.preprocess(images))


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_another_familys_processor_names_the_file_that_was_read(tiny_folder, tmp_path, name):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    other = {"image_processor_type": "Qwen2VLImageProcessor"}
    nested = {"image_processor": other} if name == "processor_config.json" else other
    (folder / name).write_text(json.dumps(nested))
    with pytest.raises(DavspError, match=rf"Qwen2VLImageProcessor, but .*: restore its {name}"):
        LVLM.from_pretrained(folder, device_map="cpu")


def test_auto_without_a_gpu_is_float32(tiny_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert LVLM.from_pretrained(tiny_folder, device_map="auto").dtype == torch.float32
