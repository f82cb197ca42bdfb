"""A run of attacks: its bounds and rates, how it goes on after a cut, and what it refuses."""

import io
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from attacked import QUICK, TARGET, border, others
from davsp import LVLM, HarmfulnessVector
from davsp.attacks import AttackSettings, attack
from davsp.attacks.checks import checks
from davsp.attacks.deeds import wanted
from davsp.attacks.page import markdown, words_sentence
from davsp.attacks.possible import check_room
from davsp.attacks.redraw import REDRAWS
from davsp.attacks.run import slug
from davsp.attacks.settings import CLEAN
from davsp.attacks.surface import files, surfaces
from davsp.attacks.table import ALL, rows
from davsp.defenses import NoDefense, VisualPrompt
from davsp.errors import DavspError
from davsp.prompts import VisualSafetyPrompt
from davsp.query import Query
from tiny import picture, queries


def told(count: int) -> list[Query]:
    """Queries that say in words what they ask for."""
    return [replace(q, context="steal a car") for q in queries("malicious", count)]


def test_a_run_keeps_the_bounds_and_beats_noise(lvlm: LVLM, vector: HarmfulnessVector, tmp_path: Path) -> None:
    data = [*told(4), *queries("benign", 2)]
    defenses = {"none": NoDefense(), "davsp": border()}
    settings = AttackSettings(eps=(8, 255), **QUICK | {"target": "a car :"})
    results = attack(lvlm, defenses, data, tmp_path, settings, vector, training=others(5), max_new_tokens=4)
    by = {(a.defense, a.attack, a.eps): a for a in results}
    clean = torch.cat([s.pictures for _, s in surfaces(lvlm, border(), data[:4], TARGET)])
    for kind in ("noise", "comply", "deed", "hide", "both", "universal", "square"):
        sent = by["davsp", kind, 8].queries
        levels = [torch.tensor(list(q.picture().tobytes())) for q in sent if q.picture() is not None]  # type: ignore[union-attr]
        base = [torch.tensor(list(image.tobytes())) for image in files(clean)]
        apart = torch.stack([(a.int() - b.int()).abs().max() for a, b in zip(levels, base, strict=True)])
        assert 0 < int(apart.max()) <= 8, kind
        assert {q.picture().size for q in sent if q.picture() is not None} == {(40, 40)}  # type: ignore[union-attr]
    assert ("none", "transfer", 8) not in by
    for eps in (8, 255):
        sent, source = by["davsp", "transfer", eps].queries, by["none", "comply", eps].queries
        assert [q.image for q in sent] == [q.image for q in source]  # the very files
    ends = {kind: sum(r["curve"][-1] for r in by["davsp", kind, 255].records) for kind in ("noise", "comply")}
    assert ends["comply"] < ends["noise"]
    assert all(
        r["curve"] == sorted(r["curve"], reverse=True) for a in results for r in a.records if a.attack != "universal"
    )
    assert {q.label for q in by["davsp", CLEAN, None].queries} == {"malicious", "benign"}
    assert {q.label for q in by["davsp", "comply", 8].queries} == {"malicious"}

    table = rows("tiny", results, data)
    words = by["davsp", "suffix", None].queries
    assert all(w.question.startswith(f"{q.question} ") for w, q in zip(words, data[:4], strict=True))
    assert [w.image for w in words] == [q.image for q in data[:4]]
    assert [q.question for q in by["davsp", "joint", 8].queries] == [w.question for w in words]
    rates = {(r["attack"], r["eps"]): r["value"] for r in table if r["defense"] == "davsp" and r["benchmark"] == ALL and r["metric"] == "rsr"}  # fmt: skip
    assert rates["worst", 255] <= rates["worst", 8] <= rates["worst", 0] <= rates[CLEAN, None]
    assert rates["worst", 8] <= min(
        rates[kind, 8] for kind in ("noise", "transfer", "comply", "deed", "hide", "both", "universal", "square")
    )
    paired = [r for r in table if r["metric"] == "rsr_difference" and r["defense"] == "davsp"]
    assert {r["attack"] for r in paired} == {a.attack for a in results} - {"transfer"} | {"worst", "any"}
    marks = checks(results, defenses, {name: (True, True) for name in defenses})
    by_chance = [by[name, "random-words", None].queries for name in defenses]
    assert by_chance[0] == by_chance[1] and all(
        w.question.startswith(f"{q.question} ") for w, q in zip(by_chance[0], data, strict=True)
    )
    assert {r["attack"] for r in table if r["metric"] == "accuracy"} == {CLEAN, "random-words"}
    (accuracy,) = [
        r["value"] for r in table
        if (r["defense"], r["attack"], r["metric"], r["benchmark"]) == ("none", "random-words", "accuracy", ALL)
    ]  # fmt: skip
    assert f"No Defense {100 * accuracy:.1f} [" in words_sentence(table, results)
    assert (
        words_sentence(table, results) in markdown(table, results, marks, "tiny") and words_sentence([], results) == ""
    )
    assert len(marks) == 16 and {m.state for m in marks} <= {"good", "doubt"}


def test_a_run_that_was_cut_off_ends_the_same(lvlm: LVLM, tmp_path: Path) -> None:
    settings = AttackSettings(attacks=("comply",), eps=(16,), restarts=2, **QUICK)
    data, defenses = queries("malicious", 5), {"davsp": border()}
    whole, again = tmp_path / "whole", tmp_path / "again"
    for out in (whole, again):
        attack(lvlm, defenses, data, out, settings, max_new_tokens=4)
    records = again / "davsp" / "comply-16" / "found.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:3]) + lines[3][:20])  # the second batch was under way
    (records.parent / "pictures" / "00003.png").unlink()
    (records.parent / "pictures" / ".00004.png.x.tmp").write_text("half")
    results = attack(lvlm, defenses, data, again, settings, max_new_tokens=4)
    assert records.read_text() == (whole / "davsp" / "comply-16" / "found.jsonl").read_text()
    assert sorted(p.name for p in (records.parent / "pictures").iterdir()) == [f"0000{i}.png" for i in range(5)]
    assert results[-1].attack == "comply" and len(results[-1].queries) == 5
    more = settings.model_copy(update={"eps": (4, 16), "attacks": ("comply", "redraw")})
    assert len(attack(lvlm, defenses, data, again, more, max_new_tokens=4)) == 3 + len(REDRAWS)  # a run may grow

    records.write_text("".join(lines[:1]))  # a batch that was cut in two
    attack(lvlm, defenses, data, again, settings, max_new_tokens=4)
    assert records.read_text() == "".join(lines)

    for change in ({"steps": 7}, {"target": "red"}):
        with pytest.raises(
            DavspError, match=rf"comply-16/attack\.json is of a run with other settings \({next(iter(change))}\)"
        ):
            attack(lvlm, defenses, data, again, settings.model_copy(update=change), max_new_tokens=4)
    with pytest.raises(DavspError, match=r"again/attack\.json is of a run with other settings \(queries\)"):
        attack(lvlm, defenses, data[:4], again, settings, max_new_tokens=4)
    with pytest.raises(DavspError, match=r"davsp/defense\.json is of a run with other settings \(defense\)"):
        attack(lvlm, {"davsp": border("red")}, data, again, settings, max_new_tokens=4)
    records.write_text("".join(lines[:4]) + lines[4].replace("sha256", "sha"))
    with pytest.raises(DavspError, match=r"found\.jsonl is damaged"):
        attack(lvlm, defenses, data, again, settings, max_new_tokens=4)
    records.write_text("".join(lines))
    spoilt = {
        "is not the picture that was found": lambda path: picture(1, (40, 40)).save(path), "is missing": Path.unlink,
    }  # fmt: skip
    for why, spoil in spoilt.items():
        spoil(records.parent / "pictures" / "00000.png")
        with pytest.raises(DavspError, match=rf"00000\.png {why}; delete .*comply-16"):
            attack(lvlm, defenses, data, again, settings, max_new_tokens=4)


def test_settings_that_decide_nothing_may_change(lvlm: LVLM, vector: HarmfulnessVector, tmp_path: Path) -> None:
    data, defenses = queries("malicious", 2), {"davsp": border()}
    first = AttackSettings(attacks=("comply",), eps=(16,), **QUICK)
    attack(lvlm, defenses, data, tmp_path, first, max_new_tokens=4)
    more = first.model_copy(update={"attacks": ("comply", "hide"), "tries": 9, "words": 4})
    attack(lvlm, defenses, data, tmp_path, more, vector, max_new_tokens=4)  # the vector comes later
    wider = replace(vector, malicious=vector.malicious * 2)
    with pytest.raises(DavspError, match=r"hide-16/attack\.json is of .* \(vector\)"):
        attack(lvlm, defenses, data, tmp_path, more, wider, max_new_tokens=4)
    (tmp_path / "davsp" / "hide-16" / "attack.json").unlink()
    with pytest.raises(DavspError, match=r"attack\.json"):
        attack(lvlm, defenses, data, tmp_path, more, vector, max_new_tokens=4)


def test_more_starts_are_never_worse(lvlm: LVLM, tmp_path: Path) -> None:
    data, ends = queries("malicious", 3), []
    for restarts in (1, 3):
        settings = AttackSettings(attacks=("comply",), eps=(4,), restarts=restarts, **QUICK)
        results = attack(lvlm, {"davsp": border()}, data, tmp_path / str(restarts), settings, max_new_tokens=4)
        ends.append([r["curve"][-1] for r in results[-1].records])
    assert all(after <= before for before, after in zip(*ends, strict=True)) and ends[0] != ends[1]


@pytest.mark.parametrize(
    ("defenses", "attacks", "says"),
    [
        ({"davsp": border()}, ("transfer",), "'transfer' needs the defense 'none'"),
        ({"none": NoDefense()}, ("joint",), "'joint' goes on from the words of 'suffix'"),
        ({"none": NoDefense()}, ("hide",), "'hide' needs the defender's vector"),
        ({"none": NoDefense()}, ("deed",), "query malicious-0 has no context"),
        ({"none": NoDefense()}, ("universal",), "'universal' needs pictures to be trained on"),
        ({"a b": NoDefense(), "a_b": NoDefense()}, ("comply",), "differ in punctuation"),
        ({"davsp": VisualPrompt(VisualSafetyPrompt.create(112, 8))}, ("comply",), "canvas"),
    ],
)
def test_what_can_not_be_run(lvlm: LVLM, tmp_path: Path, defenses: Any, attacks: Any, says: str) -> None:
    with pytest.raises(DavspError, match=says):
        attack(lvlm, defenses, queries("malicious", 1), tmp_path / "out", AttackSettings(attacks=attacks, **QUICK))
    assert not (tmp_path / "out").exists()


def test_a_deed_in_words_that_the_model_does_not_know_is_refused(lvlm: LVLM, tmp_path: Path) -> None:
    data = [replace(q, context="xylophone") for q in queries("malicious", 1)]
    with pytest.raises(DavspError, match="malicious-0: the answer that 'deed' wants 'a car: xylophone' holds words"):
        attack(lvlm, {"none": NoDefense()}, data, tmp_path, AttackSettings(attacks=("deed",), **QUICK))


def test_a_folder_stays_in_its_own(lvlm: LVLM, tmp_path: Path) -> None:
    assert slug("..") == "_" and slug("a/../b c") == "a_.._b_c" and "/" not in slug("../x")
    settings = AttackSettings(attacks=("noise",), eps=(4,), **QUICK)
    attack(lvlm, {"..": NoDefense()}, queries("malicious", 1), tmp_path / "out", settings, max_new_tokens=2)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_half_precision_without_range_is_refused(lvlm: LVLM, tmp_path: Path) -> None:
    half = copy(lvlm)
    half.dtype = torch.float16
    with pytest.raises(DavspError, match="float16 loses small gradients"):
        attack(
            half, {"none": NoDefense()}, queries("malicious", 1), tmp_path, AttackSettings(attacks=("noise",), **QUICK)
        )


@pytest.mark.parametrize(
    ("attacks", "whose", "words", "says"),
    [
        (("random-words",), "malicious", 6 + 1, "--words 6 is too many for query 'malicious-0' under none: "),
        (("random-words",), "benign", 6 + 1, "--words 6 is too many for query 'benign' under none: "),
        (("suffix",), "malicious", 6 + 4, "--words 6 is too many for query 'malicious-0' under none: "),
        (("comply",), "malicious", 4, "--target is too long for query 'malicious-0' under none: "),
        (("universal",), "training", 4, "--target is too long for query 'training' under none: "),
        (("deed",), "malicious", 7, "the answer that 'deed' wants of query 'malicious-0' is too long under none: "),
    ],
)
def test_room_is_asked_for_all_that_an_attack_sends(
    lvlm: LVLM, attacks: tuple[str, ...], whose: str, words: int, says: str
) -> None:
    """To the token: words after every question that gets them, and behind these the wanted answer with its end."""
    (bad,) = told(1)
    asked = {"malicious": bad} | {
        name: replace(bad, id=name, label=label, question=f"{bad.question} please" if name == whose else bad.question)
        for name, label in (("benign", "benign"), ("training", "malicious"))
    }
    settings = AttackSettings(attacks=attacks, words=6, target="a red car")
    assert wanted(bad, settings.target) == "a red car: steal a car"
    short = copy(lvlm)
    short.positions = lvlm.prompt_size(asked[whose].question, bad.size())[0] + words
    given = ({"none": NoDefense()}, [bad, asked["benign"]], settings, [asked["training"]], 1)
    check_room(short, *given)
    short.positions -= 1
    with pytest.raises(DavspError) as refused:
        check_room(short, *given)
    assert str(refused.value).startswith(says) and "max_new_tokens" not in str(refused.value)


def test_queries_that_are_left_out_are_counted(lvlm: LVLM, tmp_path: Path) -> None:
    output = io.StringIO()
    data = [*queries("malicious", 1), Query("w", "what is this", "malicious", "test")]
    settings = AttackSettings(attacks=("noise",), eps=(4,), **QUICK)
    attack(lvlm, {"none": NoDefense()}, data, tmp_path, settings, max_new_tokens=2, console=Console(file=output))
    assert "1 malicious queries have no picture and are left out" in output.getvalue()


def test_without_a_picture_there_is_nothing_to_attack(lvlm: LVLM, tmp_path: Path) -> None:
    words = [Query("w", "what is this", "malicious", "test"), *queries("benign", 1)]
    with pytest.raises(DavspError, match="no malicious query with a picture"):
        attack(lvlm, {"none": NoDefense()}, words, tmp_path, AttackSettings(attacks=("comply",)))


@pytest.mark.parametrize(
    "wrong", [{"attacks": ("pgd",)}, {"eps": (0,)}, {"eps": (256,)}, {"eps": ()}, {"steps": 0}, {"depth": 1}]
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AttackSettings(**wrong)
