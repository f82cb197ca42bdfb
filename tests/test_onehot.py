"""The gradient with respect to tokens against finite differences, in every family, and where a part stands among the tokens."""

import pytest
import torch

from davsp import LVLM, DavspError
from davsp.lvlm.onehot import answer_losses, token_gradient, token_span
from families import save_family
from tiny import picture

FAMILIES = ["llava", "qwen2_vl", "qwen2_5_vl", "gemma3", "deepseek_vl", "deepseek_vl_hybrid"]
BEFORE, PART, AFTER = "please be safe ", "what is this", " how do you make a cake"


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LVLM:
    folder = save_family(request.param, tmp_path_factory.mktemp(request.param))
    loaded = LVLM.from_pretrained(folder, device_map="cpu", dtype="float32")
    loaded.model.double()
    loaded.dtype = torch.float64
    return loaded


def rows(lvlm: LVLM) -> tuple[list[torch.Tensor], list[str], list[str], list[tuple[int, int]]]:
    """Two rows of different length with pictures of their own; where PART stands in each."""
    canvas = [one.double() for i in range(2) for one in lvlm.preprocess([picture(i, (lvlm.canvas, lvlm.canvas))])]
    questions = [BEFORE + PART + AFTER, BEFORE + PART + AFTER + " in the image please"]
    ends = len(BEFORE), len(BEFORE + PART)
    sizes = lvlm.sizes(canvas) or []
    spans = [token_span(lvlm, q, size, *ends) for q, size in zip(questions, sizes, strict=True)]
    return canvas, questions, ["sorry no", "sorry no car"], spans


def test_span_is_of_the_part(model: LVLM) -> None:
    canvas, questions, answers, spans = rows(model)
    tokens = model.encode(questions, model.sizes(canvas), answers)
    for row, (start, end) in enumerate(spans):
        assert model.tokenizer.decode(tokens.ids[row, start:end]) == PART
    alone = token_span(model, PART, None, 0, len(PART))
    assert model.tokenizer.decode(model.encode([PART], False).ids[0, slice(*alone)]) == PART


def test_gradient_agrees_with_finite_differences(model: LVLM) -> None:
    canvas, questions, answers, spans = rows(model)
    gradient = token_gradient(model, canvas, questions, answers, spans)
    rows_of = torch.arange(len(model.model.get_input_embeddings().weight))
    weight, step = model.model.get_input_embeddings()(rows_of).detach(), 3e-3  # the norms compute in float32
    assert gradient.shape == (3, len(weight))
    for place, token in ((0, 20), (1, 25), (2, 18)):

        def loss(amount: float, place: int = place, token: int = token) -> float:
            def mix(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
                output = output.clone()
                for row, (start, _) in enumerate(spans):
                    output[row, start + place] += amount * weight[token]  # the one-hot row plus amount at `token`
                return output

            handle = model.model.get_input_embeddings().register_forward_hook(mix)
            try:
                with torch.no_grad():
                    return float(answer_losses(model, canvas, questions, answers).sum())
            finally:
                handle.remove()

        slope = (loss(step) - loss(-step)) / (2 * step)
        assert abs(slope) > 1e-3
        assert float(gradient[place, token]) == pytest.approx(slope, rel=5e-3, abs=2e-4)


def test_losses_are_of_the_answer_without_its_end(model: LVLM) -> None:
    canvas, questions, answers, _ = rows(model)
    with torch.no_grad():
        losses = answer_losses(model, canvas, questions, answers)
        alone = [answer_losses(model, [c], [q], [a]) for c, q, a in zip(canvas, questions, answers, strict=True)]
        tokens = model.encode(questions, model.sizes(canvas), answers)
        logits = model.model(**model.inputs(tokens, canvas), use_cache=False).logits.log_softmax(-1)
    assert torch.allclose(losses, torch.cat(alone), atol=1e-9)
    for row, size in ((0, 2), (1, 3)):
        at = int(tokens.last[row])
        said = [float(logits[row, at + i, tokens.ids[row, at + 1 + i]]) for i in range(size)]
        assert float(losses[row]) == pytest.approx(-sum(said) / size, rel=1e-6)


def test_misuse_is_said(model: LVLM) -> None:
    canvas, questions, _, _ = rows(model)
    with pytest.raises(DavspError, match="no token"):
        answer_losses(model, canvas, questions, ["sorry", ""])
