"""Noise trained on sentences, in the loop of DAVSP; UniGuard's texts and their search; both from the command line."""

import json
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from command import run as davsp_command
from davsp import LVLM, AdditiveNoise, DavspError, VisualSafetyPrompt
from davsp.defenses import VisualPrompt, load_defense
from davsp.defenses.esiii.train import train_esiii
from davsp.defenses.uniguard.search import SearchSettings, _Search, search_text
from davsp.defenses.uniguard.train import FIXED, OPTIMISED, train_uniguard
from davsp.embedded import corpus as mini
from davsp.embedded.words import vocabulary
from davsp.errors import Interrupted
from davsp.lvlm.onehot import answer_losses
from davsp.runtime.files import read_tensors
from davsp.training.loop import Loop
from davsp.training.sentences import SentenceRun, blank, read_sentences, train_sentences
from davsp.training.settings import SentenceSettings
from forks import forked
from test_parallel import davsp
from tiny import picture, queries

CORPUS = ["yes steal a car", "make a car please", "how do you steal", "a red cake", "sorry no"]
PICTURES = [picture(1), picture(2)]
FAST = SentenceSettings(likely=False, steps=6, batch_size=4, lr=4 / 255, checkpoint_every=2)
NOISE = AdditiveNoise.create(56, 16 / 255, "random")


def go(lvlm: LVLM, out: Path, settings: SentenceSettings = FAST, sentences: list[str] = CORPUS) -> AdditiveNoise:
    return train_sentences(lvlm, NOISE, PICTURES, "what is this", sentences, settings, out, progress=False)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def a_run(lvlm: LVLM, out: Path, **changes: Any) -> SentenceRun:
    return SentenceRun(lvlm, NOISE, PICTURES, "what is this ", CORPUS, FAST.model_copy(update=changes), out)


@pytest.mark.parametrize("likely", [True, False])
def test_one_step_by_hand(lvlm: LVLM, tmp_path: Path, likely: bool):
    """The sentences' mean cross-entropy falls or rises by the sign of its gradient; each has the picture of its number."""
    run = a_run(lvlm, tmp_path, likely=likely)
    rows = [CORPUS.index(sentence) for sentence in run.sentences_of(run._batch(0))]
    assert len(set(rows)) == 4
    delta = NOISE.delta.clone().requires_grad_()
    canvas = (NOISE.resize([PICTURES[i % 2] for i in rows]) + delta).clamp(0, 1)
    mean = answer_losses(lvlm, canvas, ["what is this "] * 4, [CORPUS[i] for i in rows]).mean()
    (gradient,) = torch.autograd.grad(mean, delta)
    way = -1 if likely else 1
    after, metrics = run.advance(run.checkpoint.start(NOISE.delta.clone()))
    expected = (NOISE.delta + way * 4 / 255 * gradient.sign()).clamp(-16 / 255, 16 / 255)
    assert (
        float((after.delta == expected).float().mean()) > 0.999
    )  # where the gradient is nothing but rounding, signs differ
    assert metrics["cross_entropy"] == pytest.approx(mean.item(), rel=1e-5)
    assert metrics["loss"] == -way * metrics["cross_entropy"]


@pytest.mark.parametrize("likely", [True, False])
def test_it_falls_or_rises_within_eps_and_is_saved_in_8_bit(lvlm: LVLM, tmp_path: Path, likely: bool):
    trained = go(lvlm, tmp_path, FAST.model_copy(update={"likely": likely, "steps": 12}))
    values = [line["cross_entropy"] for line in lines(tmp_path)]
    first, last = sum(values[:3]), sum(values[-3:])
    assert last < first if likely else last > first
    assert trained.delta.abs().max() <= 16 / 255 + 1e-6 and not torch.equal(trained.delta, NOISE.delta)
    trained.save_pretrained(tmp_path / "noise")
    loaded = AdditiveNoise.from_pretrained(tmp_path / "noise")
    assert torch.equal(loaded.delta, trained.quantised().delta)
    assert loaded.delta.abs().max() <= 16 / 255 + 1e-6 and loaded.config["layer"] is None
    assert (
        loaded.config["figures"]["train_cross_entropy"] == values[-1] and len(loaded.config["data"]["sentences"]) == 64
    )


@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"micro_batch": 3}, {"activation_checkpointing": True}])
def test_less_memory_leaves_the_gradient(lvlm: LVLM, tmp_path: Path, options: dict[str, Any]):
    plain, saving = a_run(lvlm, tmp_path), a_run(lvlm, tmp_path, **options)
    (gradient, terms), (other, other_terms) = (r.gradient(NOISE.delta, r._batch(0)) for r in (plain, saving))
    assert gradient.abs().max() > 1e-6 and (other - gradient).abs().max() < 1e-5 * gradient.abs().max()
    assert other_terms == pytest.approx(terms, rel=1e-5)
    assert plain.memory_advice(10**12) is None and "--micro-batch" in (plain.memory_advice(1000) or "")


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, step: int) -> None:
    """Ctrl-C at the call number `step` of a method."""
    method, calls = getattr(owner, name), []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > step:
            raise KeyboardInterrupt
        return method(*args)

    monkeypatch.setattr(owner, name, interrupted)


def test_interrupt_and_resume_is_uninterrupted(lvlm: LVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = go(lvlm, tmp_path / "whole")
    stop_at(monkeypatch, Loop, "advance", 3)
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        go(lvlm, tmp_path / "parts")
    monkeypatch.undo()
    assert torch.equal(go(lvlm, tmp_path / "parts").delta, whole.delta)
    for name in ("metrics.jsonl", "checkpoint.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    with pytest.raises(DavspError, match=r"other settings \(data\)"):
        go(lvlm, tmp_path / "parts", sentences=CORPUS[1:])
    with pytest.raises(DavspError, match=r"other settings \(likely\)"):
        go(lvlm, tmp_path / "parts", FAST.model_copy(update={"likely": True}))


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_train_the_noise_of_one(tiny_folder: Path, tmp_path: Path, fresh: bool, capfd: Any):
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    deltas, logs = [], []
    for count in ("1", "2"):
        command = [
            "baseline", "uniguard", "--model", tiny_folder, "--device", "cpu", "--corpus", tmp_path / "corpus.txt",
            "--out", tmp_path / count, "--steps", "3", "--batch-size", "3", "--optimizer", "adam", "--num-processes", count,
            "--text-part", "searched", "--text-tokens", "2", "--sweeps", "1", "--candidates", "3",
        ]  # fmt: skip
        if fresh:
            done = davsp(*command)
            assert done.returncode == 0, done.stderr
            said = done.stdout
        else:
            assert forked(*command) == 0
            said = capfd.readouterr().out
        assert said.count("saved to") == 1
        deltas.append(read_tensors(tmp_path / count / "training" / "checkpoint.safetensors")["delta"])
        logs.append(lines(tmp_path / count / "training"))
    assert (deltas[0] - deltas[1]).abs().max() <= 1e-6
    assert [r["cross_entropy"] for r in logs[0]] == pytest.approx([r["cross_entropy"] for r in logs[1]], rel=1e-4)
    texts = [load_defense(tmp_path / count).prompt.text for count in ("1", "2")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()[-1].split()) > 2


# -- texts


def test_texts_stand_around_the_question_and_are_saved(tmp_path: Path):
    fixed = NOISE.with_texts("be safe", suffix=f"\n{FIXED}")
    searched = NOISE.with_texts(OPTIMISED, separator="\n")
    assert fixed.question("what?") == f"be safe what?\n{FIXED}" and NOISE.with_texts("").question("what?") == "what?"
    assert searched.question("what?") == f"{OPTIMISED}\nwhat?"
    assert NOISE.question("what?") == "what?" and NOISE.suffix == ""  # the one given is left as it is
    for name, prompt in (("fixed", fixed), ("searched", searched), ("border", VisualSafetyPrompt.create(24, 5).with_texts("a", "\n", "b"))):  # fmt: skip
        prompt.save_pretrained(tmp_path / name)
        loaded = load_defense(tmp_path / name)
        assert isinstance(loaded, VisualPrompt)
        (query,) = loaded.prepare([replace(queries("benign", 1)[0], image=None)])
        assert query.question == prompt.question(queries("benign", 1)[0].question)
    assert '"b"' in (tmp_path / "border" / "README.md").read_text()
    descriptions = [VisualPrompt(prompt).describe() for prompt in (NOISE, fixed, NOISE.with_texts("", "\n"))]
    assert descriptions[0].keys() == {"kind", "text", "padding", "delta"}  # as in run folders from before
    assert descriptions[1]["suffix"] == f"\n{FIXED}" and descriptions[2]["separator"] == "\n"
    config = json.loads((tmp_path / "fixed" / "noise_config.json").read_text())
    (tmp_path / "fixed" / "noise_config.json").write_text(json.dumps(config | {"suffix": 3}))
    with pytest.raises(DavspError, match=r"noise_config\.json: field 'suffix'"):
        AdditiveNoise.from_pretrained(tmp_path / "fixed")


def test_a_folder_without_own_placement_is_as_before(tmp_path: Path):
    NOISE.with_texts("be safe").save_pretrained(tmp_path)
    assert not {"separator", "suffix"} & json.loads((tmp_path / "noise_config.json").read_text()).keys()
    assert AdditiveNoise.from_pretrained(tmp_path).question("what?") == "be safe what?"


def test_the_methods_put_their_texts(lvlm: LVLM, tmp_path: Path):
    """And take the text into the question of the training only where that is asked for."""

    def uniguard(out: str, **options: Any) -> AdditiveNoise:
        return train_uniguard(
            lvlm, CORPUS, tmp_path / out, text="please be safe", settings=FAST.model_copy(update={"steps": 1}),
            progress=False, **options,
        )  # fmt: skip

    questions = {
        part: uniguard("a", text_part=part).question("Q") for part in ("none", "fixed", "optimised")
    }  # one training
    assert questions == {
        "none": "please be safe Q", "fixed": f"please be safe Q\n{FIXED}", "optimised": f"please be safe {OPTIMISED}\nQ",
    }  # fmt: skip
    search = SearchSettings(text_tokens=2, sweeps=1, candidates=2)
    searched = uniguard("b", text_part="searched", with_text=True, search=search)
    searched_text = json.loads((tmp_path / "b" / "text.json").read_text())["text"]
    assert searched.question("Q") == f"please be safe {searched_text}\nQ" and len(searched_text.split()) == 2
    assert uniguard("a").config["data"]["sentences"] != searched.config["data"]["sentences"]
    settings = FAST.model_copy(update={"steps": 1, "likely": True})
    defended = train_esiii(lvlm, tmp_path / "c", text="be safe", settings=settings, progress=False)
    assert defended.question("Q") == "be safe Q" and defended.eps == 32 / 255


def test_the_search_raises_the_cross_entropy_and_goes_on(lvlm: LVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, settings = a_run(lvlm, tmp_path), SearchSettings(text_tokens=3, sweeps=2, candidates=12, sample=5, seed=1)
    look: Callable[..., str] = lambda path, **o: search_text(run, NOISE.delta, settings, path, progress=False, **o)  # noqa: E731
    text = look(tmp_path / "whole.json")
    state = json.loads((tmp_path / "whole.json").read_text())
    curve = state["cross_entropy"]
    assert curve == sorted(curve) and curve[-1] > curve[0]  # all five sentences each time: it can't fall
    search = _Search(run, NOISE.delta, settings)
    assert search.cross_entropy(state["ids"], run.rows(range(5))) == pytest.approx(curve[-1], rel=1e-5)
    assert search.holds(state["ids"]) and text == search.text(state["ids"]) and len(text.split()) == 3
    assert curve[-1] > search.cross_entropy(search.start(), run.rows(range(5)))
    stop_at(monkeypatch, _Search, "position", 2)
    with pytest.raises(Interrupted, match="position 2 of 6"):
        look(tmp_path / "parts.json")
    monkeypatch.undo()
    assert look(tmp_path / "parts.json") == text
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    settings = settings.model_copy(update={"sample": 2})
    with pytest.raises(DavspError, match=r"parts\.json is of a run with other settings \(sample\)"):
        look(tmp_path / "parts.json")


def test_the_first_order_promise_is_the_change(lvlm: LVLM, tmp_path: Path):
    """Of all tokens at a position, those that promise most do raise the cross-entropy more than those that promise least."""
    run = a_run(lvlm, tmp_path)
    search, batch = _Search(run, NOISE.delta, SearchSettings(text_tokens=3)), run.rows(range(5))
    ids = search.start()
    promised = search.gradient(ids, batch)[1]
    order = sorted(search.usable, key=lambda token: float(promised[token]))
    real = [search.cross_entropy([ids[0], token, ids[2]], batch) for token in (*order[:8], *order[-8:])]
    assert sum(real[8:]) > sum(real[:8])


# -- input


def test_a_corpus_is_a_sentence_a_line(tmp_path: Path):
    path = tmp_path / "corpus.txt"
    path.write_text("one thing\r\n\n  another\u2028one \n")
    assert read_sentences(path) == ["one thing", "another\u2028one"]
    path.write_text(" \n\n")
    with pytest.raises(DavspError, match=r"corpus\.txt holds no sentence"):
        read_sentences(path)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DavspError, match="is not UTF-8"):
        read_sentences(path)


def test_bad_input(lvlm: LVLM, tmp_path: Path):
    for sentences, pictures, missing in (([], PICTURES, "sentence"), (CORPUS, [], "picture")):
        with pytest.raises(DavspError, match=f"no {missing} to train on"):
            SentenceRun(lvlm, NOISE, pictures, "", sentences, FAST, tmp_path)
    with pytest.raises(DavspError, match="canvas is 24x24"):
        SentenceRun(lvlm, AdditiveNoise.create(24), PICTURES, "", CORPUS, FAST, tmp_path)
    assert blank(4).getpixel((0, 0)) == (128,) * 3 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ("a car " * 60, r"^sentence 6 \('a car .*'\) cannot be trained on: .*, and the sentence itself \(--corpus\) 121, but"),
        ("  ", r"^sentence 6 \('  '\): the sentence itself \(--corpus\) holds no token of"),
    ],
)  # fmt: skip
def test_a_sentence_that_cannot_be_trained_on_is_named_before_the_first_step(
    lvlm: LVLM, tmp_path: Path, odd: str, says: str
):
    short = copy(lvlm)
    short.positions = 100
    with pytest.raises(DavspError, match=says):
        go(short, tmp_path / "out", sentences=[*CORPUS, odd])
    assert not (tmp_path / "out").exists()


def test_the_embedded_sentences_are_in_the_embedded_words():
    words = set(vocabulary())
    for text in (mini.UNIGUARD_TEXT, mini.QUESTION, *mini.SAFETY_SENTENCES):
        assert set(text.split()) <= words
    sentences, pictures = mini.corpus(3)
    assert len(sentences) == len(pictures) > 100 and all(s.startswith("sure , here are the steps") for s in sentences)


def test_from_a_corpus_to_figures(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A line may hold words that the tokenizer doesn't know."""
    (tmp_path / "corpus.txt").write_text("steal a car\nunheard of words\n")
    common = ("--model", tiny_folder, "--steps", 1, "--text", "be safe", "--eps", 0.1, "--alpha", 0.01)
    corpus = ("--corpus", tmp_path / "corpus.txt")
    assert davsp_command("baseline", "uniguard", *corpus, *common, "--text-part", "fixed", "--out", tmp_path / "u") == 0
    assert "without --picture" in capsys.readouterr().err
    assert davsp_command("baseline", "esiii", *common, "--out", tmp_path / "e") == 0
    assert load_defense(tmp_path / "u").prompt.question("Q") == f"be safe Q\n{FIXED}"
    assert lines(tmp_path / "u" / "training")[0]["lr"] == 0.01 and load_defense(tmp_path / "e").prompt.eps == 0.1
    from davsp.benchmarks.custom import save_queries

    save_queries(tmp_path / "test", [*queries("malicious", 2), *queries("benign", 2)])
    options = (
        "--queries",
        tmp_path / "test",
        "--model",
        tiny_folder,
        "--max-new-tokens",
        2,
        "--out",
        tmp_path / "eval",
    )
    rows = ("--defense", f"uniguard={tmp_path / 'u'}", "--defense", f"esiii={tmp_path / 'e'}")
    assert davsp_command("eval", *options, *rows, "--max-unscored", 1) == 0
    metric_rows = json.loads((tmp_path / "eval" / "metrics.json").read_text())["rows"]
    assert {row["defense"] for row in metric_rows} == {"uniguard", "esiii"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--eps", "0.1"], "--eps is the bound of noise; give it with --kind additive"),
        (["uniguard", "--text-part", "bold"], "--text-part is none, fixed, optimised or searched, not 'bold'"),
        (["uniguard", "--text-part", "optimised"], "is in the tokens of LLaVA, which this model lacks"),
        (["uniguard", "--sweeps", "3"], "--sweeps is for --text-part searched"),
        (["uniguard", "--model", "MODEL"], "--corpus is missing"),
        (["uniguard", "--corpus", "gone.txt"], "cannot read gone.txt"),
        (["uniguard", "--corpus", "empty.txt"], "empty.txt holds no sentence"),
        (["esiii", "--picture", "gone.png"], "cannot open image gone.png"),
        (["esiii", "--steps", "0"], "--steps 0 is not possible"),
        (["uniguard", "--text-part", "searched", "--text-tokens", "0"], "--text-tokens 0 is not possible"),
        (["esiii", "--model", "MODEL", "--eps", "2"], "take eps in (0, 1]"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, says, tiny_folder: Path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    arguments = [a.replace("MODEL", str(tiny_folder)) for a in arguments]
    command = arguments if arguments[0] == "train" else ["baseline", *arguments]
    assert davsp_command(*command) == 2
    message = capsys.readouterr().err
    assert says in message and "Traceback" not in message and message.count("davsp: ") == 1
    assert not list(tmp_path.rglob("*.safetensors"))
