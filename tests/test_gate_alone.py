"""A gate without a border: its thresholds in a folder of their own, by which a safety text or nothing is looked through."""

import json
from pathlib import Path
from typing import Any

import pytest

from command import run
from davsp import LVLM, DavspError, HarmfulnessVector, VisualSafetyPrompt
from davsp.attacks.surface import surfaces
from davsp.benchmarks.custom import save_queries
from davsp.cli import serve
from davsp.cli.defenses import rows
from davsp.defended import DefendedModel
from davsp.defenses import Chain, Defense, Gate, NoDefense, SafetyText, VisualPrompt, adashield_s, load_defense
from davsp.defenses.gate import calibrate
from davsp.defenses.gate.calibration import scored
from davsp.embedded.data import FITTED, calibration
from davsp.lvlm.remote import RemoteLVLM
from davsp.prompts.gate import Calibration, Served
from davsp.serve.gate import BARE, HEAD, NOTE, gate_of, note
from davsp.serve.model import model_app
from davsp.serve.settings import ServeSettings
from proxy import GOOD, client, listening, text_part, user
from test_gate import REFUSAL, SETS
from test_serve_first import COMPLIES, REFUSES, served
from test_serve_gate import ASK, IMAGE, pictures
from tiny import queries

TEXT = "please be safe"
INNER: dict[str, Defense] = {"none": NoDefense(), "text": SafetyText(TEXT)}
each_look = pytest.mark.parametrize("look", INNER)


def made(lvlm: LVLM, vector: HarmfulnessVector, look: str, fit: Any = SETS[0]) -> Calibration:
    return calibrate(lvlm, INNER[look], vector, fit, SETS[1], REFUSAL, rate=0.2, confidence=None)


def put(folder: Path, file: Calibration | Served, name: str = "gate.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(file.contents())
    return folder


# -- the file ----------------------------------------------------------------------------------------------------------


@each_look
@pytest.mark.parametrize("kind", ["states", "first"])
def test_a_gate_of_its_own_is_read_back_whole(
    lvlm: LVLM, vector: HarmfulnessVector, tmp_path: Path, look: str, kind: Any
):
    file = made(lvlm, vector, look)
    folder, some = put(tmp_path / "look", file), [*queries("malicious", 5), *queries("benign", 4)]
    wanted = Gate(INNER[look], kind, file)
    gate = load_defense(f"gate:{kind}+a={folder}")
    assert isinstance(gate, Gate) and gate.name == f"gate:{kind}+a" and gate.sha256() == wanted.sha256()
    assert gate.scores(lvlm, some) == wanted.scores(lvlm, some)
    seen = scored(lvlm, INNER[look], some, vector, REFUSAL)
    line = getattr(file, kind)
    assert wanted.scores(lvlm, some) == pytest.approx(list(seen @ [line.projection, line.refusal]), abs=1e-4)
    for given in (gate, rows([f"gate:{kind}+{folder}"], None, None, False)[f"gate:{kind}+{INNER[look].name}"]):
        assert [r.text for r in given.respond(lvlm, some, max_new_tokens=3)] == [
            r.text for r in wanted.respond(lvlm, some, max_new_tokens=3)
        ]


def test_the_score_of_first_may_be_the_refusal_alone(lvlm: LVLM, vector: HarmfulnessVector):
    alone = made(lvlm, vector, "text", None)
    assert (alone.first.projection, alone.first.refusal) == (0, 1) and alone.states == made(lvlm, vector, "text").states


def test_a_file_of_a_border_says_no_more_than_before(
    lvlm: LVLM, vector: HarmfulnessVector, border: VisualSafetyPrompt, tmp_path: Path
):
    """So the hashes of those that were made before there were gates without a border still hold."""
    file = calibrate(lvlm, VisualPrompt(border), vector, *SETS, REFUSAL, rate=0.2, confidence=None)
    assert "undefended" not in json.loads(file.contents())
    assert json.loads(made(lvlm, vector, "none").contents())["undefended"] == lvlm.undefended
    with pytest.raises(DavspError, match="measured with a border, and there is none beside it"):
        load_defense(f"gate:first+{put(tmp_path, file)}")


@pytest.fixture
def border() -> VisualSafetyPrompt:
    return VisualSafetyPrompt.create(56, 8, "random", text=TEXT).quantised()


def test_what_is_no_gate_is_named(lvlm: LVLM, vector: HarmfulnessVector, border: VisualSafetyPrompt, tmp_path: Path):
    file = made(lvlm, vector, "text")
    folder, empty = put(tmp_path / "look", file), tmp_path / "empty"
    empty.mkdir()
    for spec, why in {
        f"a={folder}": "holds a gate without a border, which is no defense by itself",
        f"gate:first+safety-text+a={folder}": "which is no defense by itself",
        f"gate:both+a={folder}": "states, first, answer",
        f"gate:first+none={folder}": "looks through safety-text, not through none; call it safety-text",
        f"gate:first+none:crop={folder}": "the name 'none:crop' may not hold : or /",
        f"gate:first+gate:first+a={folder}": "looks through a border, .* or nothing, not through gate:first\\+a; take gate:answer",
        f"gate:first+text={empty}": "nor, to stand behind gate:first\\+, gate.json or gate_served.json; give the folder",
        f"gate:first+none={empty}": "holds no gate \\(gate.json\\); make one with davsp gate .* --look none",
        "gate:first+none": "gate:first\\+none has no threshold; make one with davsp gate FOLDER --look none",
        "gate:states+safety-text=be safe": "davsp gate FOLDER --look text and give gate:states\\+safety-text=FOLDER",
    }.items():
        with pytest.raises(DavspError, match=why):
            rows([spec], None, None, False)
    with pytest.raises(DavspError, match="holds a gate without a border"):
        load_defense(folder)
    with pytest.raises(DavspError, match="holds a gate without a border; give the folder of a border"):
        VisualSafetyPrompt.from_pretrained(folder)
    for inner in (NoDefense(), SafetyText("another"), VisualPrompt(border)):
        with pytest.raises(DavspError, match="made through another border or text"):
            Gate(inner, "first", file)
    for inner in (adashield_s(), Chain([SafetyText("a"), SafetyText("b")])):
        with pytest.raises(DavspError, match="looks through a border, a safety text before the question, or nothing"):
            calibrate(lvlm, inner, vector, *SETS, REFUSAL, rate=0.2, confidence=None)
    put(folder, served(pixels="", texts=("other", " ", "")), "gate_served.json")
    with pytest.raises(DavspError, match="look through different texts"):
        load_defense(f"gate:first+{folder}")
    put(folder, served(pixels="", texts=(TEXT, " ", "")), "gate_served.json")
    gate = load_defense(f"gate:first+{folder}")
    assert isinstance(gate, Gate) and gate.calibration is not None and gate.served is not None
    facts = json.loads((folder / "gate.json").read_text())
    (folder / "gate.json").write_text(json.dumps(facts | {"texts": ["", " ", ""]}))
    with pytest.raises(DavspError, match="was changed since it was written"):
        load_defense(f"gate:first+{folder}")


def test_queries_are_shown_as_they_were(lvlm: LVLM, vector: HarmfulnessVector, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(NoDefense(), "first", made(lvlm, vector, "none"))
    with monkeypatch.context() as patched:
        patched.setattr(lvlm, "undefended", "another")
        with pytest.raises(
            DavspError, match=r"calibrated with --undefended \w+, and pictures are shown by another now"
        ):
            gate.check(lvlm)
    with monkeypatch.context() as patched:
        patched.setattr(lvlm, "template", "vicuna_v1")
        with pytest.raises(DavspError, match="whose weights are not those"):  # the template counts among them
            gate.check(lvlm)
    gate.check(lvlm)


def test_a_text_needs_no_file_where_the_answer_is_looked_at(lvlm: LVLM):
    words = "be " + "very " * 100 + "safe"  # longer than a file's name may be
    gate = load_defense(f"gate+safety-text={words}")
    assert isinstance(gate, Gate) and (gate.kind, gate.name) == ("answer", "gate+safety-text")
    assert isinstance(gate.inner, SafetyText) and gate.inner.text == words
    (same,) = rows([f"gate+safety-text={words}"], None, None, False).values()
    assert same.sha256() == gate.sha256()
    (response,) = DefendedModel(lvlm, load_defense("gate+safety-text=please")).defense.respond(
        lvlm, queries("benign", 1), max_new_tokens=3
    )
    assert response.calls in (1, 2)


@each_look
def test_an_attacker_goes_both_roads_without_a_border(lvlm: LVLM, vector: HarmfulnessVector, look: str):
    gate = Gate(INNER[look], "first", made(lvlm, vector, look))
    data = queries("malicious", 2)
    (_, surface), *_ = surfaces(lvlm, gate, data[:1], "a car")
    assert (
        surface.caught is not None
        and surface.plain is not None
        and surface.questions[0].startswith(TEXT) == (look == "text")
    )
    (score,) = gate.scores(lvlm, data[:1])
    against = float(surface.caught(surface.canvas(surface.pictures))[0])
    assert against == pytest.approx(1.02 if score > gate.line.threshold else 0, abs=1e-3)


# -- on a server -------------------------------------------------------------------------------------------------------


@each_look
def test_the_proxy_looks_without_a_border(look: str):
    """Both requests carry the picture as it came; the one that is looked at, and it alone, the text."""
    texts = (TEXT if look == "text" else "", " ", "")
    gate = Gate(INNER[look], "first", served=served(pixels="", texts=texts))
    assert gate_of(gate) is gate and note(gate) == BARE
    caller = client(gate)
    caller.upstream.answer = lambda number, body: (COMPLIES, GOOD)[number]
    assert caller.post(ASK).headers[HEAD] == "passed"
    seen, sent = caller.upstream.bodies
    assert pictures(seen) == pictures(sent) == [IMAGE.tobytes()]
    asked = [body["messages"][0]["content"][1]["text"] for body in (seen, sent)]
    assert asked == [f"{TEXT} what is this" if look == "text" else "what is this", "what is this"]
    assert caller.post(user(text_part("see ![](data:image/png;base64,AAAAAAAAAAAAAAAAAAAA)"))).status_code == 400
    caller.upstream.answer = lambda number, body: REFUSES
    assert caller.post(ASK).headers[HEAD] == "refused" and len(caller.upstream.bodies) == 3


def test_what_the_proxy_says_of_pictures(border: VisualSafetyPrompt):
    assert note(Gate(VisualPrompt(border))) == note(Gate(Chain([SafetyText("a"), VisualPrompt(border)]))) == NOTE
    assert note(Gate(SafetyText("a"))) == BARE
    with pytest.raises(DavspError, match="looks through nothing"):
        gate_of(Gate(NoDefense()))


def test_davsp_serve_without_a_border(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    apps: list[Any] = []
    monkeypatch.setattr(serve, "_run", lambda *args: apps.append(args))
    put(tmp_path / "look", served(pixels="", texts=(TEXT, " ", "")), "gate_served.json")
    command = ["serve", "--upstream", "http://127.0.0.1:9/v1", "--no-probe", "--defense"]
    assert run(*command, f"gate:first+text={tmp_path / 'look'}") == 0 and len(apps) == 1
    said = capsys.readouterr().err
    assert "every request goes upstream with its pictures undefended, by design" in " ".join(said.split())
    assert "gate:first+text, " in said
    assert run(*command, f"gate:states+text={tmp_path / 'look'}") == 2
    assert "no threshold yet" in capsys.readouterr().err and len(apps) == 1


def test_a_threshold_through_a_server(lvlm: LVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """davsp gate through the server, and davsp eval's answers there; the picture's way to the model is the server's."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    held: list[str | Path] = []
    for name, part in (("held-malicious", queries("malicious", 4)), ("held-benign", queries("benign", 8))):
        save_queries(tmp_path / name, part)
        held += [f"--{name}", tmp_path / name]
    out = tmp_path / "look"
    with listening(model_app(lvlm, "m", ServeSettings.of(upstream=""))) as url:
        server = ["--engine", "openai", "--base-url", url, "--api-model", "m"]
        command = ["gate", out, *server, *held, "--look", "text", "--text", "be good", "--refusal", "what no"]
        assert run(*command, "--false-refusals", "0.4", "--confidence", "0", "--score", "refusal") == 2
        assert "go with a model loaded here" in capsys.readouterr().err and not out.exists()
        assert run(*command, "--false-refusals", "0.4", "--confidence", "0") == 0
        file = Served.read(out / "gate_served.json", None)
        assert file.texts == ("be good", " ", "") and file.pixels == ""
        gate = load_defense(f"gate:first+text={out}")
        some = queries("benign", 8)
        responses = gate.respond(RemoteLVLM("m", url), some, max_new_tokens=4)
        refused = sum(r.text == "what no" for r in responses)
        assert refused == file.first.refused_benign and {r.calls for r in responses} <= {1, 2}
    with pytest.raises(DavspError, match="calibrated on a server, not on a model loaded here"):
        gate.check(lvlm)


# -- queries that are drawn --------------------------------------------------------------------------------------------


def test_more_queries_are_those_and_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("davsp.embedded.data.FITTED", 5)
    few, many = calibration(0, 12), calibration(0, 30)
    assert [len(part) for part in few] == [5, 5, 12, 12] and [len(part) for part in many] == [5, 5, 30, 30]
    for a, b in zip(few, many, strict=True):
        assert [(q.id, q.question) for q in a] == [(q.id, q.question) for q in b][: len(a)]
        assert all(
            x.image.tobytes() == y.image.tobytes()  # type: ignore[union-attr]
            for x, y in zip(a, b, strict=False)
        )
    good = many[3]
    assert len({(q.question, q.image.tobytes()) for q in good}) == len(good)  # type: ignore[union-attr]
    assert FITTED == 300


# -- the command -------------------------------------------------------------------------------------------------------


def test_davsp_gate_without_a_border(
    tiny_folder: Path, vector: HarmfulnessVector, border: VisualSafetyPrompt, tmp_path: Path, capsys: Any
):
    out, model = tmp_path / "out" / "look", ["--model", tiny_folder, "--device", "cpu"]
    vector.save(tmp_path / "vector")
    sets: list[str | Path] = []
    for name, part in zip(("malicious", "benign", "held-malicious", "held-benign"), (*SETS[0], *SETS[1]), strict=True):
        save_queries(tmp_path / name, part)
        sets += [f"--{name}", tmp_path / name]
    loose = ["--false-refusals", "0.2", "--confidence", "0", "--refusal", REFUSAL, "--vector", tmp_path / "vector"]
    command = ["gate", out, *model, *loose]
    border.save_pretrained(tmp_path / "border")
    for wrong, why in (
        ([*command, *sets], "there is no folder"),
        (
            ["gate", tmp_path / "vector", *model, *loose, *sets],
            "holds no border (vsp_config.json is not there); give the folder of one, or --look none or text",
        ),
        ([*command, *sets, "--look", "border"], "choose none or text"),
        ([*command, *sets, "--text", TEXT], "--text goes with --look text"),
        ([*command, *sets, "--look", "text"], "--look text needs a text for this model"),
        ([*command, *sets, "--look", "none", "--score", "projection"], "choose both or refusal"),
        ([*command, *sets, "--look", "none", "--score", "refusal"], "--malicious and --benign weigh the two scores"),
        ([*command, *sets, "--look", "none", "--refusal", "  "], "--refusal is blank"),
        (["gate", tmp_path / "malicious" / "queries.jsonl", *model, *loose, *sets, "--look", "none"], "is no folder"),
        ([*command, *sets, "--look", "none", "--draw", "900"], "--draw is for queries that are drawn"),
        (
            ["gate", tmp_path / "border", *model, *loose, *sets, "--look", "none"],
            "holds another defense (vsp_config.json)",
        ),
    ):
        assert run(*wrong) == 2 and why in " ".join(capsys.readouterr().err.split()), why
    assert not out.exists()
    assert run(*command, *sets, "--look", "text", "--text", TEXT) == 0
    assert f"gate:first+safety-text={out}`" in "".join(capsys.readouterr().out.split())
    assert [file.name for file in out.iterdir()] == ["gate.json"]
    assert (
        run(*command, *sets, "--look", "none") == 2 and "looks through another text or none" in capsys.readouterr().err
    )
    assert (
        run(*command, *sets[4:], "--look", "text", "--text", TEXT, "--score", "refusal") == 0
    )  # anew, by another score
    assert Calibration.read(out / "gate.json", None).first.projection == 0
    assert run("info", out) == 0 and f"looks through the text '{TEXT}'" in capsys.readouterr().out
    asked = ["--defense", f"gate:first+text={out}", "--defense", f"gate:states+{out}", "--defense", "none"]
    asked += ["--max-new-tokens", "4", "--max-unscored", "1", "--out", tmp_path / "run"]
    assert run("eval", *model, "--queries", sets[1], *asked) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert {row["defense"] for row in found} == {"none", "gate:first+text", "gate:states+safety-text"}
