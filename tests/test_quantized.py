"""Checkpoints that are quantized as they come: FP8 is taken apart, and the picture's gradient is that of its numbers; others are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import run
from davsp import LVLM, DavspError
from davsp.lvlm import fingerprint, model_facts
from families import save_family
from tiny import queries, save_tiny

BLOCK, WEIGHTS = 16, "model.safetensors"


def as_fp8(folder: Path, plain: Path) -> None:
    """Make the decoder's linear layers of a checkpoint FP8 in blocks; `plain` gets the numbers that they stand for."""
    quantized, numbers = {}, {}
    for name, weight in load_file(folder / WEIGHTS).items():
        quantized[name] = numbers[name] = weight
        if name.endswith("_proj.weight") and name.startswith("language_model"):
            rows, columns = weight.shape
            blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448  # the largest number of e4m3
            small = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            quantized[name] = small.reshape(rows, columns)
            quantized[name + "_scale_inv"] = scale
            numbers[name] = (small.float() * scale[:, None, :, None]).reshape(rows, columns)
    save_file(quantized, folder / WEIGHTS, {"format": "pt"})
    save_file(numbers, plain / WEIGHTS, {"format": "pt"})
    skipped = ["vision_tower", "multi_modal_projector", "lm_head"]
    say(
        folder,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": skipped,
        },
    )


def say(folder: Path, config: dict[str, Any]) -> None:
    """Write a quantization_config into a checkpoint."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    fp8, plain = (save_tiny(tmp_path_factory.mktemp(name)) for name in ("fp8", "plain"))
    as_fp8(fp8, plain)
    return fp8, plain


def gradient(lvlm: LVLM) -> torch.Tensor:
    canvas = lvlm.preprocess([picture for q in queries("malicious", 2) if (picture := q.picture())])
    assert isinstance(canvas, torch.Tensor)
    loss = lvlm.step(canvas.requires_grad_(), ["what is this"] * 2, 2, ["a red cake"] * 2).answer_loss
    assert loss is not None
    return torch.autograd.grad(loss.sum(), canvas)[0]


def test_fp8_has_the_gradient_of_its_numbers(folders: tuple[Path, Path]) -> None:
    quantized, plain = (LVLM.from_pretrained(folder, device_map="cpu") for folder in folders)
    assert {p.dtype for p in quantized.model.parameters()} == {torch.float32}
    a, b = gradient(quantized), gradient(plain)
    assert torch.equal(a, b) and a.abs().max() > 0
    assert quantized.generate(None, ["what is this"], 6) == plain.generate(None, ["what is this"], 6)


def test_fp8_in_bfloat16_is_near(folders: tuple[Path, Path]) -> None:
    """transformers reads the scales in the model's dtype, which rounds them."""
    a, b = (gradient(LVLM.from_pretrained(folder, device_map="cpu", dtype="bfloat16")) for folder in folders)
    assert (a - b).abs().max() <= 0.1 * b.abs().max()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "awq", "bits": 4}, "is quantized by awq, for which transformers needs gptqmodel: pip install gptqmodel"),
        ({"quant_method": "gptq", "bits": 4}, "is quantized by gptq, for which transformers needs gptqmodel and optimum"),
        ({"quant_method": "compressed-tensors"}, "is quantized by compressed-tensors, for which transformers needs"),
        ({"quant_method": "hqq"}, "is quantized by hqq, through which nobody has seen that the picture's gradient passes"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], says: str
) -> None:
    folder = save_tiny(tmp_path)
    say(folder, config)
    monkeypatch.setattr("davsp.lvlm.loading.find_spec", lambda name: None)
    with pytest.raises(DavspError, match=says):
        LVLM.from_pretrained(folder, device_map="cpu")


def test_quantized_twice(folders: tuple[Path, Path]) -> None:
    with pytest.raises(DavspError, match=r"is quantized already \(fp8\); leave --quantization out"):
        LVLM.from_pretrained(folders[0], device_map="cpu", quantization="4bit")


def test_quantization_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_family("llava", tmp_path / "llava")
    with pytest.raises(DavspError, match="choose 4bit or 8bit"):
        LVLM.from_pretrained(folder, device_map="cpu", quantization="3bit")
    monkeypatch.setattr("davsp.lvlm.loading.find_spec", lambda name: None)
    with pytest.raises(DavspError, match=r"needs bitsandbytes.*davsp\[quantization\]"):
        LVLM.from_pretrained(folder, device_map="cpu", quantization="4bit")


def test_the_attention_that_is_asked_for(
    tiny_folder: Path, lvlm: LVLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eager = LVLM.from_pretrained(tiny_folder, device_map="cpu", attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager" != lvlm.model.config._attn_implementation
    assert eager.generate(None, ["what is this"], 6) == lvlm.generate(None, ["what is this"], 6)
    assert model_facts(eager)["attn_implementation"] == "eager" and "attn_implementation" not in model_facts(lvlm)
    assert fingerprint(eager) != fingerprint(lvlm)
    (tmp_path / "queries.jsonl").write_text('{"id": "a", "question": "what is this", "label": "malicious"}\n')
    asked = ("--queries", tmp_path / "queries.jsonl", "--model", tiny_folder, "--device", "cpu")
    assert run("eval", *asked, "--attn-implementation", "fast", "--out", tmp_path / "out") == 2
    assert "--attn-implementation 'fast' is not known: choose eager, sdpa" in capsys.readouterr().err
    assert run("train", "--attn-implementation", "eager") == 2
    assert "are for other models; those that ship" in capsys.readouterr().err
