"""The vector against two lines of numpy; layer choice; margins; the disk."""

from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from davsp import DavspError, HarmfulnessVector
from davsp.vector import auroc, collect_states
from tiny import queries


def test_vector_against_numpy(lvlm, vector):
    bad, good = (
        collect_states(lvlm, queries(c, 8), [1, 2, 3], progress=False).numpy() for c in ("malicious", "benign")
    )
    for layer in (1, 2, 3):
        difference = bad[:, layer - 1].mean(0) - good[:, layer - 1].mean(0)
        expected = difference / np.linalg.norm(difference)
        np.testing.assert_allclose(vector.direction(layer), expected, atol=1e-6)
        np.testing.assert_allclose(vector.malicious[:, layer - 1], bad[:, layer - 1] @ expected, atol=1e-4)
        half = np.linalg.norm(difference) / 2
        assert vector.half_gap(layer) == pytest.approx(half, rel=1e-4)
    states = torch.randn(5, 32)
    np.testing.assert_allclose(vector.project(states, 2), states @ vector.direction(2), atol=1e-5)


def test_margins_are_the_documented_quantiles(vector):
    for layer in (1, 3):
        plus, minus = vector.margins(layer)
        assert plus == pytest.approx(np.median(vector.malicious[:, layer - 1]), rel=1e-5)
        assert minus == pytest.approx(np.quantile(vector.benign[:, layer - 1], 0.75), rel=1e-5)
        assert vector.margins(layer, (0.3, 0.25))[0] == pytest.approx(
            np.quantile(vector.malicious[:, layer - 1], 0.3), rel=1e-5
        )
    assert (vector.mu_plus, vector.mu_minus) == vector.margins()
    assert vector.mu_plus > vector.mu_minus


def test_auroc_by_hand():
    """Pairs: 3>1, 3>2, 2>1, and 2=2 counts half: 3.5 of 4."""
    assert auroc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0])) == 0.875


def test_batches_do_not_matter_and_order_is_kept(lvlm):
    mixed = [replace(q, image=None) if i % 3 == 0 else q for i, q in enumerate(queries("benign", 7))]
    together = collect_states(lvlm, mixed, [2], batch_size=5, progress=False)
    apart = torch.cat([collect_states(lvlm, [q], [2], progress=False) for q in mixed])
    torch.testing.assert_close(together, apart, rtol=0, atol=5e-5)


def test_the_safety_text_stands_before_the_question(lvlm):
    plain, asked = (
        queries("benign", 2),
        [replace(q, question="please be safe " + q.question) for q in queries("benign", 2)],
    )
    with_text = collect_states(lvlm, plain, [2], text="please be safe", progress=False)
    assert torch.equal(with_text, collect_states(lvlm, asked, [2], progress=False))


@pytest.mark.parametrize(
    ("areas", "chosen"),
    [
        ((0.90, 0.985, 0.99), 2),
        ((0.99, 0.60, 0.985), 1),
        ((0.99, 0.60, 0.99), 1),
        ((0.5, 0.6, 0.99), 3),
        ((1.0, 0.98, 1.0), 1),
    ],
)
def test_of_layers_as_good_as_the_best_the_middle_one_is_taken(vector, areas, chosen):
    rows = [{"layer": i + 1, "auroc": a} for i, a in enumerate(areas)]
    ours = replace(vector)
    ours._choose(rows)
    assert ours.layer == chosen and (ours.mu_plus, ours.mu_minus) == ours.margins(chosen)


def test_sweep_compares_the_layers_on_held_out_queries(lvlm, vector):
    ours = replace(vector)
    rows = ours.sweep(lvlm, queries("malicious", 6, seed=5), queries("benign", 6, seed=5), progress=False)
    assert [row["layer"] for row in rows] == [1, 2, 3] and ours.table == rows
    assert rows[ours.layer - 1]["auroc"] >= max(row["auroc"] for row in rows) - 0.01
    assert (ours.mu_plus, ours.mu_minus) == ours.margins(ours.layer)
    states = [collect_states(lvlm, queries(c, 6, seed=5), [2], progress=False)[:, 0] for c in ("malicious", "benign")]
    bad, good = (ours.project(s, 2).numpy() for s in states)
    assert rows[1]["auroc"] == pytest.approx(np.mean([(b > g) + (b == g) / 2 for b in bad for g in good]))
    d_prime = (bad.mean() - good.mean()) / np.sqrt((bad.var() + good.var()) / 2)
    assert rows[1]["gap"] == pytest.approx(d_prime, rel=1e-3)


def test_save_and_load(vector, tmp_path):
    vector.save(tmp_path)
    loaded = HarmfulnessVector.load(tmp_path)
    for name in ("vectors", "malicious", "benign"):
        assert torch.equal(getattr(loaded, name), getattr(vector, name))
    for name in ("layer", "mu_plus", "mu_minus", "auroc", "table", "model_id", "text", "revision"):
        assert getattr(loaded, name) == getattr(vector, name)
    with pytest.raises(DavspError, match=r"cannot read .*vector\.safetensors"):
        HarmfulnessVector.load(tmp_path / "nothing")


def test_check_knows_its_model(lvlm, vector):
    vector.check(lvlm)
    replace(vector, model_id="").check(lvlm)
    replace(vector, model_id=f"/moved/{Path(lvlm.model_id).name}").check(lvlm)
    for other in (
        replace(vector, vectors=vector.vectors[:, :5]),
        HarmfulnessVector(vector.vectors[:2], vector.malicious[:, :2], vector.benign[:, :2]),
        replace(vector, model_id="someone/else"),
    ):
        with pytest.raises(DavspError, match=r"the vector is of another model(:|, or of a server).*; fit one with"):
            other.check(lvlm)
    newer = copy(lvlm)
    newer.revision = "b"
    replace(vector, revision="b").check(newer)
    with pytest.raises(DavspError, match=r"the vector is of revision a of .*, not b; fit one"):
        replace(vector, revision="a").check(newer)


def test_one_class_missing(lvlm):
    with pytest.raises(DavspError, match="no benign queries"):
        HarmfulnessVector.fit(lvlm, queries("malicious", 2), [], progress=False)
    with pytest.raises(DavspError, match="no malicious queries"):
        HarmfulnessVector.fit(lvlm, [], queries("benign", 2), progress=False)
    with pytest.raises(DavspError, match="benign-0 is labelled benign but stands among the malicious"):
        HarmfulnessVector.fit(lvlm, queries("benign", 2), queries("benign", 2), progress=False)


def test_two_classes_that_are_the_same(lvlm):
    same = [replace(q, label="malicious") for q in queries("benign", 3)]
    with pytest.raises(DavspError, match="must differ"):
        HarmfulnessVector.fit(lvlm, same, queries("benign", 3), progress=False)


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_a_layer_out_of_range(vector, layer):
    for call in (vector.direction, vector.margins, vector.half_gap, vector.use_layer):
        with pytest.raises(DavspError, match=f"layer {layer} is out of range: the vector has layers 1 to 3"):
            call(layer)


def test_a_layer_at_which_the_classes_do_not_differ_is_left_out(lvlm, vector, tmp_path, monkeypatch):
    """As blocks of linear attention have them: the state of the last token is the same for every query, but for rounding."""
    real = collect_states

    def forgetful(*args, **kwargs):
        states = real(*args, **kwargs)
        states[:, 1] = 7.0 + 1e-7 * torch.rand(len(states), 1)
        return states

    monkeypatch.setattr("davsp.vector.states.collect_states", forgetful)
    fitted = HarmfulnessVector.fit(lvlm, queries("malicious", 8), queries("benign", 8), progress=False)
    assert fitted.left_out == [2] and vector.left_out == []
    assert torch.equal(fitted.vectors[[0, 2]], vector.vectors[[0, 2]])  # the others are what they were
    assert fitted.layer != 2 and [row["layer"] for row in fitted.by_layer()] == [1, 3] == list(fitted.auroc)
    assert [row["layer"] for row in fitted.sweep(lvlm, queries("malicious", 4), queries("benign", 4))] == [1, 3]
    fitted.save(tmp_path)
    loaded = HarmfulnessVector.load(tmp_path)
    assert loaded.left_out == [2] and loaded.margins(2) == (0, 0) and not loaded.project(torch.ones(3, 32), 2).any()
    for take in (loaded.direction, loaded.use_layer):
        with pytest.raises(DavspError, match=r"no direction at layer 2, .* do not differ; take a layer other than 2"):
            take(2)
    monkeypatch.setattr("davsp.vector.states.collect_states", lambda *args, **kwargs: torch.ones(8, 3, 32))
    with pytest.raises(DavspError, match="the two sets must differ"):
        HarmfulnessVector.fit(lvlm, queries("malicious", 8), queries("benign", 8), progress=False)
