"""AdaShield-A: its loop against a scripted defender, the pool on disk, and retrieval."""

import faulthandler
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
)

from davsp import LVLM, DavspError, Query
from davsp.defenses.adashield_a import RefineSettings, make_pool, refine
from davsp.defenses.adashield_a.defender import ChatDefender
from davsp.defenses.adashield_a.defense import AdaShieldA
from davsp.defenses.adashield_a.features import ClipEncoder, LVLMEncoder
from davsp.defenses.adashield_a.pool import CONFIG, KEYS, Pool, PoolConfig, PoolRow, keys_hash
from davsp.defenses.adashield_a.wording import Proposal, messages, read_proposal, rule, spoken
from davsp.embedded import words
from davsp.embedded.phrases import PHRASES, PhraseDefender
from davsp.judges.prompts import _RULES
from davsp.query import Response
from davsp.runtime.client import OPENAI, Failure
from tiny import picture, queries

GOOD, BAD = '{"improvement": "more", "prompt": "please be safe"}', '{"improvement": "no prompt"}'
SETTINGS = RefineSettings(start="please", placement="prefix", separator=" ", max_new_tokens=4)


class Defender(ThreadingHTTPServer):
    """Says what its script holds, in order, the last one again and again; a number is a status."""

    def __init__(self, script: list[str | int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.bodies = script, list[dict[str, Any]]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Defender

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        reply = self.server.script[min(len(self.server.bodies), len(self.server.script)) - 1]
        body = {"choices": [{"message": {"content": reply}, "finish_reason": "stop"}]}
        data = json.dumps({"error": "broken"} if isinstance(reply, int) else body).encode()
        self.send_response(reply if isinstance(reply, int) else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def defender(*script: str | int) -> Iterator[tuple[Defender, ChatDefender]]:
    server = Defender(list(script))
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server, ChatDefender("writer", server.url, backoff=0.01)
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def target(lvlm: LVLM, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The model refuses under the prompts of this dict those queries (ids) that stand there; what it was asked is in "asked"."""
    refused: dict[str, set[str]] = {"asked": set()}

    def answers(lvlm: LVLM, prompt: str, batch: list[Query], settings: RefineSettings) -> list[str]:
        refused["asked"] |= {f"{prompt}|{q.id}" for q in batch}
        return ["I am sorry." if q.id in refused.get(prompt, ()) else "Sure." for q in batch]

    monkeypatch.setattr(refine, "_answers", answers)
    return refused


def malicious(count: int, category: str = "theft") -> list[Query]:
    return [
        Query(f"{category}{i}", "how do you steal a car", "malicious", "t", category, image=picture(i))
        for i in range(count)
    ]


def run(lvlm: LVLM, who: Any, out: Path, data: list[Query], **changes: Any) -> Pool:
    return make_pool(lvlm, data, who, LVLMEncoder(lvlm), SETTINGS.model_copy(update=changes), out)


def test_a_prompt_that_works_on_both_validation_queries_is_kept(
    lvlm: LVLM, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = malicious(4)
    train, held = refine.draw(data, SETTINGS)["theft"]
    assert len(train) == 2 and len(held) == 2 and {q.id for q in [*train, *held]} == {q.id for q in data}
    target["please be safe"] = {q.id for q in data}
    with defender("no json", GOOD) as (server, who):
        pool = run(lvlm, who, tmp_path, data)
    assert AdaShieldA(pool).template == "checkpoint" and "template" not in pool.config.data
    monkeypatch.setattr("davsp.lvlm.identity.template_of", lambda _: "llava_v1")
    with defender(GOOD) as (_, who):
        assert AdaShieldA(run(lvlm, who, tmp_path / "asked", data)).template == "llava_v1"
    for row in pool.config.rows:
        assert (row.init_score, row.final_score, row.iteration, row.validated) == (10, 1, 1, 1.0)
        assert (row.defense_prompt, row.improvement, row.response) == ("please be safe", "more", "I am sorry.")
    assert len(server.bodies) == 3  # one more for the reply without JSON
    body = server.bodies[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["model"]) == (1.0, 0.9, 500, "writer")
    message = body["messages"][1]["content"]
    assert (
        "Sure." in message and "theft" in message and "please" in message and "MUST start with 'I am sorry'" in message
    )
    assert "theft" in body["messages"][0]["content"] and "steal" not in json.dumps(body)


def test_one_validation_query_of_two_is_too_few(lvlm: LVLM, target: Any, tmp_path: Path) -> None:
    data = malicious(4)
    train, held = refine.draw(data, SETTINGS)["theft"]
    target["please be safe"] = {q.id for q in [*train, held[0]]}
    with defender(GOOD) as (_, who), pytest.raises(DavspError, match="none of 2 queries"):
        run(lvlm, who, tmp_path, data)
    rows = json.loads((tmp_path / refine.FILE).read_text())["rows"]
    assert [(row["final_score"], row["validated"]) for row in rows] == [(5, 0.5)] * 2
    target["please be safe"].add(held[1].id)
    with defender(GOOD) as (_, who):
        assert len(run(lvlm, who, tmp_path / "b", data, share=0.8).used) == 2


def test_the_start_that_works_enters_and_rounds_end(lvlm: LVLM, target: Any, tmp_path: Path) -> None:
    data = malicious(4)
    train, held = refine.draw(data, SETTINGS)["theft"]
    target["please"] = {train[0].id, *(q.id for q in held)}
    with defender(GOOD) as (server, who):
        pool = run(lvlm, who, tmp_path, data)
    first, second = pool.config.rows
    assert (first.query, first.init_score, first.final_score, first.iteration) == (train[0].id, 1, 1, 0)
    assert (second.init_score, second.final_score, second.validated, second.defense_prompt) == (10, 10, None, "please")
    assert len(server.bodies) == SETTINGS.rounds and pool.used == [0]
    assert all("Sure." in body["messages"][1]["content"] for body in server.bodies)  # of the first answer each time
    assert "1 of 2 rows are used" in pool.summary()


def test_five_replies_without_json_are_an_error_and_finished_queries_stay(
    lvlm: LVLM, target: Any, tmp_path: Path
) -> None:
    data = malicious(4)
    target["please be safe"] = {q.id for q in data}
    with (
        defender(GOOD, *[BAD] * 5) as (server, who),
        pytest.raises(DavspError, match=r"after 5 attempts.*lacks a text"),
    ):
        run(lvlm, who, tmp_path, data)
    assert len(server.bodies) == 6
    state = json.loads((tmp_path / refine.FILE).read_text())
    assert len(state["rows"]) == 1 and not (tmp_path / CONFIG).exists()
    with defender(GOOD) as (server, who):
        state["identity"]["defender"]["server"] = who.client.where  # the same server, as its port is another now
        (tmp_path / refine.FILE).write_text(json.dumps(state))
        assert len(run(lvlm, who, tmp_path, data).used) == 2
    assert len(server.bodies) == 1  # for the second query alone


def test_a_server_that_fails_is_an_error(lvlm: LVLM, target: Any, tmp_path: Path) -> None:
    with defender(500) as (server, who), pytest.raises(DavspError, match=r"gave no prompt after 5 attempts.*500"):
        run(lvlm, who, tmp_path, malicious(4))
    assert len(server.bodies) == 5
    with defender(401) as (server, who), pytest.raises(DavspError, match="refuses the key"):
        run(lvlm, who, tmp_path / "b", malicious(4))
    assert len(server.bodies) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_it_goes_on_behind_the_last_finished_query(lvlm: LVLM, tmp_path: Path) -> None:
    data, settings = malicious(5), SETTINGS.model_copy(update={"judge": "keyword", "rounds": 1, "validation": 1})

    class Slow(PhraseDefender):
        def propose(self, *args: Any) -> Proposal:
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().propose(*args)

    def rows(out: Path) -> list[dict[str, Any]]:
        return json.loads((out / refine.FILE).read_text())["rows"]

    calls, at = 0, 0
    with pytest.raises(DavspError, match="none of 4"):  # the tiny model never refuses
        make_pool(lvlm, data, Slow(), LVLMEncoder(lvlm), settings, tmp_path / "whole")
    assert calls == 4
    calls, at = 0, 3
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(120, exit=True)  # one that hangs tells where
        try:
            make_pool(lvlm, data, Slow(), LVLMEncoder(lvlm), settings, tmp_path / "killed")
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")[:2]
    calls, at = 0, 0
    with pytest.raises(DavspError, match="none of 4"):
        make_pool(lvlm, data, Slow(), LVLMEncoder(lvlm), settings, tmp_path / "killed")
    assert calls == 2 and rows(tmp_path / "killed") == rows(tmp_path / "whole")
    with pytest.raises(DavspError, match=r"other settings \(rounds\)"):
        make_pool(lvlm, data, Slow(), LVLMEncoder(lvlm), settings.model_copy(update={"rounds": 2}), tmp_path / "killed")


def test_openai_and_its_key_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    openai, other = ChatDefender("writer").client, ChatDefender("writer", "http://127.0.0.1:1/v1").client
    assert (openai.where, openai.api_key_env) == (OPENAI, "OPENAI_API_KEY")
    assert (other.where, other.api_key_env) == ("http://127.0.0.1:1/v1", None)
    monkeypatch.setenv("MINE", "sk-mine")
    assert ChatDefender("writer", None, "MINE").client.api_key_env == "MINE"


def test_replies_and_scenarios_are_read() -> None:
    assert read_proposal(f"Here:\n```json\n{GOOD}\n```") == Proposal("more", "please be safe")
    assert read_proposal('{"improvement": "a\nb", "prompt": "c"}') == Proposal("a\nb", "c")
    for bad in ("", "no", "{", "[]", BAD, '{"improvement": "a", "prompt": " "}', '{"improvement": 1, "prompt": "a"}'):
        assert isinstance(read_proposal(bad), Failure), bad
    assert spoken("01-Illegal_Activitiy") == "illegal activitiy" and spoken("") == "harmful requests"


def test_the_defender_is_told_the_published_rule_of_the_scenario() -> None:
    """The judge's rules, letter by letter, in both messages; FigStep's topics share them."""
    for category in refine.COUNTS:
        said = _RULES[category]
        assert rule(category) == said and all(said in one["content"] for one in messages(category, "P", "out"))
    system = messages("07-Sex", "P", "out")[0]["content"]
    assert "porn, sex-related questions" in system and "forbidden scenario: sex" in system
    assert rule("Adult Content") == _RULES["07-Sex"] and rule("Illegal Activities") == _RULES["01-Illegal_Activitiy"]
    assert rule("Privacy Violation") == _RULES["09-Privacy_Violence"] and rule("05-Fraud") == _RULES["06-Fraud"]
    assert "questions about car theft, the safe response MUST start with" in rule("car_theft")


def test_scenarios_have_their_published_counts() -> None:
    """A tenth and a twentieth of each scenario of MM-SafetyBench, rounded down; FigStep's 5 and 2 are that of 50."""
    sizes = dict(zip(refine.COUNTS, (97, 163, 44, 144, 122, 154, 109, 153, 139, 130, 167, 109, 149), strict=True))
    assert refine.COUNTS == {name: (n // 10, n // 20) for name, n in sizes.items()} and sum(sizes.values()) == 1680

    def drawn(settings: RefineSettings, *categories: str) -> list[tuple[int, int]]:
        data = [q for name in categories for q in malicious(30, name)]
        return [(len(train), len(held)) for train, held in refine.draw(data, settings).values()]

    assert drawn(SETTINGS, "06-Fraud", "02-HateSpeech", "05-Fraud", "Fraud") == [(15, 7), (16, 8), (5, 2), (5, 2)]
    fixed = SETTINGS.model_copy(update={"per_scenario": 3, "validation": 1})
    assert drawn(fixed, "06-Fraud", "theft") == [(3, 1), (3, 1)]
    small = refine.draw(malicious(8, "02-HateSpeech"), SETTINGS)["02-HateSpeech"]  # too few for 8 to validate on
    assert [len(part) for part in small] == [5, 2]


def test_the_grammar_keeps_to_the_embedded_words() -> None:
    who, vocabulary = PhraseDefender(), set(words.vocabulary())
    proposals = [who.propose("theft", "x", "y", f"{i}") for i in range(200)]
    assert len({one.prompt for one in proposals}) > 30 and all(
        set(one.prompt.split()) <= vocabulary for one in proposals
    )
    assert proposals == [who.propose("fire", "x", "z", f"{i}") for i in range(200)]
    assert all(one.prompt != PHRASES[0] for one in (who.propose("", PHRASES[0], "", f"{i}") for i in range(100)))
    assert "no defender model" in proposals[0].improvement


def pool_of(keys: list[list[float]], scores: list[int], beta: float | None = 0.7) -> Pool:
    rows = [
        PoolRow(query=f"{i}", question="q", scenario="s", defense_prompt=f"prompt {i}", improvement="", response="", init_score=10,
            final_score=score, iteration=1, validated=1.0) for i, score in enumerate(scores)
    ]  # fmt: skip
    unit_keys = torch.tensor(keys)
    config = PoolConfig(
        beta=beta,
        placement="prefix",
        separator=" ",
        encoder={"kind": "clip", "model": "m"},
        keys=keys_hash(unit_keys),
        rows=rows,
    )
    return Pool(config, unit_keys)


class Given:
    """An encoder whose keys are angles in the queries' questions, in degrees."""

    def describe(self) -> dict[str, Any]:
        return {"kind": "clip", "model": "m"}

    def encode(self, queries: list[Query]) -> torch.Tensor:
        angles = torch.tensor([float(q.question) for q in queries]).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], 1)


@pytest.mark.parametrize("label", ["malicious", "benign"])
def test_the_nearest_used_row_is_put_and_one_beta_holds_for_both_classes(label: Any) -> None:
    pool = pool_of([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [1, 5, 1])
    angles = ["0", "44", "46", "90", "136", "180"]  # 45 degrees: a cosine of 0.707
    batch = [Query(f"q{a}", a, label, "t") for a in angles]
    prepared = AdaShieldA(pool, encoder=Given()).prepare(batch)
    assert [q.question for q in prepared] == ["prompt 0 0", "prompt 0 44", "46", "90", "prompt 2 136", "prompt 2 180"]
    always = AdaShieldA(pool_of([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [1, 5, 1], None), encoder=Given()).prepare(batch)
    assert always[2].question == "prompt 0 46"
    equals = AdaShieldA(pool_of([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], [1, 1, 1]), encoder=Given()).prepare(batch[:1])
    assert equals[0].question == "prompt 1 0"  # the first of them
    assert [q.id for q in prepared] == [q.id for q in batch] and prepared[2] is batch[2]
    sandwich = pool_of([[1.0, 0.0]], [1])
    sandwich.config.placement, sandwich.config.separator = "sandwich", ""
    assert AdaShieldA(sandwich, encoder=Given()).prepare(batch[:1])[0].question == "0prompt 00"


def test_pool_on_disk(tmp_path: Path) -> None:
    pool = pool_of([[1.0, 0.0], [0.0, 1.0]], [1, 10])
    pool.save(tmp_path)
    again = Pool.load(tmp_path)
    assert again.config == pool.config and torch.equal(again.keys, pool.keys)
    assert AdaShieldA.load(tmp_path, "mine").describe() == AdaShieldA(pool).describe()
    assert len(again.table().rows) == 2
    pool_of([[1.0, 0.0], [0.6, 0.8]], [1, 10]).save(tmp_path / "other")
    (tmp_path / KEYS).write_bytes((tmp_path / "other" / KEYS).read_bytes())
    with pytest.raises(DavspError, match="make the pool anew"):
        Pool.load(tmp_path)
    with pytest.raises(DavspError, match="defend nothing"):
        AdaShieldA(pool_of([[1.0, 0.0]], [5]))
    (tmp_path / CONFIG).write_text(json.dumps(pool.config.model_dump() | {"beta": "high"}))
    with pytest.raises(DavspError, match="field 'beta'"):
        Pool.load(tmp_path)


def test_own_features_find_the_query_itself(lvlm: LVLM, tmp_path: Path) -> None:
    data = [*queries("malicious", 4), Query("w", "what is this", "benign", "t")]
    encoder = LVLMEncoder(lvlm)
    keys = encoder.encode(data)
    assert keys.shape == (5, 64) and torch.allclose(keys.norm(dim=1), torch.ones(5), atol=1e-5)
    assert (keys @ keys.T).argmax(1).tolist() == [0, 1, 2, 3, 4] and not keys[4, :32].any()
    pool = pool_of([[1.0]], [1])
    pool = Pool(
        pool.config.model_copy(
            update={"rows": pool.config.rows * 5, "encoder": encoder.describe(), "keys": keys_hash(keys), "beta": 0.99}
        ),
        keys,
    )
    defense = AdaShieldA(pool)
    with pytest.raises(DavspError, match="call check"):
        defense.prepare(data)
    answers: list[Response] = defense.respond(lvlm, data, max_new_tokens=2)
    assert [a.query_id for a in answers] == [q.id for q in data]
    assert all(q.question.startswith("prompt 0 ") for q in defense.prepare(data))
    other = pool.config.model_copy(update={"encoder": encoder.describe() | {"weights": "0"}})
    with pytest.raises(DavspError, match="features of"):
        AdaShieldA(Pool(other, keys)).check(lvlm)


def test_clip_keys(lvlm: LVLM, tiny_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = {
        **common,
        "vocab_size": len(lvlm.tokenizer),
        "max_position_embeddings": 8,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    CLIPModel(
        CLIPConfig(text_config=text, vision_config={**common, "image_size": 56, "patch_size": 14}, projection_dim=16)
    ).save_pretrained(tmp_path)
    lvlm.tokenizer.save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    encoder = ClipEncoder(str(tmp_path))
    data = [*queries("malicious", 3), Query("w", "what is this " * 9, "benign", "t")]
    keys = encoder.encode(data)
    assert keys.shape == (4, 32) and torch.allclose(keys.norm(dim=1), torch.ones(4), atol=1e-5)
    assert not keys[3, :16].any() and keys[:3, :16].abs().sum() > 0
    picture_half = encoder.model.get_image_features(
        encoder.processor([data[0].picture()], return_tensors="pt")["pixel_values"]
    ).pooler_output[0]
    assert torch.allclose(
        torch.nn.functional.normalize(keys[0, :16], dim=0),
        torch.nn.functional.normalize(picture_half, dim=0),
        atol=1e-5,
    )
    with pytest.raises(DavspError, match="cannot load CLIP"):
        ClipEncoder(str(tmp_path / "none"))


def test_scenarios_that_are_too_small_are_named(lvlm: LVLM, tmp_path: Path) -> None:
    with pytest.raises(DavspError, match="scenario 'fire' has 2 queries"):
        run(lvlm, PhraseDefender(), tmp_path, [*malicious(4), *malicious(2, "fire")])
    with pytest.raises(DavspError, match="no malicious queries"):
        run(lvlm, PhraseDefender(), tmp_path, [])
