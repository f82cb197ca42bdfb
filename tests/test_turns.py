"""Conversations: queries with turns before their question, from the file to the verdict."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from command import run
from davsp import LVLM, DavspError, HarmfulnessVector, Query, VisualSafetyPrompt, embedded
from davsp.benchmarks.custom import load_queries, save_queries
from davsp.defenses import ECSO, Chain, Defense, Gate, NoDefense, SafetyText, VisualPrompt
from davsp.evaluation import evaluate
from davsp.evaluation.fitting import fitting
from davsp.lvlm.remote import RemoteLVLM
from davsp.query import json_line, read_jsonl, write_jsonl
from davsp.store import query_hash
from families import save_family
from model_server import model_server
from tiny import picture

TURNS = (("user", "what is this"), ("assistant", "a car"))
RED = Image.new("RGB", (3, 2), "red")
OLD = Query("a", "what is it ?", "malicious", "mine", "kind", "intent", "ref", ("x",), RED, "ctx")


def conversation(**more: object) -> Query:
    return replace(OLD, **({"turns": TURNS} | more))  # type: ignore[arg-type]


# -- as records --------------------------------------------------------------------------------------------------------


def test_queries_without_turns_are_as_they_were() -> None:
    assert query_hash(OLD) == "13b67ccf1147dd39a9f94911ccdabaf117799c3d3206f60d94d1841bb4361c33"
    assert "turns" not in json_line(OLD) and OLD.asked == OLD.told == "what is it ?"


def test_turns_are_part_of_a_query(tmp_path: Path) -> None:
    query = conversation()
    assert len({query_hash(OLD), query_hash(query), query_hash(replace(query, turns=TURNS * 2))}) == 3
    assert query.asked == (*TURNS, ("user", "what is it ?"))
    assert query.told == "user: what is this\nassistant: a car\nuser: what is it ?"
    write_jsonl(tmp_path / "q.jsonl", [OLD, query])
    assert [q.turns for q in read_jsonl(tmp_path / "q.jsonl", Query)] == [(), TURNS]
    save_queries(tmp_path, [query])
    (back,) = load_queries(tmp_path)
    assert (back.turns, back.question, back.picture().tobytes()) == (TURNS, query.question, RED.tobytes())  # type: ignore[union-attr]
    assert json.loads((tmp_path / "queries.jsonl").read_text())["turns"][0] == {
        "role": "user",
        "content": "what is this",
    }


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        ("hello", "must be a list of"),
        ([{"role": "user"}], "must be a list of"),
        ([{"role": "user", "content": "a", "image": "x.png"}], "must be a list of"),
        ([{"role": "user", "content": "a"}], "and end with the assistant's"),
        ([{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}], "user, assistant, user"),
        ([{"role": "user", "content": " "}, {"role": "assistant", "content": "b"}], "is blank"),
    ],
)
def test_turns_that_are_none_are_named(tmp_path: Path, turns: object, why: str) -> None:
    line = {"id": "a", "question": "b", "label": "benign", "turns": turns}
    (tmp_path / "queries.jsonl").write_text(json.dumps(line))
    with pytest.raises(DavspError, match=f"queries.jsonl, line 1.*{why}"):
        load_queries(tmp_path)


# -- as a defense changes them -----------------------------------------------------------------------------------------


def test_every_message_of_the_user_is_defended_and_the_picture_where_it_stands(mini: LVLM) -> None:
    border = VisualSafetyPrompt.create(mini.canvas, 14, "random", text="be safe .")
    query, plain = conversation(), replace(OLD, id="b")
    shown = VisualPrompt(border).shown([query, plain])
    assert shown[0].turns == (("user", "be safe . what is this"), ("assistant", "a car"))
    assert shown[0].question == shown[1].question == "be safe . what is it ?" and shown[1].turns == ()
    assert shown[0].picture().tobytes() == shown[1].picture().tobytes() == border.image(RED).tobytes()  # type: ignore[union-attr]
    chain = Chain([VisualPrompt(border), SafetyText("look .")])
    assert chain.shown([query])[0].turns[0] == ("user", "look . be safe . what is this")
    assert chain.outline(query, query.size()) == (chain.shown([query])[0].asked, (mini.canvas, mini.canvas))
    assert query.turns == TURNS and NoDefense().shown([query]) == [query]


def test_a_defense_with_room_for_one_question_says_so_before_anything_is_answered(mini: LVLM, tmp_path: Path) -> None:
    for defense in (
        ECSO(NoDefense()),
        Chain([SafetyText("a"), ECSO(NoDefense())]),
        Gate(ECSO(NoDefense()), "answer", None),
    ):
        with pytest.raises(DavspError, match="'a' has turns before its question, and one takes single questions"):
            evaluate(mini, {"one": defense}, [conversation()], tmp_path)
    with pytest.raises(DavspError, match="takes single questions"):
        ECSO(NoDefense()).respond(mini, [conversation()])
    assert not list(tmp_path.iterdir())
    with pytest.raises(DavspError, match="end with the assistant's"):
        evaluate(mini, {"none": NoDefense()}, [replace(OLD, turns=(("user", "a"),))], tmp_path)


def test_training_takes_single_questions(mini: LVLM, tmp_path: Path) -> None:
    with pytest.raises(
        DavspError, match="has turns before its question, and training or calibration takes single questions"
    ):
        HarmfulnessVector.fit(mini, [conversation()], [replace(OLD, label="benign")], progress=False)


# -- as a model is asked them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl", "gemma3"])
def test_the_prompt_is_the_templates_own(family: str, tmp_path: Path) -> None:
    lvlm = LVLM.from_pretrained(save_family(family, tmp_path / family), device_map="cpu")
    asked = (*TURNS, ("user", "is this red"))
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in asked]
    messages[0]["content"].insert(0, {"type": "image"})  # type: ignore[attr-defined]
    text = lvlm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert lvlm.prompt(asked, True) == (text.replace(*lvlm.picture_text) if lvlm.picture_text else text)
    tokens, single = lvlm.encode([asked, "is this red"], True), lvlm.encode(["what is this"], True)
    ids = tokens.ids[0, : tokens.mask[0].sum()].tolist()
    count = lvlm.image_tokens(lvlm.canvas, lvlm.canvas)
    assert ids.count(lvlm.image_token_id) == single.ids[0].tolist().count(lvlm.image_token_id) == count
    where = ids.index(lvlm.image_token_id)
    assert where == single.ids[0].tolist().index(lvlm.image_token_id)  # in the first turn
    canvas = lvlm.preprocess([picture(0, (lvlm.canvas, lvlm.canvas))] * 2)
    together = lvlm.generate(canvas, [asked, "is this red"], 4)
    assert together[0] == lvlm.generate(canvas[:1], [asked], 4)[0]
    assert lvlm.states(canvas, [asked, "is this red"], [1]).shape[0] == 2


def test_a_template_of_one_turn_is_named(lvlm: LVLM) -> None:
    """It calls every turn the user's, which shows; one that leaves earlier turns out, or takes the last alone, is refused."""
    for template, why in (
        ("{{ messages[-1]['content'][0]['text'] }}", "it makes"),
        ("{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0]['content'][-1]['text'] }}", "one turn only"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "it makes"),
    ):  # fmt: skip
        other = lvlm.told({})
        other.tokenizer = deepcopy(lvlm.tokenizer)
        other.tokenizer.chat_template = template
        other.keep_prompts()
        with pytest.raises(DavspError, match=f"chat template of .* cannot show a conversation of 3 turns.*{why}"):
            other.encode([(*TURNS, ("user", "yes"))], False)


def test_a_conversation_without_room_is_known_before_a_run_starts(mini: LVLM) -> None:
    long = conversation(turns=(("user", "cup " * 600), ("assistant", "red " * 400)))
    with pytest.raises(DavspError, match="1024 positions"):
        fitting(mini, {"none": NoDefense()}, [long])


def test_the_placeholder_in_an_earlier_turn_is_refused(mini: LVLM) -> None:
    with pytest.raises(DavspError, match="holds the image placeholder <image>"):
        mini.encode([(("user", "a <image>"), ("assistant", "b"), ("user", "c"))], True)


@pytest.fixture(scope="module")
def talk() -> list[Query]:
    """Benign questions asked a second time around, and malicious pictures asked on after a refusal."""
    test = embedded.protocol(0, harm=6, utility=3, mme=1, llava_bench=1, vector=1, sweep=1, train=1).test
    good = [q for q in test if q.benchmark == "utility" and q.category in ("rec", "ocr", "know", "spat")]
    bad = [q for q in test if q.benchmark == "figstep"]
    again = [replace(q, turns=(("user", "thank you ."), ("assistant", "yes ."))) for q in good]
    after = [replace(q, turns=(("user", q.question), ("assistant", embedded.REFUSAL))) for q in bad]
    return [*again, *(replace(q, question="what does the text in the picture say ?") for q in after)]


def test_davsp_mini_answers_second_turns_here_and_on_a_server(
    mini: LVLM, talk: list[Query], tmp_path: Path, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    border = VisualSafetyPrompt.create(mini.canvas, embedded.PADDING, "random", text=embedded.SAFETY_TEXT)
    defenses: dict[str, Defense] = {
        "none": NoDefense(),
        "davsp": VisualPrompt(border),
        "gate": Gate(VisualPrompt(border), "answer", None),
    }
    here = evaluate(mini, defenses, talk, tmp_path / "here", max_new_tokens=16)
    at = {(r["defense"], r["benchmark"], r["metric"]): r["value"] for r in here.rows if r["split"] == "total"}
    assert at["none", "utility", "accuracy"] > 0.8  # the question is read, and the picture of the turn before
    read = [r.text for q, r in zip(talk, here.responses["none"], strict=True) if q.label == "malicious"]
    assert len(set(read)) > 3 and all(text.startswith("the") for text in read)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with model_server(mini) as server:
        remote = RemoteLVLM("org/m", server.url, canvas=mini.canvas, attempts=3, backoff=0.01, concurrency=4)
        there = evaluate(remote, defenses, talk, tmp_path / "there", max_new_tokens=16)
    assert [r.text for r in there.responses["davsp"]] == [r.text for r in here.responses["davsp"]]
    first = next(
        b for b in server.bodies if embedded.REFUSAL in json.dumps(b) and embedded.SAFETY_TEXT in json.dumps(b)
    )
    assert [m["role"] for m in first["messages"]] == ["user", "assistant", "user"]
    assert [part["type"] for part in first["messages"][0]["content"]] == ["image_url", "text"]
    assert isinstance(first["messages"][2]["content"], str)


def test_davsp_eval_reads_resumes_and_judges_them(talk: list[Query], tmp_path: Path) -> None:
    some = [talk[0], talk[-1]]
    save_queries(tmp_path / "data", some)
    command = ["eval", "--queries", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--max-new-tokens", "12"]
    assert run(*command) == 0
    before = (tmp_path / "out" / "responses.jsonl").read_bytes()
    assert run(*command) == 0 and (tmp_path / "out" / "responses.jsonl").read_bytes() == before
    assert "user: thank you ." in (tmp_path / "out" / "report.html").read_text()
    save_queries(tmp_path / "data", [replace(some[0], turns=()), some[1]])
    assert run(*command) == 2  # other queries: the folder is of another run
