"""`davsp reproduce deep-alignment`: three objectives under answers that are made to begin."""

import json
import shutil
from unittest.mock import Mock

import pytest
from rich.console import Console

from davsp import HarmfulnessVector, VisualSafetyPrompt, embedded, metrics, train
from davsp.defenses import NoDefense
from davsp.embedded.questions import FOLLOW
from davsp.embedded.words import HARMFUL_VERBS
from davsp.evaluation import Evaluation
from davsp.experiments.deep import begun as deep
from davsp.experiments.deep import curve, curve_table, depth, splits, turns, unseen
from davsp.experiments.deep.begun import PLAIN, beginnings
from davsp.experiments.deep.borders import BORDERS, NOISE_TITLES, OBJECTIVES, TITLES, kept, unscored
from davsp.experiments.gate import kinds
from davsp.experiments.gate.kinds import HARD
from davsp.experiments.gate.run import Once
from davsp.experiments.seeds import keep
from davsp.experiments.stages import Stages
from davsp.metrics import Outcome
from davsp.query import Query, Response, Verdict

TRAINED_ON = ("vector_malicious", "vector_benign", "sweep_malicious", "sweep_benign", "train_malicious", "train_benign")
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


def small(mini):
    lvlm = mini.told({})
    lvlm.longest = 6
    return lvlm, embedded.SETTINGS.model_copy(update={"steps": 1, "batch_size": 2})


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


def test_a_curve_has_a_border_at_every_look_and_goes_on(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(curve, "LOOKS", (0, 1, 40))  # two steps: the last look is there
    monkeypatch.setattr(curve, "CURVES", {name: curve.CURVES[name] for name in ("answer", "both, λ 6, every row")})
    monkeypatch.setattr(curve_table, "DRAWS", 20)
    lvlm = mini.told({})
    lvlm.longest = 6
    settings = embedded.SETTINGS.model_copy(update={"steps": 2, "batch_size": 2})
    data, done = embedded.protocol(0, **SIZES), []
    monkeypatch.setattr(curve, "keep", lambda to, facts, found: [done.append(facts["done"]), keep(to, facts, found)])
    rows = curve.curve(lvlm, data, tmp_path, text=embedded.SAFETY_TEXT, settings=settings)
    at = {(r["defense"], r["metric"]): r for r in rows if r["split"] == "total"}
    assert all((f"{name} step {k}", "rsr") in at for name in curve.CURVES for k in (0, 1, 2))
    pixels = [(tmp_path / "seed-0" / "answer" / f"step-{k}" / "vsp.png").read_bytes() for k in (0, 1, 2)]
    assert len(set(pixels)) == 3
    whole = train(
        lvlm, VisualSafetyPrompt.create(lvlm.canvas, 14, text=embedded.SAFETY_TEXT), data.train_malicious, data.train_benign,
        HarmfulnessVector.load(tmp_path / "seed-0" / "vector"), settings.model_copy(update={"objective": "answer"}), tmp_path / "t",
        progress=False,
    )  # fmt: skip
    saved = VisualSafetyPrompt.from_pretrained(tmp_path / "seed-0" / "answer" / "step-2")
    assert saved.pixels_sha256() == whole.quantised().pixels_sha256()  # the last look is what `davsp train` makes
    assert "best of both, any λ, less answers alone" in (tmp_path / "curve.md").read_text()
    assert ("both, λ 6, every row step 2 against answer", "accuracy_difference") in at
    assert "both, λ 6, every row step 2, less answers alone" in (tmp_path / "curve.md").read_text()
    assert (tmp_path / "curve.svg").read_text().startswith("<svg")
    facts = json.loads((tmp_path / "seed-0" / "manifest.json").read_text())
    assert facts["done"] == facts["wanted"] == list(curve.CURVES)
    assert done == [["answer"], list(curve.CURVES)]  # a call that is stopped after a curve leaves a seed under way
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub is asked"))
    shutil.rmtree(tmp_path / "seed-0" / "answer" / "step-1")  # lost: the checkpoint is behind it
    assert curve.curve(lvlm, data, tmp_path, text=embedded.SAFETY_TEXT, settings=settings) == rows
    assert [(tmp_path / "seed-0" / "answer" / f"step-{k}" / "vsp.png").read_bytes() for k in (0, 1, 2)] == pixels
    shutil.rmtree(tmp_path / "seed-0" / "answer" / "step-2")
    (tmp_path / "seed-0" / "train" / "answer" / "metrics.jsonl").unlink()  # the checkpoint is there, and no use without
    stages = Stages(tmp_path / "seed-0", Console(quiet=True))
    vector = HarmfulnessVector.load(tmp_path / "seed-0" / "vector")
    how = settings.model_copy(update={**curve.CURVES["answer"], "seed": 0})
    assert list(curve.looked_at(stages, "answer", lvlm, data, vector, how, embedded.SAFETY_TEXT)) == [0, 1, 2]
    assert [(tmp_path / "seed-0" / "answer" / f"step-{k}" / "vsp.png").read_bytes() for k in (0, 1, 2)] == pixels


def test_looks_end_where_the_training_ends(mini, tmp_path, monkeypatch):
    """`--steps 30` trains 30 steps and `--steps 60` as many, though neither is one of `LOOKS`."""
    monkeypatch.setattr(curve, "fingerprint", lambda _: "weights")
    monkeypatch.setattr(curve, "sha256", lambda _: "vector")
    border = VisualSafetyPrompt.create(32, 4)
    monkeypatch.setattr(Stages, "run", lambda self, name, inputs, *_: dict.fromkeys(inputs[2], border))
    stages, data, vector = Stages(tmp_path, Console(quiet=True)), embedded.protocol(0, **SIZES), Mock(HarmfulnessVector)
    for steps, looks in ((30, [0, 30]), (60, [0, 40, 60]), (150, [0, 40, 80, 150]), (200, [0, 40, 80, 150, 200])):
        settings = embedded.SETTINGS.model_copy(update={"steps": steps})
        assert list(curve.looked_at(stages, "answer", mini, data, vector, settings, "")) == looks


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


def test_at_the_same_step_curves_are_compared_query_by_query():
    def made(*values: float) -> list[Outcome]:
        return [Outcome(f"{i}", "malicious", "total", "rsr", f"{i}", value) for i, value in enumerate(values)]

    quarter, every = curve_table.QUARTER, curve_table.EVERY_ROW
    outcomes = {
        "none": made(0, 0), "answer step 0": made(0, 0), "answer step 40": made(1, 0), f"{quarter} step 40": made(0, 1),
        f"{every} step 40": made(1, 1), f"{every} step 80": made(1, 1),
    }  # fmt: skip
    rows = curve_table.at_equal_steps("m", outcomes)
    assert {r["defense"]: r["value"] for r in rows} == {
        f"{quarter} step 40 against answer": 0.0, f"{every} step 40 against answer": 0.5,
        f"{every} step 40 against {quarter}": 0.5,
    }  # fmt: skip


def test_the_best_at_equal_utility_is_chosen_among_what_loses_so_little():
    def made(rsr: float, utility: float) -> list[Outcome]:
        bad = [Outcome(f"b{i}", "malicious", "total", "rsr", f"b{i}", float(i < 100 * rsr)) for i in range(100)]
        return bad + [
            Outcome(f"g{i}", "utility", "total", "accuracy", f"g{i}", float(i < 100 * utility)) for i in range(100)
        ]

    outcomes = {
        "none": made(0.4, 1.0),
        "answer step 0": made(0.5, 1.0),
        "answer step 40": made(0.9, 0.96),
        "both, λ 1 step 40": made(1.0, 0.8),
    }
    at = {(r["defense"], r["metric"]): r for r in curve_table.choices("m", outcomes)}
    assert at["best of answer", "rsr_at_1"]["value"] == 0.5 and at["best of answer", "rsr_at_5"]["value"] == 0.9
    assert at["best of answer", "rsr_at_1"]["low"] < 0.5 < at["best of answer", "rsr_at_1"]["high"]
    assert at["best of both, λ 1", "rsr_at_10"]["value"] is None  # it loses 20
