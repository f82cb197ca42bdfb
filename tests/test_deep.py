"""`davsp reproduce deep-alignment`: three objectives under answers that are made to begin."""

import json

import pytest

from davsp import embedded
from davsp.experiments import deep
from davsp.experiments.deep import PLAIN, TITLES, beginnings

SIZES = {"harm": 2, "utility": 1, "mme": 1, "llava_bench": 1, "vector": 4, "sweep": 2, "train": 8}


def test_beginnings_grow_from_nothing_to_the_whole_text():
    assert beginnings("sure , here are") == {
        PLAIN: "",
        "begun 1": "sure",
        "begun 3": "sure , here",
        "begun 4": "sure , here are",
    }
    assert list(beginnings("yes")) == [PLAIN, "begun 1"]


@pytest.fixture(scope="module")
def made(mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("deep")
    lvlm = mini.told({})
    lvlm.longest = 6
    settings = embedded.SETTINGS.model_copy(update={"steps": 1, "batch_size": 2})
    for seed in (0, 1):
        rows = deep.deep(
            lvlm, embedded.protocol(seed, **SIZES), out, text=embedded.SAFETY_TEXT, beginning="sure , here are", settings=settings,
            seed=seed,
        )  # fmt: skip
    return out, rows


def test_two_seeds_are_pooled_and_every_cell_is_there(made):
    out, rows = made
    written = json.loads((out / "metrics.json").read_text())["rows"]
    assert written == rows
    at = {(r["defense"], r["benchmark"], r["metric"]): r for r in rows if r["split"] == "total"}
    pictured = 2 * 2 * 4  # seeds, queries a form, forms with a picture
    for name in TITLES:
        for benchmark in beginnings("sure , here are"):
            assert at[name, benchmark, "rsr"]["n"] == pictured
        assert at[name, "utility", "accuracy"]["n"] == at["none", "utility", "accuracy"]["n"] > 0
    assert at["both against answer", "begun 4", "rsr_difference"]["n"] == pictured
    assert json.loads((out / "manifest.json").read_text())["seeds"] == [0, 1]


def test_objectives_give_other_borders_and_answers_begin_as_told(made):
    out, _ = made
    pixels = {one: (out / "seed-0" / "prompts" / one / "vsp.png").read_bytes() for one in deep.OBJECTIVES}
    assert len(set(pixels.values())) == 3
    lines = (out / "seed-0" / "begun-3" / "responses.jsonl").read_text().splitlines()
    assert len(lines) == 5 * 8 and all(json.loads(line)["text"].startswith("sure , here") for line in lines)


def test_the_table_has_a_line_a_border_and_what_the_projection_adds(made):
    text = (made[0] / "deep-alignment.md").read_text()
    assert all(title in text for title in TITLES.values())
    assert text.count("less answers alone") == 2 and "seeds 0, 1" in text
