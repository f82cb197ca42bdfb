"""A judge that sees the picture: what it is sent, what is kept by the picture, and what happens where it does not see."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from PIL import Image, ImageOps

from command import run as davsp
from davsp import LVLM, DavspError, Query, Response
from davsp.attacks import AttackSettings, attack
from davsp.benchmarks.custom import load_queries, save_queries
from davsp.benchmarks.rsr import check_mode
from davsp.cli.judges import judge_settings
from davsp.cli.options import JudgeOptions, RequestOptions
from davsp.defenses import VisualPrompt
from davsp.experiments.paper.run import Kit, _notes
from davsp.judges.base import check_unscored
from davsp.judges.cache import VerdictCache, cache_key
from davsp.judges.chat import ChatJudge
from davsp.judges.graders import GRADERS
from davsp.judges.guard import GUARDS, LocalGuard
from davsp.judges.prompts import CHAT, DAVSP
from davsp.judges.seeing import drawn, note, number, seeing
from davsp.prompts import VisualSafetyPrompt
from davsp.runtime.replies import one_line
from judge_server import Judge, faulty, items, judge_server, picture_in, truth
from test_rescore import write_run
from tiny import picture, queries

FIXED, N = "4711", 4


@pytest.fixture
def data(tmp_path: Path) -> Path:
    bad = [replace(q, group=q.id) for q in queries("malicious", N)]
    save_queries(tmp_path / "test", [*bad, *queries("benign", 2)])
    return tmp_path / "test"


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    """A finished run over four malicious queries and two benign ones under two defenses."""
    texts = {
        name: [f"item {10 * i + n}: a kite" for n in range(N)] + ["red"] * 2 for i, name in enumerate(["none", "davsp"])
    }
    return write_run(tmp_path / "run", load_queries(data), texts)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    """A judge that reads the number in a picture if the pixels arrive as they were drawn."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("davsp.judges.chat.number", lambda: FIXED)
    with judge_server() as running:
        running.sight = lambda shown: FIXED if shown and shown.tobytes() == drawn(FIXED).tobytes() else "none"
        yield running


def judge(server: Judge, cache: Path | None = None, prompt: Any = None, **options: Any) -> ChatJudge:
    quick = {"backoff": 0.01, "timeout": 20.0, "concurrency": 4, "attempts": 6}
    kept = VerdictCache(cache) if cache else None
    return ChatJudge(prompt or seeing(DAVSP), "m", server.url, cache=kept, **(quick | options))


def pictured(count: int, seed: int = 0) -> list[tuple[Query, Response]]:
    """Harmless answers to queries with a picture each."""
    return [(replace(q, image=picture(100 * seed + i)), r) for i, (q, r) in enumerate(items(count))]


def labels(found: Any) -> list[str]:
    return [verdict.label for verdict in found]


# ------------------------------------------------------------------------------------------------ what is sent


@pytest.mark.parametrize("name", ["davsp", "davsp-mmsafety", "mm-safetybench", "adashield"])
def test_the_request_stands_before_the_published_prompt(name: str, server: Judge) -> None:
    """Picture, then our words with the question, then the prompt letter by letter; a system turn stays as it is."""
    ((query, response),) = pictured(1)
    query = replace(query, category="04-Physical_Harm")
    judge(server, prompt=seeing(CHAT[name])).judge_all([(query, response)])
    *others, last = server.bodies[0]["messages"]
    *published, asked = CHAT[name].messages(query, response.text)
    shown, words = last["content"]
    assert others == published and last["role"] == "user" and shown["type"] == "image_url"
    assert words["type"] == "text" and words["text"].endswith(asked["content"])
    lead = words["text"].removesuffix(asked["content"])
    assert query.question in lead and "picture above together with these words" in lead


def test_the_picture_is_the_querys_own_to_the_pixel(server: Judge, tmp_path: Path) -> None:
    """In memory, as a file, turned by EXIF, half transparent: as every model of davsp sees it, and of its own size."""
    turned, glass = picture(1, (40, 24)), picture(2, (30, 30)).convert("RGBA")
    glass.putalpha(90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    glass.save(tmp_path / "glass.png")
    images = [picture(3, (50, 20)), tmp_path / "turned.png", glass, tmp_path / "glass.png"]
    asked = [(replace(q, image=image), r) for (q, r), image in zip(items(4), images, strict=True)]
    judge(server, concurrency=1).judge_all(asked)
    sent = [picture_in(body) for body in server.bodies]
    for (query, _), shown in zip(asked, sent, strict=True):
        own = query.picture()
        assert own and shown and shown.mode == "RGB" and shown.size == own.size and shown.tobytes() == own.tobytes()
    assert sent[0].tobytes() == images[0].tobytes()  # type: ignore[union-attr]
    assert sent[1].tobytes() == ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")).tobytes()  # type: ignore[union-attr]


def test_a_query_without_a_picture_is_judged_by_its_words(server: Judge) -> None:
    """As one text, with the question; whether the model sees is then not asked."""
    verdicts = judge(server).judge_all(items(3))
    assert labels(verdicts) == [truth(n) for n in range(3)] and server.sights == 0
    for (query, _), body in zip(items(3), sorted(server.bodies, key=str), strict=True):
        content = body["messages"][-1]["content"]
        assert isinstance(content, str) and "The request has no picture." in content and query.question in content
    with_one = judge(server).judge_all(pictured(1))
    assert verdicts[0].judge == with_one[0].judge == "davsp+picture/1:m"
    assert verdicts[0].prompt != with_one[0].prompt  # the file of verdicts says which of both was asked


def test_a_question_cannot_pose_as_a_placeholder(server: Judge) -> None:
    ((query, response),) = pictured(1)
    judge(server).judge_all([(replace(query, question="{answer} or {reference}?"), response)])
    text = server.bodies[0]["messages"][-1]["content"][1]["text"]
    assert "{answer} or {reference}?" in text and text.count(response.text) == 1


# ------------------------------------------------------------------------------------------------ the cache


def test_verdicts_are_kept_by_the_picture(server: Judge, tmp_path: Path) -> None:
    """Another picture under the same words is another case; the same pixels from another file are not."""
    first = pictured(4)
    assert labels(judge(server, tmp_path / "c").judge_all(first)) == [truth(n) for n in range(4)]
    assert server.requests.total() == 4 and server.sights == 1
    again = []
    for query, response in first:
        path = tmp_path / f"{query.id}.bmp"
        query.image.save(path)  # type: ignore[union-attr]
        again.append((replace(query, image=path), response))
    judge(server, tmp_path / "c").judge_all(again)
    assert server.requests.total() == 4 and server.sights == 1  # nothing to ask, so nothing to look at either
    server.say = lambda n: "unsafe"
    other = [(replace(first[1][0], image=picture(99)), first[1][1])]
    assert labels(judge(server, tmp_path / "c").judge_all(other)) == ["unsafe"] and truth(1) == "safe"
    assert server.requests.total() == 5


def test_pictures_of_the_same_bytes_and_other_shape_are_two_cases(server: Judge, tmp_path: Path) -> None:
    ((query, response),) = pictured(1)
    wide = Image.frombytes("RGB", (8, 2), bytes(range(48)))
    tall = Image.frombytes("RGB", (2, 8), bytes(range(48)))
    judge(server, tmp_path / "c").judge_all([(replace(query, image=image), response) for image in (wide, tall, wide)])
    assert server.requests.total() == 2


def test_a_judge_of_text_and_one_that_sees_share_no_verdict(server: Judge, tmp_path: Path) -> None:
    """Nor does one without a picture: it was told that there is none."""
    pairs = pictured(2)
    judge(server, tmp_path / "c", prompt=DAVSP).judge_all(pairs)
    judge(server, tmp_path / "c").judge_all(pairs)
    judge(server, tmp_path / "c").judge_all([(replace(q, image=None), r) for q, r in pairs])
    judge(server, tmp_path / "c", prompt=DAVSP).judge_all(pairs)
    assert server.requests.total() == 6


def test_keys_of_text_judges_are_those_of_before() -> None:
    """A cache of an earlier version is not asked anew."""
    facts: dict[str, Any] = {
        "response": "r", "sees": "[]", "judge": "davsp/1", "prompt": "p", "model": "m", "where": "w", "temperature": 0.0
    }  # fmt: skip
    assert cache_key(**facts) == "5739a52d193706f2dae29bc8f20b350da1452c66c7e5866a07722d397b16010d"
    assert cache_key(**facts, picture="0f") != cache_key(**facts)


# ------------------------------------------------------------------------------------------------ where it fails


def test_a_picture_that_is_gone_is_unscored_and_asked_for_once_it_is_back(server: Judge, tmp_path: Path) -> None:
    pairs = [(replace(q, image=tmp_path / f"{q.id}.png"), r) for q, r in pictured(3)]
    for i in (0, 2):
        picture(i).save(tmp_path / f"q{i}.png")
    verdicts = judge(server, tmp_path / "c").judge_all(pairs)
    assert labels(verdicts) == [truth(0), "unscored", truth(2)] and set(server.requests) == {0, 2}
    assert "the judge cannot be shown the picture" in verdicts[1].reason and "q1.png" in verdicts[1].reason
    with pytest.raises(DavspError, match=r"1 of 3 answers .* unscored by davsp\+picture/1:m"):
        check_unscored(verdicts)
    (tmp_path / "q1.png").write_bytes(b"no picture")
    assert labels(judge(server, tmp_path / "c").judge_all(pairs))[1] == "unscored"
    picture(1).save(tmp_path / "q1.png")
    assert labels(judge(server, tmp_path / "c").judge_all(pairs)) == [truth(n) for n in range(3)]
    assert server.requests.total() == 3


def test_faults_leave_answers_unscored_and_nothing_is_made_up(server: Judge, tmp_path: Path) -> None:
    server.fault = lambda n, attempt: "prose" if n == 5 else faulty(0.3)(n, attempt)
    verdicts = judge(server, tmp_path / "c", concurrency=8).judge_all(pictured(60))
    assert labels(verdicts) == [truth(n) if n != 5 else "unscored" for n in range(60)]
    assert all(picture_in(body) for body in server.bodies)  # each further attempt shows it, too
    answers = [Response("q", "none", " ..."), Response("q", "none", "", cut=True)]
    before = server.requests.total()
    assert labels(judge(server).judge_all([(pictured(1)[0][0], a) for a in answers])) == ["unscored"] * 2
    assert server.requests.total() == before


def test_a_server_that_refuses_pictures_ends_the_run_in_its_own_words(server: Judge, tmp_path: Path) -> None:
    server.no_pictures = "m is not a multimodal model"
    with pytest.raises(
        DavspError, match=r"the judge m at http\S+ does not show that it sees pictures \(.*400.*: m is not"
    ) as no:
        judge(server, tmp_path / "c").judge_all(pictured(50))
    assert one_line(str(no.value), 1000) == str(no.value) and server.requests.total() == 0


@pytest.mark.parametrize("says", ["I see no picture.", "1234", "4711 or 4712", "safe", "unsafe"])
def test_a_server_that_drops_pictures_in_silence_judges_nothing(says: str, server: Judge, tmp_path: Path) -> None:
    """It would say safe or unsafe of what it never saw."""
    server.sight = lambda shown: says
    with pytest.raises(DavspError, match="sees pictures") as no:
        judge(server, tmp_path / "c", attempts=2).judge_all(pictured(5))
    assert f"it said {says!r}" in str(no.value) and server.requests.total() == 0 and server.sights == 2


def test_the_number_is_asked_for_once_and_may_stand_in_a_sentence(server: Judge) -> None:
    server.sight = lambda shown: f"The number is {FIXED}."
    one = judge(server)
    one.judge_all(pictured(3))
    one.judge_all(pictured(3, seed=1))
    assert server.sights == 1 and server.requests.total() == 6


def test_numbers_differ_and_so_do_their_pictures() -> None:
    drawn_by_chance = {number() for _ in range(50)}
    assert len(drawn_by_chance) > 25 and all(len(digits) == 4 and digits.isdecimal() for digits in drawn_by_chance)
    pictures = {drawn(digits).tobytes() for digits in ("1234", "1235", "2234")}
    assert len(pictures) == 3
    box = ImageOps.invert(drawn("8888").convert("L")).getbbox()
    assert box and box[0] > 20 and box[2] < 316 and box[3] - box[1] > 60  # large, and not cut


# ------------------------------------------------------------------------------------------------ who can see


@pytest.mark.parametrize("prompt", [*GUARDS.values(), *GRADERS.values(), seeing(DAVSP)], ids=lambda p: p.name)
def test_prompts_that_show_no_picture(prompt: Any) -> None:
    with pytest.raises(DavspError, match="cannot be shown a picture"):
        seeing(prompt).hash(Query("q", "?", "malicious", "t"))


def test_a_judge_that_runs_here_sees_none(tmp_path: Path) -> None:
    with pytest.raises(DavspError, match="which a judge that runs here cannot see"):
        LocalGuard(seeing(DAVSP), str(tmp_path))


def test_a_mode_of_a_published_script_does_not_go_with_it() -> None:
    check_mode("davsp_official", "davsp/1:m")
    with pytest.raises(DavspError, match=r"reads the replies of davsp or davsp-mmsafety, not of davsp\+picture/1:m"):
        check_mode("davsp_official", "davsp+picture/1:m")


def sees(names: list[str], *values: str) -> dict[str, str]:
    options = JudgeOptions(judge_sees=list(values) or None)
    return dict(judge_settings(names, options, RequestOptions(), Path("c"), None).sees)


def test_which_judges_of_a_command_see() -> None:
    assert sees(["davsp"]) == {} and sees(["davsp", "adashield"], "picture") == {
        "davsp": "picture",
        "adashield": "picture",
    }
    assert sees(["keyword", "davsp", "mm-vet"], "davsp=picture") == {"davsp": "picture"}


@pytest.mark.parametrize(("names", "value", "says"), [
    ([], "picture", "--judge-sees picture: keyword sees no picture, davsp, .*adashield can"),
    (["keyword"], "picture", "keyword sees no picture"),
    (["keyword-gcg"], "keyword-gcg=picture", "keyword-gcg sees no picture"),
    (["harmbench"], "picture", "harmbench sees no picture"),
    (["llama-guard-4"], "llama-guard-4=picture", "llama-guard-4 sees no picture"),
    (["davsp", "mm-vet"], "picture", "mm-vet sees no picture, .*; of several judges give NAME=picture for those"),
    (["davsp"], "adashield=picture", r"'adashield=picture' is not picture, or NAME=picture with a NAME of the judges here \(davsp\)"),
    (["davsp"], "video", "'video' is not picture"),
    (["davsp"], "", "'' is not picture"),
])  # fmt: skip
def test_options_that_do_not_fit(names: list[str], value: str, says: str) -> None:
    with pytest.raises(DavspError, match=says):
        sees(names, value)


def test_the_note_below_a_table(server: Judge) -> None:
    asked = [q for q, _ in pictured(3)]
    benign = Query("b", "what is this?", "benign", "t")
    one = judge(server)
    assert note(one, [*asked, benign]).endswith(
        "saw each malicious query's own picture, without any defense, and its words."
    )
    assert "; 1 of 3 have none and were judged by their words." in note(
        one, [*asked[1:], replace(asked[0], image=None)]
    )
    assert note(judge(server, prompt=DAVSP), asked) == note(len, asked) == note(one, [benign]) == ""


def test_the_papers_tables_have_the_note(lvlm: LVLM, server: Judge) -> None:
    asked = [q for q, _ in pictured(2)]
    data = SimpleNamespace(test=asked, train_malicious=[], train_benign=[])
    kit = Mock(spec=Kit, data=data, published=False, lvlm=lvlm, shipped=True)
    one = judge(server)
    assert note(one, asked) in _notes(kit, one, [], {})
    assert not any("picture, without any defense" in line for line in _notes(kit, judge(server, prompt=DAVSP), [], {}))


# ------------------------------------------------------------------------------------------------ from the command line


def test_a_run_is_judged_again_by_a_judge_that_sees(folder: Path, data: Path, server: Judge, capsys: Any) -> None:
    """The verdicts of both stand beside each other, and neither asks for what it knows."""
    text = ("judge", folder, "--judge", "davsp", "--queries", data, "--base-url", server.url, "--judge-model", "m")
    assert davsp(*text) == 0
    before = (folder / "verdicts-davsp-1-m.jsonl").read_bytes()
    server.say = lambda n: "safe"
    assert davsp(*text, "--judge-sees", "picture") == 0
    assert "davsp+picture/1:m saw each malicious query's own picture" in capsys.readouterr().out
    assert (folder / "verdicts-davsp-1-m.jsonl").read_bytes() == before
    seen = [json.loads(line) for line in (folder / "verdicts-davsp+picture-1-m.jsonl").read_text().splitlines()]
    assert (
        len(seen) == 2 * N
        and {v["label"] for v in seen} == {"safe"}
        and {v["judge"] for v in seen} == {"davsp+picture/1:m"}
    )
    assert json.loads((folder / "metrics-davsp+picture-1-m.json").read_text())["judge"] == "davsp+picture/1:m"
    assert json.loads((folder / "agreement.json").read_text())["judges"] == [
        "keyword/1",
        "davsp+picture/1:m",
        "davsp/1:m",
    ]
    asked = server.requests.total()
    assert davsp(*text) == davsp(*text, "--judge-sees", "picture") == 0 and server.requests.total() == asked == 4 * N
    assert (folder / "verdicts-davsp-1-m.jsonl").read_bytes() == before


def test_a_run_whose_pictures_are_gone_or_others_is_refused(
    folder: Path, data: Path, server: Judge, capsys: Any
) -> None:
    command = (
        "judge", folder, "--judge", "davsp", "--queries", data, "--base-url", server.url, "--judge-model", "m",
        "--judge-sees", "picture",
    )  # fmt: skip
    image = next(q.image for q in load_queries(data) if q.label == "malicious")
    assert isinstance(image, Path)
    kept = image.read_bytes()
    picture(77).save(image)
    assert davsp(*command) == 2 and "answers another query 'malicious-0'" in capsys.readouterr().err
    image.unlink()
    assert davsp(*command) == 2 and image.name in capsys.readouterr().err
    assert not server.bodies and not list(folder.glob("*picture*"))
    image.write_bytes(kept)
    assert davsp(*command) == 0


def test_eval_says_in_its_manifest_and_below_its_table_who_saw(
    data: Path,
    tiny_folder: Path,
    server: Judge,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And shows the benchmark's picture, though the model saw it in a border."""
    said = [("item 1: a kite", "stop")]
    monkeypatch.setattr("davsp.LVLM.completions", lambda self, canvas, questions, *_, **__: said * len(questions))
    VisualSafetyPrompt.create(56, 8, "random", 0, "please be safe").save_pretrained(tmp_path / "border")
    out = tmp_path / "out"
    command = (
        "eval", "--queries", data, "--model", tiny_folder, "--out", out, "--defense", f"davsp={tmp_path / 'border'}",
        "--judge", "davsp", "--judge-model", "m", "--judge-url", server.url,
    )  # fmt: skip
    assert davsp(*command, "--judge-sees", "picture") == 0
    assert "davsp+picture/1:m saw each malicious query's own picture" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["judge_sees"] == {"davsp": "picture"}
    assert "own picture, without any defense" in (out / "report.html").read_text()
    own = {q.picture().tobytes() for q in load_queries(data) if q.label == "malicious"}  # type: ignore[union-attr]
    assert {picture_in(body).tobytes() for body in server.bodies} == own  # type: ignore[union-attr]
    assert davsp(*command) == 0  # the answers stay, the verdicts are the other judge's
    assert {json.loads(line)["judge"] for line in (out / "verdicts.jsonl").read_text().splitlines()} == {"davsp/1:m"}
    assert json.loads((out / "manifest.json").read_text())["judge_sees"] == {}


@pytest.mark.parametrize("name", ["keyword", "harmbench"])
def test_a_command_with_a_judge_that_cannot_see_writes_nothing(name: str, tmp_path: Path, capsys: Any) -> None:
    assert davsp("eval", "--judge", name, "--judge-sees", "picture", "--out", tmp_path / "out") == 2
    assert f"{name} sees no picture" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_attack_does_not_reach_the_judge(
    lvlm: LVLM, server: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is shown the picture and the words of the benchmark, not those that were searched against the model."""
    said = [("item 1: a kite", "stop")]
    monkeypatch.setattr("davsp.LVLM.completions", lambda self, canvas, questions, *_, **__: said * len(questions))
    asked = queries("malicious", 2)
    settings = AttackSettings(
        attacks=("comply", "redraw", "suffix"), eps=(16,), steps=2, batch_size=2, target="a car", words=2, word_steps=1,
        word_candidates=2,
    )  # fmt: skip
    border = VisualPrompt(VisualSafetyPrompt.create(56, 8, "random", 0, "please be safe"))
    results = attack(lvlm, {"davsp": border}, asked, tmp_path, settings, judge=judge(server), max_new_tokens=2)
    changed = [q for result in results for q in result.queries if q.image is not None and result.attack != "clean"]
    own = {q.picture().tobytes() for q in asked}  # type: ignore[union-attr]
    assert changed and any(q.picture().tobytes() not in own for q in changed)  # type: ignore[union-attr]
    assert {picture_in(body).tobytes() for body in server.bodies} == own  # type: ignore[union-attr]
    texts = [body["messages"][-1]["content"][1]["text"] for body in server.bodies]
    assert all(any(f":\n{q.question}\n\n" in text for q in asked) for text in texts)
    assert all(v.label == truth(1) for result in results for v in result.evaluation.verdicts["davsp"])
