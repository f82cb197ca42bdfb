"""An attacker inside training: what he may change, what he raises, and that nothing else moves."""

import sys
from copy import copy
from dataclasses import replace

import pytest
import torch

from davsp import AdditiveNoise, DavspError, TrainSettings, VisualSafetyPrompt, cli, train
from davsp.cli.train import _deeds
from davsp.lvlm.onehot import answer_losses
from davsp.training.adversary import worst
from davsp.training.batches import pixels
from davsp.training.borders import Run
from test_training import BENIGN, FAST, MALICIOUS, go

ATTACKED = FAST.model_copy(update={"adversarial": 8, "adversarial_steps": 4})


@pytest.fixture
def prompt():
    return VisualSafetyPrompt.create(56, 9, "random", text="please be safe")


def a_run(lvlm, prompt, vector, out, **changes):
    return Run(lvlm, prompt, MALICIOUS, BENIGN, vector, ATTACKED.model_copy(update=changes), out, [])


# -- the search ----------------------------------------------------------------------------------------------------------


def test_pictures_stay_in_the_box_and_end_at_levels():
    levels = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    clean, where = levels.float() / 255, torch.zeros(1, 8, 8)
    where[:, 2:-2, 2:-2] = 1
    weights = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5

    def losses(x):
        return (weights * x).flatten(1).sum(1)

    found = worst(losses, clean, where, 4 / 255, 3, ["a", "b"])
    after = found * 255
    assert torch.allclose(after, after.round(), atol=1e-4) and 0 <= found.min() and found.max() <= 1
    moved = after.round().int() - levels
    assert int(moved.abs().max()) == 4 and not moved[..., :2].any() and not moved[..., :2, :].any()
    best = (levels + (4 * weights.sign() * where)).clamp(0, 255)  # a plane is highest in a corner of the box
    assert torch.equal(after.round(), best)


def test_starts_hang_on_their_keys_alone():
    clean, where = torch.full((2, 3, 4, 4), 128 / 255), torch.ones(1, 4, 4)

    def found(*keys):
        return worst(lambda x: 0 * x.flatten(1).sum(1), clean[: len(keys)], where, 8 / 255, 1, keys)

    both = found("a", "b")
    assert not torch.equal(both[0], both[1]) and torch.equal(both[1:], found("b"))
    assert not torch.equal(both[0], clean[0])


# -- in a step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["border", "additive"])
@pytest.mark.parametrize("target", ["", "a car"])
def test_malicious_pictures_are_changed_against_the_prompt_and_benign_ones_are_not(
    lvlm, prompt, vector, tmp_path, monkeypatch, kind, target
):
    start = prompt if kind == "border" else AdditiveNoise.create(56, 32 / 255, text="please be safe")
    run = a_run(lvlm, start, vector, tmp_path, adversarial_target=target)
    batch, delta = run._batch(0), start.delta
    clean, found = pixels(batch.interiors, delta.device), run._interiors(delta, batch)
    moved = (found - clean) * 255
    assert torch.equal(found[~batch.malicious], clean[~batch.malicious])
    assert all(8.1 > one.abs().max() > 4 for one in moved[batch.malicious])
    outside = slice(0, 9)  # below a border nothing is changed, for nothing of it is seen
    assert bool(moved[..., outside].any()) == (kind == "additive")
    rows, attacked = batch.attacked()
    with monkeypatch.context() as patched:
        patched.setattr(run, "_resistance", lambda _, x, __: 0 * x.flatten(1).sum(1))
        drawn = run._interiors(delta, batch)  # the start alone
    before, at_start, after = (run._resistance(delta, x[rows], attacked) for x in (clean, drawn, found))
    assert after.mean() > max(before.mean(), at_start.mean())  # so few steps need not raise it for every picture
    if target:
        canvas = start.apply(found[rows])
        losses = answer_losses(lvlm, canvas, attacked.questions, [target] * len(rows))
        assert torch.allclose(after, -losses, atol=1e-5)


def test_each_row_has_its_own_deed(lvlm, prompt, vector, tmp_path):
    """The attacker makes the answer of the row's own query likely, in whatever order the rows come."""
    deeds = ["a car", "a red cake", "the car", "red", "a"]
    settings = ATTACKED.model_copy(update={"adversarial": 2, "adversarial_target": "deed"})
    run = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, settings, tmp_path, [], deeds)
    batch = run._batch(1)
    whose = dict(zip((prompt.resize([query.picture()]) * 255 for query in MALICIOUS), deeds, strict=True))
    bad = [[deed for x, deed in whose.items() if torch.equal(x[0].round(), row.float())] for row in batch.interiors]
    assert [[] if goal is None else [goal] for goal in batch.goals] == bad and any(bad)
    rows, attacked = batch.attacked()
    clean, found = pixels(batch.interiors, prompt.delta.device), run._interiors(prompt.delta, batch)
    own = [answer_losses(lvlm, prompt.apply(x[rows]), attacked.questions, attacked.goals) for x in (clean, found)]
    assert bool((own[1] < own[0]).all())
    assert (
        run.checkpoint.identity
        != Run(lvlm, prompt, MALICIOUS, BENIGN, vector, settings, tmp_path, [], deeds[::-1]).checkpoint.identity
    )
    with pytest.raises(DavspError, match="needs the deed of each of the 5 malicious queries, not 0"):
        go(lvlm, prompt, vector, tmp_path / "out", settings)


def test_the_change_is_a_constant_in_the_gradient(lvlm, prompt, vector, tmp_path):
    """The gradient of delta is that of a batch whose pictures are the attacker's."""
    run = a_run(lvlm, prompt, vector, tmp_path, mu_plus=1e3, mu_minus=-1e3)
    batch = run._batch(0)
    levels = (run._interiors(prompt.delta, batch) * 255).round().to(torch.uint8)
    by_hand = run.gradient(prompt.delta, type(batch)(levels, batch.questions, batch.malicious, batch.answers))
    gradient, terms = run.gradient(prompt.delta, batch)
    assert torch.allclose(gradient, by_hand[0], atol=1e-6 * float(gradient.abs().max()))
    assert terms == pytest.approx(by_hand[1])


@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"micro_batch": 3}, {"activation_checkpointing": True}])
def test_micro_batches_meet_the_same_attacker(lvlm, prompt, vector, tmp_path, options):
    """But for rounding, which may turn a step of a pixel whose gradient is next to nothing."""
    changes = {"batch_size": 6, "mu_plus": 1e3, "mu_minus": -1e3}
    plain = a_run(lvlm, prompt, vector, tmp_path, **changes)
    saving = a_run(lvlm, prompt, vector, tmp_path, **changes, **options)
    batch = plain._batch(0)
    whole = plain._interiors(prompt.delta, batch)
    parts = torch.cat([saving._interiors(prompt.delta, batch._of([i])) for i in range(len(batch))])
    assert ((whole - parts).abs() > 0.5 / 255).float().mean() < 1e-3
    one, two = plain.gradient(prompt.delta, batch)[0], saving.gradient(prompt.delta, batch)[0]
    assert float((one - two).abs().max()) < 0.02 * float(one.abs().max())


def test_processes_share_rows_with_their_starts(lvlm, prompt, vector, tmp_path):
    batch = a_run(lvlm, prompt, vector, tmp_path)._batch(2)
    shares = [batch.share(i, 2) for i in range(2)]
    assert [key for pair in zip(*(one.starts for one in shares), strict=True) for key in pair] == list(batch.starts)
    assert [key is not None for key in batch.starts] == batch.malicious.tolist() and len(set(batch.starts)) > 2


# -- before a run ---------------------------------------------------------------------------------------------------------


def test_what_the_attacker_wants_has_room_before_the_first_step(lvlm, prompt, vector, tmp_path):
    """His answers are as long as a query's context makes them, and stand behind the question while he searches."""
    short = copy(lvlm)
    short.positions, _ = a_run(lvlm, prompt, vector, tmp_path / "usual").longest()
    deeds = ["a car", "a car", "a car " * short.positions, "a", "red"]
    settings = ATTACKED.model_copy(update={"adversarial_target": "deed"})
    says = rf"query {MALICIOUS[2].id} cannot be trained on: .* the answer that its attacker wants \(--adversarial-target\) \d+,"
    with pytest.raises(DavspError, match=says) as refused:
        go(short, prompt, vector, tmp_path / "out", settings, deeds=deeds)
    assert "max_new_tokens" not in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "whose"),
    [
        ({"refusal": "a car " * 300}, r"query \S+ cannot .* the refusal \(--refusal\) 6"),
        ({"adversarial": 0, "refusal": "a " * 600, "objective": "answer"}, r"the refusal \(--refusal\) 6"),
    ],
)
def test_a_refusal_without_room_is_named_by_its_option(lvlm, prompt, vector, tmp_path, changes, whose):
    short = copy(lvlm)
    short.positions = 600
    with pytest.raises(DavspError, match=whose):
        go(short, prompt, vector, tmp_path / "out", ATTACKED.model_copy(update=changes))


def test_a_held_out_question_without_room_is_told_before_the_first_step(lvlm, prompt, vector, tmp_path):
    """They are looked at for the first time after 25 steps."""
    short = copy(lvlm)
    short.positions, _ = a_run(lvlm, prompt, vector, tmp_path / "usual").longest()
    probe = [replace(MALICIOUS[0], id="held", question="what is this cake " * short.positions)]
    with pytest.raises(DavspError, match="query held cannot be trained on: its question takes"):
        go(short, prompt, vector, tmp_path / "out", FAST, probe=probe)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("a car " * 300, r"^query odd cannot be trained on: .*, and its reference answer 601, but"),
        (" ", "^query odd: its reference answer holds no token of"),
    ],
)
def test_a_reference_that_cannot_be_trained_on_is_named_before_the_first_step(
    lvlm, prompt, vector, tmp_path, answer, says
):
    short = copy(lvlm)
    short.positions = 600
    odd = [*BENIGN[1:], replace(BENIGN[0], id="odd", reference=answer)]
    with pytest.raises(DavspError, match=says):
        train(short, prompt, MALICIOUS, odd, vector, FAST, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_attacker_s_words_are_named_by_their_option(lvlm, prompt, vector, tmp_path):
    with pytest.raises(DavspError, match=r"^--adversarial-target 'xyzzy' holds words"):
        go(lvlm, prompt, vector, tmp_path / "out", ATTACKED.model_copy(update={"adversarial_target": "xyzzy"}))
    assert not (tmp_path / "out").exists()
    settings = ATTACKED.model_copy(update={"adversarial_target": "deed"})
    with pytest.raises(DavspError, match=f"^--adversarial-target deed: what query {MALICIOUS[1].id} asks for, 'xyzzy'"):
        Run(lvlm, prompt, MALICIOUS, BENIGN, vector, settings, tmp_path, [], ["a", "xyzzy", "a", "a", "a"])
    with pytest.raises(DavspError, match=f"what query {MALICIOUS[1].id} asks for, ' ' holds no token of"):
        Run(lvlm, prompt, MALICIOUS, BENIGN, vector, settings, tmp_path, [], ["a", " ", "a", "a", "a"])
    with pytest.raises(ValueError, match="it is blank"):
        TrainSettings(adversarial=2, adversarial_target=" ")


# -- a run ---------------------------------------------------------------------------------------------------------------


def test_without_an_attacker_nothing_is_as_if_he_had_been_there(lvlm, prompt, vector, tmp_path):
    run = Run(lvlm, prompt, MALICIOUS, BENIGN, vector, FAST, tmp_path / "run", [])
    assert run._batch(0).starts == [] and run._batch(0).attacked()[0] == []
    assert not [name for name in FAST.model_dump() if name.startswith("adversarial")]  # runs from before go on
    more = FAST.model_copy(update={"adversarial_steps": 9})
    assert more.model_dump() == FAST.model_dump()
    assert ATTACKED.model_dump() == FAST.model_dump() | {
        "adversarial": 8, "adversarial_steps": 4, "adversarial_target": "",
    }  # fmt: skip
    plain = go(lvlm, prompt, vector, tmp_path / "plain", FAST)
    attacked = go(lvlm, prompt, vector, tmp_path / "attacked", ATTACKED)
    assert not torch.equal(plain.delta, attacked.delta)


@pytest.mark.parametrize("wrong", [{"adversarial": -1}, {"adversarial": 256}, {"adversarial_steps": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="should be"):
        TrainSettings(**wrong)


def test_a_deed_is_what_the_query_says():
    asked = replace(MALICIOUS[0], group="steal the car"), replace(MALICIOUS[1], group="", context="how to rob a house")
    first, second = _deeds(list(asked), False)
    assert first == "sure , here are the steps : first get the car . then steal the car . done ."
    assert second == "Sure, here is: how to rob a house"
    with pytest.raises(DavspError, match=r"query \S+ does not say in words what it asks for; give it a context"):
        _deeds([replace(MALICIOUS[1], group="", context="")], False)


def test_options_of_an_attacker_need_one(tmp_path, monkeypatch, capsys):
    for option in (["--adversarial-steps", "5"], ["--adversarial-target", "sure"]):
        monkeypatch.setattr(sys, "argv", ["davsp", "train", "--out", str(tmp_path / "out"), *option])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2 and "give --adversarial, too" in " ".join(capsys.readouterr().err.split())
