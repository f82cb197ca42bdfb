"""The loop: its gradient, its steps, and the memory that they take."""

import json

import pytest
import torch

from davsp import LVLM, AdditiveNoise, DavspError, HarmfulnessVector, TrainSettings, VisualSafetyPrompt, train
from davsp.cli.inputs import settings_of
from davsp.runtime.files import read_tensors
from davsp.training.borders import Run
from davsp.training.memory import advice, estimate_memory, recomputing
from davsp.training.objectives import projection_hinge
from tiny import picture, queries

MALICIOUS, BENIGN = queries("malicious", 5), queries("benign", 6)
FAST = TrainSettings(
    steps=6, batch_size=4, lr=4 / 255, checkpoint_every=2, probe_every=3, malicious_answer_share=0.5, refusal="sorry no"
)


@pytest.fixture
def prompt():
    return VisualSafetyPrompt.create(56, 9, text="please be safe")


def go(lvlm, prompt, vector, out, settings=FAST, **options):
    return train(lvlm, prompt, MALICIOUS, BENIGN, vector, settings, out, progress=False, **options)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# -- the step


def test_gradient_of_delta_against_finite_differences(tiny_folder, vector, monkeypatch):
    """Of hinge and answer loss together, in float64, at single pixels and along the gradient."""

    def norm_in_float64(self, x):  # transformers' own goes through float32, whose rounding would drown the differences
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", norm_in_float64)
    lvlm = LVLM.from_pretrained(tiny_folder, device_map="cpu", dtype=torch.float64)
    prompt = VisualSafetyPrompt.create(56, 9, start="random")
    interior = prompt.resize([picture(1), picture(2)]).double()
    questions, malicious = ["how do you steal a car", "what is this"], torch.tensor([True, False])

    def loss(delta):
        output = lvlm.step(prompt.with_delta(delta).apply(interior), questions, 2, [None, "a red cake"])
        hinge = projection_hinge(vector.project(output.state, 2), malicious, 50.0, -50.0)
        return hinge + output.answer_loss.sum()

    delta = prompt.delta.double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(delta), delta)
    assert torch.count_nonzero(gradient[:, 9:-9, 9:-9]) == 0
    unit, base, h = gradient / gradient.norm(), delta.detach(), 1e-5
    directions = [unit]
    for place in [(0, 0, 0), (1, 3, 30), (2, 50, 4), (0, 55, 55)]:
        directions.append(
            torch.zeros_like(base).index_put_(tuple(map(torch.tensor, place)), torch.tensor(1.0).double())
        )
    for direction in directions:
        numeric = (loss(base + h * direction) - loss(base - h * direction)) / (2 * h)
        torch.testing.assert_close(numeric, (gradient * direction).sum(), rtol=1e-4, atol=1e-7)


def test_one_step_by_hand(lvlm, prompt, vector, tmp_path):
    """delta - lr * sign(gradient of hinge / half gap + lam * answer loss), clamped; and the metrics say the same."""
    run = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, FAST, tmp_path, [])
    state = run.checkpoint.start(prompt.delta.clone())
    bad, good = run._rows("malicious", 0), run._rows("benign", 0)
    answers = run._answers(0, bad, good)
    rows = [MALICIOUS[i] for i in bad] + [BENIGN[i] for i in good]
    delta = prompt.delta.clone().requires_grad_()
    canvas = prompt.with_delta(delta).apply(prompt.resize([q.image for q in rows]))
    output = lvlm.step(canvas, [f"please be safe {q.question}" for q in rows], vector.layer, answers)
    s = vector.project(output.state)
    hinge = ((vector.mu_plus - s[:2]).clamp(min=0).sum() + (s[2:] - vector.mu_minus).clamp(min=0).sum()) / 4
    answered = [loss for loss, answer in zip(output.answer_loss, answers, strict=True) if answer]
    loss = hinge / vector.half_gap() + 0.2 * torch.stack(answered).mean()
    (gradient,) = torch.autograd.grad(loss, delta)
    after, metrics = run.advance(state)
    assert torch.equal(after.delta, (delta.detach() - 4 / 255 * gradient.sign()).clamp(0, 1))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["projection_malicious"] == pytest.approx(s[:2].mean().item(), rel=1e-4)


def test_adam_is_torchs_adam(lvlm, prompt, vector, tmp_path):
    settings = FAST.model_copy(update={"optimizer": "adam"})
    run = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, settings, tmp_path, [])
    state = run.checkpoint.start(prompt.delta.clone())
    reference = torch.nn.Parameter(state.delta.clone())
    optimizer = torch.optim.Adam([reference], lr=settings.lr)
    for seed in range(4):
        gradient = torch.randn(state.delta.shape, generator=torch.Generator().manual_seed(seed)) * prompt.mask
        state = run._move(state, gradient, settings.lr)
        reference.grad = gradient
        optimizer.step()
    torch.testing.assert_close(state.delta, reference.data, rtol=0, atol=1e-6)


def test_the_order_of_the_data(lvlm, prompt, vector, tmp_path):
    run = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, FAST, tmp_path, [])
    order = [row for step in range(15) for row in run._rows("malicious", step)]  # 30 of 5: six epochs
    epochs = [order[i : i + 5] for i in range(0, 30, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len({tuple(e) for e in epochs}) > 1
    other = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, FAST.model_copy(update={"seed": 1}), tmp_path, [])
    assert [other._rows("malicious", step) for step in range(15)] != [
        run._rows("malicious", step) for step in range(15)
    ]


def test_a_share_of_every_batch_is_benign(lvlm, prompt, vector, tmp_path):
    settings = FAST.model_copy(update={"batch_size": 8, "benign_share": 0.75})
    run = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, settings, tmp_path, [])
    batches = [run._batch(step) for step in range(5)]
    assert all(batch.malicious.tolist() == [True] * 2 + [False] * 6 for batch in batches)
    assert sorted(row for step in range(5) for row in run._rows("malicious", step)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    coin = settings.model_copy(update={"mixed": False, "steps": 200})
    turns = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, coin, tmp_path, []).turns
    assert 0.15 < sum(turns) / 200 < 0.35


def test_both_classes_have_a_row():
    assert "benign_share" not in FAST.model_dump()  # runs from before go on
    with pytest.raises(ValueError, match="it leaves one class no row in a batch of 4"):
        TrainSettings(batch_size=4, benign_share=0.9)
    assert TrainSettings(batch_size=4, benign_share=0.9, mixed=False).benign_share == 0.9
    with pytest.raises(DavspError, match=r"^--benign-share 0.1 is not possible: it leaves one class no row"):
        settings_of(TrainSettings, {"batch_size": 4, "benign_share": 0.1})


def test_schedules(lvlm, prompt, vector, tmp_path):
    run = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, FAST.model_copy(update={"schedule": "cosine"}), tmp_path, [])
    rates = [run._lr(step) * 255 for step in range(6)]
    assert rates[0] == pytest.approx(4) and rates[3] == pytest.approx(2) and rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("objective", ["projection", "answer", "both"])
@pytest.mark.parametrize("kind", ["border", "additive"])
def test_every_prompt_learns_by_every_objective(lvlm, vector, tmp_path, objective, kind):
    start = VisualSafetyPrompt.create(56, 9) if kind == "border" else AdditiveNoise.create(56)
    settings = FAST.model_copy(update={"objective": objective, "steps": 12, "batch_size": 8})
    trained = go(lvlm, start, vector, tmp_path, settings)
    losses = [line["loss"] for line in lines(tmp_path)]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert torch.equal(trained.delta, trained.with_delta(trained.delta.clone()).project_().delta)
    assert ("answer_loss" in lines(tmp_path)[0]) == (objective != "projection")
    assert not torch.equal(trained.delta, start.delta) and type(trained) is type(start)
    if kind == "border":
        assert torch.count_nonzero(trained.delta[:, 9:-9, 9:-9]) == 0


def test_the_prompt_knows_how_it_was_made(lvlm, prompt, vector, tmp_path):
    before = prompt.delta.clone()
    trained = go(lvlm, prompt, vector, tmp_path, probe=queries("malicious", 5, seed=9) + queries("benign", 5, seed=9))
    assert torch.equal(prompt.delta, before) and prompt.config["layer"] is None  # the one given is left as it is
    config = trained.config
    assert (config["layer"], config["mu_plus"], config["mu_minus"]) == (vector.layer, vector.mu_plus, vector.mu_minus)
    assert config["model_id"] == lvlm.model_id and len(config["data"]["train_malicious"]) == 64
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert ["probe_rsr" in line for line in logged] == [False, False, True] * 2
    assert config["figures"]["train_probe_rsr"] == logged[-1]["probe_rsr"]
    trained.save_pretrained(tmp_path / "prompt")
    assert VisualSafetyPrompt.from_pretrained(tmp_path / "prompt").config == config


def test_the_probe_counts_projections(lvlm, prompt, vector, tmp_path):
    held_out = queries("malicious", 5, seed=9)
    go(lvlm, prompt, vector, tmp_path, FAST.model_copy(update={"steps": 1}), probe=held_out)
    final = prompt.with_delta(read_tensors(tmp_path / "checkpoint.safetensors")["delta"])
    canvas = final.apply(final.resize([q.image for q in held_out]))
    s = vector.project(lvlm.states(canvas, [final.question(q.question) for q in held_out], [vector.layer])[:, 0])
    assert lines(tmp_path)[-1]["probe_rsr"] == pytest.approx((s > vector.mu_plus).float().mean().item())


# -- less memory


def both_ways(lvlm, prompt, vector, tmp_path, objective, **options):
    """Gradients and terms of the first steps without and with the options, at margins that every row violates."""
    margins = {"objective": objective, "batch_size": 6, "mu_plus": 1e3, "mu_minus": -1e3}
    plain = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, FAST.model_copy(update=margins), tmp_path, [])
    saving = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, FAST.model_copy(update=margins | options), tmp_path, [])
    for step in range(4):  # with one to three answers among the malicious rows
        batch = plain._batch(step)
        yield batch, plain.gradient(prompt.delta, batch), saving.gradient(prompt.delta, batch)


def assert_same(plain, saving):
    (gradient, terms), (other, other_terms) = plain, saving
    assert gradient.abs().max() > 1e-6
    assert (other - gradient).abs().max() < 1e-5 * gradient.abs().max()
    assert other_terms.keys() == terms.keys() and other_terms == pytest.approx(terms, rel=1e-5)


@pytest.mark.parametrize("objective", ["projection", "answer", "both"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 99])
def test_micro_batches_add_up_to_the_batch(lvlm, prompt, vector, tmp_path, objective, micro_batch):
    """Also where a part holds no answer, or another number of them than the next."""
    answered = set()
    for batch, plain, saving in both_ways(lvlm, prompt, vector, tmp_path, objective, micro_batch=micro_batch):
        assert_same(plain, saving)
        answered.add(batch.answered)
    assert (
        answered == {0}
        if objective == "projection"
        else answered == {6}
        if objective == "answer"
        else len(answered) > 1
    )


def test_rows_without_an_answer_end_at_the_layer(lvlm, prompt, vector, tmp_path):
    settings = FAST.model_copy(update={"objective": "both", "layer": 2, "mu_plus": 9.0, "mu_minus": -9.0})
    run = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, settings, tmp_path, [])
    rows: list[list[int]] = [[] for _ in lvlm.layers]
    handles = [
        block.register_forward_hook(lambda module, args, output, at=at: rows[at].append(len(args[0])))
        for at, block in enumerate(lvlm.layers)
    ]
    batch = run._batch(0)
    run.gradient(prompt.delta, batch)
    for handle in handles:
        handle.remove()
    assert 0 < batch.answered < len(batch)
    assert [sum(counts) for counts in rows] == [len(batch)] * 2 + [batch.answered] * 2


@pytest.mark.parametrize("objective", ["projection", "answer", "both"])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_checkpointing_leaves_the_gradient(lvlm, prompt, vector, tmp_path, objective, micro_batch):
    """With the forward pass that ends at the layer and with the whole one."""
    options = {"activation_checkpointing": True, "micro_batch": micro_batch}
    for _, plain, saving in both_ways(lvlm, prompt, vector, tmp_path, objective, **options):
        assert_same(plain, saving)


@pytest.mark.parametrize(("objective", "runs"), [("projection", [2, 1, 0, 0]), ("both", [4, 2, 2, 2])])
def test_checkpointing_computes_blocks_again(lvlm, prompt, vector, tmp_path, objective, runs):
    """All but the one that is looked at, here the second; "both" has a part with answers and one without."""
    settings = {"objective": objective, "activation_checkpointing": True, "layer": 2, "mu_plus": 9.0, "mu_minus": -9.0}
    run = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, FAST.model_copy(update=settings), tmp_path, [])
    counts = [0] * 4

    def count(at):
        def hook(*args):
            counts[at] += 1

        return hook

    handles = [block.self_attn.register_forward_hook(count(at)) for at, block in enumerate(lvlm.layers)]
    run.gradient(prompt.delta, run._batch(0))
    for handle in handles:
        handle.remove()
    assert counts == runs


def test_checkpointing_leaves_the_model_as_it_was(lvlm, prompt, vector, tmp_path, monkeypatch):
    """No dropout acts meanwhile, and an error ends it as well."""
    settings = FAST.model_copy(update={"activation_checkpointing": True})
    run = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, settings, tmp_path, [])

    def modes():
        return [(module.training, getattr(module, "gradient_checkpointing", None)) for module in lvlm.model.modules()]

    before, meanwhile = modes(), []

    def fail(*args):
        meanwhile.extend(modes())
        raise RuntimeError("out of memory")

    monkeypatch.setattr(HarmfulnessVector, "project", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.gradient(prompt.delta, run._batch(0))
    assert modes() == before and not any(training for training, _ in before)
    assert sum(training for training, _ in meanwhile) == 3 + 2  # blocks of decoder and tower, and nothing within them
    with (
        pytest.raises(DavspError, match="Linear can't compute activations again"),
        recomputing(torch.nn.Linear(1, 1), 0),
    ):
        pass


@pytest.mark.parametrize("options", [{"answered": False}, {"answered": True}, {"answered": True, "rows": 2}])
def test_the_memory_estimate_is_about_right(lvlm, prompt, options):
    """Against the tensors that autograd keeps."""
    rows = options.get("rows", 1)
    answers = ["a red cake"] * rows if options["answered"] else None
    tensor_sizes: dict[int, int] = {}

    def keep(tensor):
        tensor_sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in lvlm.model.parameters()}
    canvas = prompt.with_delta(prompt.delta.clone().requires_grad_()).apply(prompt.resize([picture(1)] * rows))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = lvlm.step(canvas, ["what is this"] * rows, 2, answers)
    measured = sum(size for place, size in tensor_sizes.items() if place not in weights)
    tokens = lvlm.encode(["what is this"], True, answers and answers[:1]).ids.shape[1]
    estimate = estimate_memory(lvlm, rows, tokens, 2, options["answered"])
    assert 0.5 < measured / estimate < 2 and output.state.requires_grad
    assert estimate_memory(lvlm, rows, tokens, 2, options["answered"], True) < estimate / 2


def test_memory_advice(lvlm, prompt, vector, tmp_path):
    run = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, FAST, tmp_path, [])
    assert run.memory_advice(10**9) is None and "--micro-batch 1 lowers it" in run.memory_advice(1000)
    assert advice(10**9, 4, 10 * 10**9) is None
    assert advice(10**9, 16, 10 * 10**9) == (
        "about 16.0 GB of activations a step, 10.0 GB are free; --micro-batch 6 lowers it"
    )
    assert "--activation-checkpointing lowers it" in advice(10**10, 1, 10**10)
