"""The paper's protocol on invented queries."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from davsp.benchmarks.splits import data_hash, load_split, paper_split
from davsp.errors import DavspError
from davsp.query import Query, Response, Verdict

TYPES = ("sd", "sd_typo", "typo")


def guard(n: int = 500) -> list[Query]:
    """Of each picture a harmful and a harmless question, and as many harmful pictures."""
    queries = []
    for i in range(n):
        queries += [
            Query(f"unsafes/{i}", f"harm {i}", "malicious", "vlguard_unsafes", group=f"h{i}"),
            Query(f"safe_unsafes/{i}", f"odd {i}", "malicious", "vlguard_safe_unsafes", group=f"s{i}"),
            Query(f"safe_safes/{i}", f"kind {i}", "benign", "vlguard_safe_safes", group=f"s{i}"),
        ]
    return queries


def safety(n: int = 300) -> list[Query]:
    return [Query(f"{t}/{i}", f"{t} {i}", "malicious", t, "bread", f"g{i}") for t in TYPES for i in range(n)]


def vet() -> list[Query]:
    """218 questions on 200 pictures."""
    return [Query(f"v1_{i}", f"what {i}", "benign", "mm_vet", "ocr", f"p{i % 200}", "yes") for i in range(218)]


def answers_of(queries: list[Query], refuses) -> list[Response]:
    return [Response(q.id, "none", "I'm sorry, I cannot help." if refuses(q) else "Sure: ...") for q in queries]


def number(q: Query) -> int:
    return int(q.id.split("/")[1])


def easy(q: Query) -> bool:
    return q.label == "malicious" and number(q) % 10 != 0


def draw(seed: int = 0, **options):
    hard = [Verdict(q.id, "none", "fake", "safe" if number(q) < 50 or (number(q) < 80 and q.benchmark != "sd") else "unsafe")
            for q in safety()]  # fmt: skip
    arguments = {"vlguard_undefended": answers_of(guard(), easy), "mm_safetybench_undefended": hard, "seed": seed,
                 "others": {"figstep": [Query("1_1", "q", "malicious", "figstep")]}}  # fmt: skip
    sets = {"vlguard": guard(), "mm_safetybench": safety(), "mm_vet": vet()}
    return paper_split(**sets | arguments | options)


def test_the_papers_sizes():
    split = draw()
    assert {name: len(queries) for name, queries in split.parts.items()} == {
        "vector_malicious": 470, "vector_benign": 470, "train_malicious": 600, "train_benign": 100
    }  # fmt: skip
    assert {name: len(queries) for name, queries in split.test.items()} == {
        "mm_safetybench": 300,
        "mm_vet": 118,
        "figstep": 1,
    }
    assert all(easy(q) for q in split.parts["vector_malicious"])
    assert len({q.group for q in split.parts["vector_malicious"]}) == 470
    assert {q.label for q in split.parts["vector_benign"]} == {"benign"}


def test_the_papers_test_sets():
    """1,680 intents and 218 questions leave 1,480 of each picture type and 118."""
    split = draw(mm_safetybench_undefended=None, mm_safetybench=safety(1680))
    kinds = [q.benchmark for q in split.test["mm_safetybench"]]
    assert {kind: kinds.count(kind) for kind in TYPES} == dict.fromkeys(TYPES, 1480)
    assert len(split.test["mm_vet"]) == 118


def test_mm_vet_is_cut_exactly_between_pictures():
    """Half the pictures have two questions, so filling up without a look overshoots."""
    pairs = [Query(f"v1_{i}", "what", "benign", "mm_vet", "ocr", f"p{i % 20}") for i in range(30)]
    for n in range(1, 20):
        split = paper_split(guard(20), safety(9), pairs, vlguard_undefended=answers_of(guard(20), easy),
                            mm_safetybench_undefended=None, vector=9, intents=2, helpful=n, seed=n)  # fmt: skip
        train, test = split.parts["train_benign"], split.test["mm_vet"]
        assert len(train) == n and len(test) == 30 - n and not {q.group for q in train} & {q.group for q in test}


def test_nothing_straddles():
    split = draw()
    for part, name in (("train_malicious", "mm_safetybench"), ("train_benign", "mm_vet")):
        train, test = ({q.group for q in queries} for queries in (split.parts[part], split.test[name]))
        assert train and test and not train & test
    by_intent: dict[str, set[str]] = {}
    for q in split.parts["train_malicious"]:
        by_intent.setdefault(q.group, set()).add(q.benchmark)
    assert len(by_intent) == 200 and all(kinds == set(TYPES) for kinds in by_intent.values())


def test_hard_intents_come_first():
    """250 intents from 50 on are answered: 30 with one picture, 220 with all three. The latter are enough."""
    assert min(int(q.group[1:]) for q in draw().parts["train_malicious"]) >= 80
    wider = draw(intents=240).parts["train_malicious"]
    groups = {int(q.group[1:]) for q in wider}
    assert set(range(80, 300)) <= groups and min(groups) >= 50
    with pytest.raises(DavspError, match=r"250 intents .* not the 251"):
        draw(intents=251)
    blind = draw(mm_safetybench_undefended=None)
    assert min(int(q.group[1:]) for q in blind.parts["train_malicious"]) < 50
    assert blind.settings["hard intents"] == "drawn blindly"


def test_seeded_and_blind_to_order():
    ids = lambda split: {part: [q.id for q in queries] for part, queries in split.parts.items()}  # noqa: E731
    assert ids(draw(3)) == ids(draw(3)) != ids(draw(4))
    options = {"vlguard_undefended": answers_of(guard(), easy), "mm_safetybench_undefended": None, "seed": 3}
    forth, back = (paper_split(guard()[::s], safety()[::s], vet()[::s], **options) for s in (1, -1))
    assert ids(forth) == ids(back) and forth.hashes == back.hashes


def test_verdicts_or_responses():
    verdicts = [Verdict(q.id, "none", "fake", "safe" if easy(q) else "unscored") for q in guard()]
    assert draw(vlguard_undefended=verdicts).parts == draw().parts


def test_too_little_is_named():
    with pytest.raises(DavspError, match="VLGuard queries that the undefended model refuses"):
        draw(vlguard_undefended=answers_of(guard(), lambda q: number(q) < 100))
    with pytest.raises(DavspError, match="no response or verdict"):
        draw(vlguard_undefended=answers_of(guard(), easy)[:7])
    with pytest.raises(DavspError, match="not 300 questions of MM-Vet"):
        draw(helpful=300)
    with pytest.raises(DavspError, match="intent g0 has not one picture of each type"):
        paper_split(
            guard(), safety()[1:], vet(), vlguard_undefended=answers_of(guard(), easy), mm_safetybench_undefended=None
        )
    with pytest.raises(DavspError, match="vlguard has the id 'unsafes/0' twice"):
        paper_split([*guard(), guard()[0]], safety(), vet(), vlguard_undefended=[], mm_safetybench_undefended=None)
    with pytest.raises(DavspError, match="'mm_vet' is given twice"):
        draw(others={"mm_vet": vet()})


def data(tmp_path=None):
    return {
        "vlguard": guard(),
        "mm_safetybench": safety(),
        "mm_vet": vet(),
        "figstep": [Query("1_1", "q", "malicious", "figstep")],
    }


def test_saved_and_loaded(tmp_path):
    split = draw()
    split.save(tmp_path / "split.json")
    found = load_split(tmp_path / "split.json", data())
    assert found == split
    text = (tmp_path / "split.json").read_text()
    assert "harm 1" not in text and "odd" not in text  # ids only


@pytest.mark.parametrize("name", ["vlguard", "mm_safetybench", "mm_vet", "figstep"])
def test_a_changed_data_set_is_refused_by_name(tmp_path, name):
    draw().save(tmp_path / "split.json")
    changed = data()
    changed[name][0] = replace(changed[name][0], question="another one")
    with pytest.raises(DavspError, match=f"the data set {name} is not the one"):
        load_split(tmp_path / "split.json", changed)
    changed = data()
    del changed[name]
    with pytest.raises(DavspError, match=f"drawn from {name} too"):
        load_split(tmp_path / "split.json", changed)


def test_an_edited_split_is_refused(tmp_path):
    path = tmp_path / "split.json"
    draw().save(path)
    body = json.loads(path.read_text())
    body["parts"]["train_benign"].append(body["test"]["mm_vet"].pop())
    path.write_text(json.dumps(body))
    with pytest.raises(DavspError, match="was changed after it was written"):
        load_split(path, data())
    path.write_text("[]")
    with pytest.raises(DavspError, match="no split of schema 2"):
        load_split(path, data())


def test_hash_sees_pictures(tmp_path):
    grey, path = Image.new("RGB", (4, 4), "grey"), tmp_path / "a.png"
    grey.save(path)
    q = Query("a", "q", "benign", "b", image=path)
    before = data_hash([q])
    assert data_hash([replace(q, context="a caption")]) != before
    assert before == data_hash([q]) != data_hash([replace(q, image=None)])
    Image.new("RGB", (4, 4), "black").save(path)
    assert data_hash([q]) != before
    one, two = (data_hash([replace(q, image=Image.new("RGB", (4, 4), c))]) for c in ("grey", "black"))
    assert one != two


def test_an_answer_without_words_was_neither_refused_nor_given():
    """It makes a query neither easily refused nor hard to refuse."""
    with pytest.raises(DavspError, match="there are 0 VLGuard queries that the undefended model refuses"):
        draw(vlguard_undefended=[Response(q.id, "none", " .") for q in guard()])
    with pytest.raises(DavspError, match="there are 0 intents of MM-SafetyBench that the undefended model answers"):
        draw(mm_safetybench_undefended=[Response(q.id, "none", "") for q in safety()])
