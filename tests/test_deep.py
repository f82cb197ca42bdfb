"""`davsp reproduce deep-alignment`: begun answers, depth, and later turns, under borders of each objective."""

import json

import pytest

from davsp import HarmfulnessVector, embedded, metrics
from davsp.defenses import NoDefense
from davsp.evaluation import Evaluation
from davsp.experiments.deep import begun as deep
from davsp.experiments.deep import depth, turns
from davsp.experiments.deep.begun import PLAIN, beginnings
from davsp.experiments.deep.borders import BORDERS, TITLES, kept, unscored
from davsp.experiments.seeds import keep
from davsp.metrics import Outcome
from davsp.query import Query, Response, Verdict

SIZES = {"harm": 2, "utility": 1, "mme": 1, "llava_bench": 1, "vector": 4, "sweep": 2, "train": 8}


def test_seeds_are_pooled_over_the_borders_that_all_of_them_have(tmp_path):
    """A folder may hold a seed of an earlier version, which had a border less."""
    one = Outcome("q", "4 turns", "total", "rsr", "g", 1.0)
    for seed, names in ((0, ("none", "answer")), (1, ("none", "answer", "every"))):
        keep(tmp_path / f"seed-{seed}", {"seed": seed}, {name: [one] for name in names})
    facts, outcomes = kept(tmp_path)
    assert [fact["seed"] for fact in facts] == [0, 1]
    assert outcomes == {"none": [one, one], "answer": [one, one]}


def test_of_several_seeds_each_has_its_own_rows_of_later_turns(tmp_path):
    """One draw may carry the pool's difference."""
    for seed, resists in ((0, 1.0), (1, 0.0)):
        found = {
            name: [Outcome(f"{seed} q", turn, "total", "rsr", "g", value) for turn in turns.TURNS]
            for name, value in (("none", 0.0), ("answer", 0.0), ("both", resists))
        }
        keep(tmp_path / f"seed-{seed}", {"seed": seed}, found)
    rows = turns.pool(tmp_path, "m")
    at = {(r["split"], r["defense"]): r["value"] for r in rows if r["benchmark"] == "4 turns" and "rsr" in r["metric"]}
    gain = "both against answer"
    assert (at["total", gain], at["seed 0", gain], at["seed 1", gain]) == (0.5, 1.0, 0.0)
    assert "seed 0" not in (tmp_path / "turns.md").read_text().partition("\n")[2]


@pytest.mark.parametrize(
    ("pool", "file", "place", "column"),
    [(turns.pool, "turns.md", turns.TURNS[-1], len(turns.TURNS)), (deep.pool, "deep-alignment.md", PLAIN, 1)],
)
def test_what_could_not_be_scored_is_told_once_below_the_table(tmp_path, pool, file, place, column):
    """Not of each seed again; where nothing was scored, the table has no figure."""
    benchmarks = dict.fromkeys((*turns.TURNS, *beginnings("sure")), "rsr")

    def made(seed: int, lost: str) -> list[Outcome]:
        rates = benchmarks | {"utility": "accuracy", "benign": "over_refusal"}
        return [
            Outcome(f"{seed} {q}", benchmark, "total", metric, q, None if benchmark == place and q in lost else 1.0)
            for benchmark, metric in rates.items()
            for q in "ab"
        ] + [Outcome(f"{seed} {q}", place, "total", "unscored", q, float(q in lost)) for q in "ab"]

    for seed, lost in ((0, ""), (1, "a")):
        found = {"none": made(seed, ""), "text": made(seed, "ab"), "answer": made(seed, ""), "both": made(seed, lost)}
        found["projection"] = made(seed, "ab")  # nothing to compare, either
        keep(tmp_path / f"seed-{seed}", {"seed": seed, "stages": {}, "beginning": "sure"}, found)
    pool(tmp_path, "m")
    page = (tmp_path / file).read_text()
    assert page.endswith(
        f"\n- Unscored, and left out of RSR: text, {place}: 4 of 4; both, {place}: 1 of 4; projection, {place}: 4 of 4.\n"
    )
    for title in (TITLES["text"], TITLES["projection"], f"{TITLES['projection']}, less answers alone"):
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {title} |"))
        assert line.split(" | ")[column] == "–", title


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
        rows = deep.begun(
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
    pixels = {one: (out / "seed-0" / "prompts" / one / "vsp.png").read_bytes() for one in BORDERS}
    assert len(set(pixels.values())) == 4
    lines = (out / "seed-0" / "begun-3" / "responses.jsonl").read_text().splitlines()
    assert len(lines) == 6 * 8 and not any(json.loads(line)["text"].startswith("sure") for line in lines)


def test_the_table_has_a_line_a_border_and_what_the_projection_adds(made):
    text = (made[0] / "deep-alignment.md").read_text()
    assert all(title in text for title in TITLES.values())
    assert text.count("less answers alone") == 3 and "seeds 0, 1" in text


def test_depth_looks_at_every_layer_of_the_borders_that_are_there(made, mini):
    out, _ = made
    lvlm = mini.told({})
    lvlm.longest = 6
    before = {path: path.stat().st_mtime_ns for path in (out / "seed-0" / "prompts").rglob("vsp.png")}
    settings = embedded.SETTINGS.model_copy(update={"steps": 1, "batch_size": 2})
    rows = depth.depth(lvlm, embedded.protocol(0, **SIZES), out, text=embedded.SAFETY_TEXT, settings=settings)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    at = {(r["defense"], r["benchmark"], r["split"], r["metric"]): r for r in rows}
    last = f"layer {lvlm.num_layers}"
    for name in TITLES:
        assert at[name, "malicious", last, "refusal_odds"]["n"] == at[name, depth.BARRED, "total", "rsr"]["n"] == 8
        assert (name, "benign", "layer 1", "projection") in at and (name, "benign", last, "projection") not in at
    answers = (out / "depth" / "seed-0" / "barred" / "responses.jsonl").read_text().splitlines()
    assert not any(json.loads(line)["text"].startswith("i ") for line in answers)
    text = (out / "depth" / "depth.md").read_text()
    assert text.count("less answers alone") == 3 and "`i` barred" in text
    assert (out / "depth" / "depth.svg").read_text().startswith("<svg")


def test_the_last_layers_odds_are_those_of_the_answer(mini):
    """Where the refusal's first token has more than half of the probability, the model says it."""
    data = embedded.protocol(0, **SIZES)
    pictured = [q for q in data.test if q.image is not None]
    vector = HarmfulnessVector.fit(mini, data.vector_malicious, data.vector_benign, progress=False)
    odds = depth.see(mini, NoDefense(), pictured, vector, embedded.REFUSAL, 8)["refusal_odds"][:, -1]
    said = [response.text.startswith("i ") for response in NoDefense().respond(mini, pictured)]
    assert [value > 0 for value in odds] == said and 0 < sum(said) < len(said)


def test_the_attacker_asks_on_after_a_refusal_and_stops_at_an_answer(made, mini, monkeypatch):
    out, _ = made
    lvlm = mini.told({})
    lvlm.longest = 6
    settings = embedded.SETTINGS.model_copy(update={"steps": 1, "batch_size": 2})
    rows = turns.turns(lvlm, embedded.protocol(0, **SIZES), out, text=embedded.SAFETY_TEXT, settings=settings)
    at = {(r["defense"], r["benchmark"], r["metric"]): r for r in rows}
    for name in TITLES:
        after = [at[name, benchmark, "rsr"]["value"] for benchmark in turns.TURNS]
        assert after == sorted(after, reverse=True) and at[name, turns.TURNS[-1], "rsr"]["n"] == 8
    folder = out / "turns" / "seed-0" / "text"
    ids = [
        {json.loads(line)["query_id"] for line in (folder / f"turn-{k}" / "responses.jsonl").read_text().splitlines()}
        for k in (2, 3)
    ]
    safe = {
        v["query_id"]
        for v in map(json.loads, (folder / "turn-2" / "verdicts.jsonl").read_text().splitlines())
        if v["label"] == "safe"
    }
    assert ids[1] == safe <= ids[0]
    assert at["text", "read in turn 1", "accuracy"]["n"] == at["text", "read in turn 2", "accuracy"]["n"] > 0
    assert (out / "turns" / "turns.md").read_text().count("less answers alone") == 3
    unknown = lvlm.tokenizer.unk_token_id
    assert not any(unknown in lvlm.tokenizer(one)["input_ids"] for one in (*turns.FOLLOW_UPS, turns.READ))


def test_an_unscored_answer_ends_a_conversation_and_is_in_no_rate(mini, tmp_path, monkeypatch):
    def answered(lvlm, defenses, asked, out, **_):
        said = {q.id: "unscored" if q.id == "odd" and len(q.turns) == 2 else "safe" for q in asked}
        conversations.append([(q.id, len(q.turns)) for q in asked])
        return Evaluation(
            {"text": [Response(id, "text", "words") for id in said]},
            {"text": [Verdict(id, "text", "j", label) for id, label in said.items()]}, [],
        )  # fmt: skip

    conversations: list[list[tuple[str, int]]] = []
    monkeypatch.setattr(turns, "evaluate", answered)
    queries = [Query(id, "how ?", "malicious", "sd", group=id) for id in ("odd", "even")]
    found = turns.asked_on(mini, "text", NoDefense(), queries, {q.id: ("no .", "safe") for q in queries}, tmp_path, {})
    assert conversations == [[("odd", 2), ("even", 2)], [("even", 4)], [("even", 6)]]
    at = {(o.query_id, o.benchmark, o.metric): o.value for o in found}
    assert [at["even", k, "rsr"] for k in turns.TURNS] == [1, 1, 1, 1]
    assert [at["odd", k, "rsr"] for k in turns.TURNS] == [1, None, None, None]
    assert [at["odd", k, "unscored"] for k in turns.TURNS] == [0, 1, 1, 1]
    rows = metrics.rows("m", "text", found)
    assert unscored(rows) == [
        "- Unscored, and left out of RSR: text, 2 turns: 1 of 2; text, 3 turns: 1 of 2; text, 4 turns: 1 of 2."
    ]
