"""`davsp reproduce deep-alignment` on harm that training never met: kinds, forms of picture, wordings."""

import pytest

from davsp import embedded
from davsp.embedded.questions import FOLLOW
from davsp.embedded.words import HARMFUL_VERBS
from davsp.experiments.deep import splits, unseen
from davsp.experiments.deep.borders import BORDERS, NOISE_TITLES, OBJECTIVES, TITLES
from davsp.experiments.gate import kinds
from davsp.experiments.gate.kinds import HARD
from davsp.experiments.gate.run import Once

TRAINED_ON = ("vector_malicious", "vector_benign", "sweep_malicious", "sweep_benign", "train_malicious", "train_benign")
SIZES = {"harm": 2, "utility": 1, "mme": 1, "llava_bench": 1, "vector": 4, "sweep": 2, "train": 8}


def small(mini):
    lvlm = mini.told({})
    lvlm.longest = 6
    return lvlm, embedded.SETTINGS.model_copy(update={"steps": 1, "batch_size": 2})


def test_splits_train_on_what_they_name_and_test_on_all(monkeypatch):
    monkeypatch.setattr(splits, "SIZES", {"harm": 24, "utility": 1})
    monkeypatch.setattr(splits, "protocol", lambda seed, **sizes: embedded.protocol(seed, **SIZES))
    monkeypatch.setattr(kinds, "TRAIN", 12)
    monkeypatch.setattr(kinds, "SWEEP", 6)
    for part in ("kinds-1", "kinds-3"):
        every, *some = splits.splits_of(part)
        assert len(some) == 4 and every == "all"
        data = splits.data_of(part, some[0], 0)
        assert {q.category for q in data.train_malicious} == set(some[0].split("+"))
        assert {q.category for q in data.test if q.label == "malicious"} == set(HARD)
        assert [q.id for q in data.test] == [q.id for q in splits.data_of(part, every, 0).test]
    things = splits.data_of("forms", "sd", 0)
    whole = splits.data_of("forms", "all", 0)
    assert len(things.train_malicious) == len(whole.train_malicious) and things.train_benign == whole.train_benign
    assert all(q.group.split()[0] not in HARMFUL_VERBS for q in things.train_malicious)
    assert not {q.group for q in things.train_malicious} & {q.group for q in whole.test}


def test_blind_to_forms_no_lettering_is_met(monkeypatch):
    monkeypatch.setattr(splits, "protocol", lambda seed, **sizes: embedded.protocol(seed, **SIZES))
    blind = splits.data_of("forms-blind", "sd", 0)
    forms = splits.data_of("forms", "sd", 0)
    assert blind.test == forms.test and blind.train_malicious == forms.train_malicious
    for name in TRAINED_ON:
        queries = getattr(blind, name)
        assert len(queries) == len(getattr(forms, name))
        assert all(
            q.question not in FOLLOW and q.category not in ("ocr", "math") for q in queries if q.image is not None
        )
    assert any(q.category == "ocr" for q in forms.train_benign) and any(
        q.question in FOLLOW for q in forms.vector_malicious
    )


def test_a_split_of_wordings_asks_about_pictures_in_its_own_alone(mini, monkeypatch):
    monkeypatch.setattr(splits, "protocol", lambda seed, **sizes: embedded.protocol(seed, **SIZES))
    whole, how = (splits.data_of("wordings", split, 0) for split in ("all", "how"))
    for name in TRAINED_ON:
        before, after = getattr(whole, name), getattr(how, name)
        assert [(q.id, q.label, q.group) for q in after] == [(q.id, q.label, q.group) for q in before]
        pictured = [(a, b) for a, b in zip(before, after, strict=True) if a.image is not None]
        assert not any(b.question in FOLLOW[1:3] or b.question.endswith(" this thing .") for _, b in pictured)
        assert name != "train_malicious" or any(a.question != b.question for a, b in pictured)
        assert all(a == b for a, b in zip(before, after, strict=True) if a.image is None)
    malicious = [q for q in how.test if q.label == "malicious"]
    assert how.test == whole.test and len({q.id for q in malicious}) == len(malicious) == 3 * 4 * SIZES["harm"]
    places = [splits.place("wordings", "how", q) for q in malicious]
    assert all(places.count(one) == 4 * SIZES["harm"] for one in ("met", "unseen", "new"))
    unknown = mini.tokenizer.unk_token_id
    assert not any(unknown in mini.tokenizer(q.question)["input_ids"] for q in malicious)


def test_unseen_forms_are_apart_from_the_one_that_was_met(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "protocol", lambda seed, **sizes: embedded.protocol(seed, **SIZES))
    lvlm, settings = small(mini)
    out = tmp_path / "forms"
    rows = unseen.unseen(lvlm, out, "forms", text=embedded.SAFETY_TEXT, settings=settings)
    at = {(r["defense"], r["benchmark"], r["split"], r["metric"]): r for r in rows}
    for name in (*TITLES, *NOISE_TITLES):
        assert at[name, "unseen", "total", "rsr"]["n"] == 2 * 3 and at[name, "met", "sd", "rsr"]["n"] == 2
        assert at[name, "utility", "total", "accuracy"]["n"] > 0
    assert at["both against answer", "unseen", "total", "rsr_difference"]["n"] == 6
    assert at["additive-both against additive-answer", "unseen", "total", "rsr_difference"]["n"] == 6
    assert at["answer against answer, all", "unseen", "total", "rsr_difference"]["n"] == 6
    text = (out / "unseen.md").read_text()
    assert text.count("less answers alone") == 5 and "RSR, figstep" in text
    noises = {
        (out / "seed-0" / "sd" / "prompts" / f"additive-{one}" / "noise.safetensors").read_bytes() for one in OBJECTIVES
    }
    assert len(noises) == 3 and (out / "seed-0" / "sd" / "prompts" / "answer" / "vsp.png").exists()


@pytest.fixture
def untrained(monkeypatch, mini):
    """Small tests and no training: borders are white ones. Gives the folders that they would have been made in."""
    monkeypatch.setattr(splits, "protocol", lambda seed, **_: embedded.protocol(seed, **(SIZES | {"harm": 1})))
    lvlm, settings = small(mini)
    white, folders = Once(unseen.unmoved(lvlm, embedded.SAFETY_TEXT)["text"]), []

    def borders(stages, *_):
        folders.append(stages.out)
        return dict.fromkeys(BORDERS, white)

    monkeypatch.setattr(unseen, "borders", borders)
    return lvlm, settings, folders


def test_blind_to_forms_goes_without_what_met_everything(untrained, tmp_path):
    lvlm, settings, folders = untrained
    out = tmp_path / "forms-blind"
    rows = unseen.unseen(lvlm, out, "forms-blind", text=embedded.SAFETY_TEXT, settings=settings)
    assert folders == [out / "seed-0" / "sd"]
    at = {(r["defense"], r["benchmark"], r["split"], r["metric"]): r for r in rows}
    assert all(
        at[name, "unseen", "total", "rsr"]["n"] == 3 and at[name, "met", "total", "rsr"]["n"] == 1 for name in TITLES
    )
    text = (out / "unseen.md").read_text()
    assert text.count("less answers alone") == 3 and "met all" not in text and "noise" not in text


def test_wordings_share_what_met_everything_with_forms(untrained, tmp_path):
    lvlm, settings, folders = untrained
    out = tmp_path / "wordings"
    rows = unseen.unseen(lvlm, out, "wordings", text=embedded.SAFETY_TEXT, settings=settings)
    assert folders == [tmp_path / "forms" / "seed-0" / "all", out / "seed-0" / "how", out / "seed-0" / "steps"]
    at = {(r["defense"], r["benchmark"], r["split"], r["metric"]): r for r in rows}
    for name in TITLES:  # of both splits
        assert all(at[name, one, "total", "rsr"]["n"] == 2 * 4 for one in ("met", "unseen", "new"))
    # what one split met the other did not, so undefended rates of the two are the same
    assert at["none", "met", "total", "rsr"]["value"] == at["none", "unseen", "total", "rsr"]["value"]
    text = (out / "unseen.md").read_text()
    assert text.count("less answers alone") == 3 and text.count("RSR, new to the model") == 2
