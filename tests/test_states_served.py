"""Hidden states from a server that writes them as vLLM does: the same states, vector, sweep and projections as here."""

import fcntl
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from command import run
from davsp import LVLM, DavspError, HarmfulnessVector, Query, VisualSafetyPrompt, embedded
from davsp.benchmarks.custom import save_queries
from davsp.defenses import NoDefense, VisualPrompt
from davsp.embedded.data import Protocol
from davsp.evaluation import evaluate
from davsp.lvlm.remote import RemoteLVLM
from davsp.lvlm.states_served import ServedStates, read_layers
from davsp.query import Response, read_jsonl
from davsp.serve.model import model_app
from davsp.serve.settings import ServeSettings
from proxy import listening
from tiny import queries

NAMED = {"hidden_states_path": "/elsewhere/on/the/server/a.safetensors"}


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Serves a model that writes its states at some layers into tmp_path/states."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "states").mkdir()

    def served(lvlm: LVLM, layers: Any, name: str = "org/m") -> Any:
        return listening(
            model_app(lvlm, name, ServeSettings.of(upstream=""), ServedStates(tmp_path / "states", layers))
        )

    yield served
    assert not list((tmp_path / "states").iterdir())  # whoever reads a file takes it away


def remote(url: str, folder: Path, layers: Any, name: str = "org/m", **options: Any) -> RemoteLVLM:
    states = ServedStates(folder / "states", layers, patience=0.3)
    return RemoteLVLM(name, url, attempts=2, backoff=0.01, concurrency=4, served=states, **options)


def squares(label: str, count: int, seed: int = 0) -> list[Query]:
    """Pictures that every server shows in the same way; others are padded in white here, and a server pads them as it likes."""
    return [replace(query, image=query.image.resize((56, 56))) for query in queries(label, count, seed)]  # type: ignore[union-attr]


def test_states_of_a_server_are_those_of_the_model(lvlm: LVLM, tmp_path: Path, serving: Callable[..., Any]) -> None:
    """To the bit: pictures and words only, layers as numbered here."""
    asked = [*queries("malicious", 3), Query("w", "what is this", "benign", "test")]
    with serving(lvlm, [1, 3]) as url:
        there = remote(url, tmp_path, [1, 3])
        for query in asked:
            seen = query.picture()
            here = lvlm.states(lvlm.preprocess([seen]) if seen else None, [query.question], [3, 1])
            sent = there.preprocess([seen]) if seen else None
            assert torch.equal(there.states(sent, [query.question], [3, 1]), here)
        with pytest.raises(DavspError, match="does not write layer 2; start it with that one"):
            there.states(None, ["what is this"], [1, 2])


def test_vector_and_sweep_of_davsp_mini_by_the_command_line(
    mini: LVLM, protocol: Protocol, tmp_path: Path, serving: Callable[..., Any]
) -> None:
    sets = protocol.vector_malicious[:10], protocol.vector_benign[:10]
    held = protocol.vector_malicious[10:18], protocol.vector_benign[10:18]
    names = ("bad", "good", "held-bad", "held-good")
    for name, some in zip(names, (*sets, *held), strict=True):
        save_queries(tmp_path / name, some)
    here = HarmfulnessVector.fit(mini, *sets, text=embedded.SAFETY_TEXT, batch_size=1, progress=False)
    here.sweep(mini, *held, text=embedded.SAFETY_TEXT, batch_size=1, progress=False)
    options = ["--malicious", tmp_path / "bad", "--benign", tmp_path / "good"]
    options += ["--held-malicious", tmp_path / "held-bad", "--held-benign", tmp_path / "held-good"]
    last = mini.num_layers - 1
    with serving(mini, range(1, last + 1), "davsp-mini") as url:
        options += ["--engine", "openai", "--base-url", url, "--api-model", "davsp-mini"]
        options += ["--states-folder", tmp_path / "states", "--states-layers", f"1-{last}"]
        assert run("vector", *options, "--out", tmp_path / "vector") == 0
    there = HarmfulnessVector.load(tmp_path / "vector")
    assert torch.allclose(there.vectors, here.vectors, atol=1e-5) and there.layer == here.layer
    assert torch.allclose(there.malicious, here.malicious, atol=1e-4)
    assert [row["auroc"] for row in there.table] == [row["auroc"] for row in here.table] and there.left_out == []
    assert (there.mu_plus, there.mu_minus) == pytest.approx((here.mu_plus, here.mu_minus), abs=1e-4)
    assert there.model_id == "davsp-mini" and there.text == here.text
    there.check(mini)  # so a border can be trained on it here


def test_projections_of_a_server_are_those_here(
    lvlm: LVLM, vector: HarmfulnessVector, tmp_path: Path, serving: Callable[..., Any]
) -> None:
    """Of a border and undefended, in the files of a run: the vector was fitted here, and is bound to the server's name of the model."""
    asked = queries("malicious", 3)
    save_queries(tmp_path / "data", asked)
    VisualSafetyPrompt.create(56, 8, "random", text="please be safe").save_pretrained(tmp_path / "prompt")
    border = VisualPrompt(VisualSafetyPrompt.from_pretrained(tmp_path / "prompt"))
    here = evaluate(lvlm, {"none": NoDefense(), "davsp": border}, asked, vector=vector, batch_size=1, max_new_tokens=4)
    name = Path(lvlm.model_id).name
    vector.save(tmp_path / "vector")
    command = ["eval", "--engine", "openai", "--api-model", name, "--canvas", "56", "--queries", tmp_path / "data"]
    command += ["--defense", "none", "--defense", f"davsp={tmp_path / 'prompt'}", "--max-new-tokens", "4"]
    command += ["--max-unscored", "1", "--vector", tmp_path / "vector", "--states-folder", tmp_path / "states"]
    layers = sorted({1, vector.layer})
    with serving(lvlm, layers, name) as url:
        chosen = ["--base-url", url, "--states-layers", ",".join(map(str, layers))]
        assert run(*command, *chosen, "--out", tmp_path / "run") == 0
    there = read_jsonl(tmp_path / "run" / "responses.jsonl", Response)
    kept = {(r.defense, r.query_id): (r.text, r.projection) for r in there}
    for defense, responses in here.responses.items():
        for response in responses:
            text, projection = kept[defense, response.query_id]
            assert text == response.text and projection == pytest.approx(response.projection, abs=1e-5)
    assert len({projection for _, projection in kept.values()}) == 6


def test_of_some_layers_a_vector_has_those(lvlm: LVLM, tmp_path: Path, serving: Callable[..., Any]) -> None:
    sets = squares("malicious", 6), squares("benign", 6)
    held = squares("malicious", 4, seed=1), squares("benign", 4, seed=1)
    here = HarmfulnessVector.fit(lvlm, *sets, batch_size=1, progress=False)
    with serving(lvlm, [2, 3]) as url:
        there = HarmfulnessVector.fit(remote(url, tmp_path, [2, 3]), *sets, progress=False)
        assert there.left_out == [1] and torch.equal(there.vectors[1:], here.vectors[1:])
        assert [row["layer"] for row in there.sweep(remote(url, tmp_path, [2, 3]), *held, progress=False)] == [2, 3]
        for layer in (1, 3):
            there.layer = layer  # as a user's vector may have it
            other = remote(url, tmp_path, [2] if layer == 3 else [2, 3])
            with pytest.raises(DavspError, match=rf"is of layer {layer}, and the server writes 2"):
                there.check(other)
    with pytest.raises(DavspError, match="no direction at layer 1, which the server did not write"):
        there.use_layer(1)
    few = HarmfulnessVector(torch.eye(2, 32), torch.ones(2, 2), torch.zeros(2, 2))
    with pytest.raises(DavspError, match=r"or of a server that did not write all layers \(--states-layers\): it has 2"):
        few.check(lvlm)
    with pytest.raises(DavspError, match="no hidden states; leave out the vector"):
        HarmfulnessVector.fit(RemoteLVLM("org/m", url), *sets, progress=False)


def test_an_error_leaves_no_files_of_the_other_answers(lvlm: LVLM, tmp_path: Path, serving: Callable[..., Any]) -> None:
    with serving(lvlm, [1, 2]) as url:
        with pytest.raises(DavspError, match="holds 2 layers, and --states-layers names 1"):
            NoDefense().respond(remote(url, tmp_path, [1]), queries("benign", 4))
        assert len(list((tmp_path / "states").iterdir())) == 0


def test_a_vector_of_another_model_is_refused(
    lvlm: LVLM, vector: HarmfulnessVector, tmp_path: Path, serving: Callable[..., Any]
) -> None:
    with serving(lvlm, [1, 2, 3]) as url:
        with pytest.raises(DavspError, match=r"the vector is of another model: .*, not org/m"):
            vector.check(remote(url, tmp_path, [1, 2, 3]))
        wide = HarmfulnessVector(torch.eye(3, 64), torch.ones(2, 3), torch.zeros(2, 3), model_id="org/m")
        with pytest.raises(DavspError, match="has 64 numbers a layer, and the states have 32"):
            NoDefense().respond(remote(url, tmp_path, [1, 2, 3]), queries("benign", 1), wide)
    with serving(lvlm, [1, 2]) as url:
        wide.layer = 3
        with pytest.raises(DavspError, match="is of layer 3, and the server writes 1, 2; start it"):
            NoDefense().respond(remote(url, tmp_path, [1, 2]), queries("benign", 1), wide)


GOOD = {"hidden_states": torch.ones(4, 2, 8, dtype=torch.bfloat16), "token_ids": torch.arange(4)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"token_ids": torch.arange(5)}, r"states of 4 tokens and the ids of 5.*--no-enable-prefix-caching"),
        (
            {"hidden_states": torch.ones(3, 2, 8)},
            r"states of 3 tokens and the ids of 4, of a prompt that the server counts as 4",
        ),
        ({"hidden_states": torch.ones(0, 2, 8), "token_ids": torch.arange(0)}, "states of 0 tokens"),
        ({"hidden_states": torch.ones(4, 3, 8)}, r"holds 3 layers, and --states-layers names 2.*eagle_aux"),
        ({"hidden_states": torch.ones(4, 16)}, r"holds hidden_states \(4, 16\), token_ids \(4,\), not"),
        ({"hidden_states": None}, r"holds token_ids \(4,\), not hidden_states \(tokens, layers, width\)"),
        ({"hidden_states": torch.ones(4, 2, 8).to(torch.float8_e4m3fn)}, "--dtype bfloat16"),
        ({"hidden_states": torch.full((4, 2, 8), torch.nan)}, "NaN, infinite or all zero"),
        ({"hidden_states": torch.zeros(4, 2, 8)}, "NaN, infinite or all zero"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    states = ServedStates(tmp_path, [1, 2], patience=0.1)
    tensors = {name: tensor for name, tensor in (GOOD | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(DavspError, match=says):
        states.read(NAMED, 4)
    save_file(GOOD, tmp_path / "a.safetensors")
    assert torch.equal(states.read(NAMED, None), torch.ones(2, 8)) and not list(tmp_path.iterdir())


def test_a_file_that_is_not_there_or_not_whole_is_named(tmp_path: Path) -> None:
    states = ServedStates(tmp_path, [1, 2], patience=0.1)
    for named in (None, {}, {"hidden_states_path": 3}, {"hidden_states_path": "/"}):
        with pytest.raises(
            DavspError, match=r"names no file of hidden states \(kv_transfer_params.hidden_states_path\)"
        ):
            states.read(named, 4)
    with pytest.raises(DavspError, match=r"has named a.safetensors, and .* does not hold it.*--states-folder"):
        states.read(NAMED, 4)
    (tmp_path / "a.safetensors").write_bytes(b"\x10" * 30)
    with pytest.raises(DavspError, match=r"a.safetensors cannot be read"):
        states.read(NAMED, 4)
    save_file(GOOD, tmp_path / "a.safetensors")
    with open(tmp_path / "a.safetensors.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DavspError, match=r"has not written .* within 0.1 seconds"):
            states.read(NAMED, 4)


def test_a_file_under_way_is_waited_for(tmp_path: Path) -> None:
    """The lock is there before the reply, as vLLM has it, and the file comes after it."""
    with open(tmp_path / "a.safetensors.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (tmp_path / "a.safetensors").write_bytes(b"half of it")

        def finish() -> None:
            save_file(GOOD, tmp_path / "a.safetensors")
            fcntl.flock(lock, fcntl.LOCK_UN)

        later = threading.Timer(0.2, finish)
        later.start()
        states = ServedStates(tmp_path, [1, 2], patience=10)
        assert torch.equal(states.read(NAMED, 4), torch.ones(2, 8))
        later.join()
    assert not list(tmp_path.iterdir())


def test_options_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = ["--engine", "openai", "--base-url", "http://127.0.0.1:9/v1", "--api-model", "davsp-mini"]
    both = ["--states-folder", tmp_path, "--states-layers", "1,2"]
    for options, says in (
        (both, "go with --engine openai"),
        ([*server, *both[:2]], "go together; give both"),
        ([*server, "--states-folder", tmp_path / "none", "--states-layers", "1"], "there is no folder"),
        ([*server, *both[:2], "--states-layers", "2,1"], "in rising order from 1"),
        ([*server, *both[:2], "--states-layers", "0-2"], "in rising order from 1"),
        ([*server, *both[:2], "--states-layers", "a"], "names no layers"),
        ([*server, *both[:2], "--states-layers", "1-100000000000"], "1-100000000000 is no layer of a model"),
        ([*server, *both[:2], "--states-layers", "1-" + 5000 * "9"], "names no layers"),
        ([*server, *both[:2], "--states-layers", "4,3-1"], "3-1 is no layer of a model"),
        (server, "have vLLM write them"),
        ([*server, *both, "--recipe", "published"], "--recipe published goes with a model loaded here"),
        ([*server, *both, "--layer", "3"], "--layer 3 is not among --states-layers 1,2"),
        ([*server, *both, "--num-processes", "2"], "go with a model loaded here"),
    ):
        assert run("vector", *options, "--out", tmp_path / "out") == 2
        assert says in capsys.readouterr().err
    vector = HarmfulnessVector(torch.eye(2, 8), torch.ones(2, 2), torch.zeros(2, 2), model_id="davsp-mini")
    vector.save(tmp_path / "vector")
    assert run("eval", *server, "--vector", tmp_path / "vector", "--out", tmp_path / "out") == 2
    assert "have vLLM write them (--states-folder)" in capsys.readouterr().err
    assert read_layers("1, 3-5") == (1, 3, 4, 5)


def test_serve_model_says_where_they_are(lvlm: LVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In vLLM's form: all tokens of the prompt, picture and all, and a lock beside the file; a stream has none."""
    import httpx2
    from safetensors.torch import load_file

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with listening(model_app(lvlm, "m", ServeSettings.of(upstream=""), ServedStates(tmp_path, [1, 2]))) as url:
        body = {"model": "m", "messages": [{"role": "user", "content": "what is this"}], "max_tokens": 1}
        reply = httpx2.post(f"{url}/chat/completions", json=body, timeout=60).json()
        httpx2.post(f"{url}/chat/completions", json=body | {"stream": True}, timeout=60).raise_for_status()
    (path,) = tmp_path.glob("*.safetensors")
    assert reply["kv_transfer_params"] == {"hidden_states_path": str(path)}
    assert path.with_name(path.name + ".lock").exists() and len(list(tmp_path.iterdir())) == 2
    tensors = load_file(path)
    tokens = lvlm.encode(["what is this"], False)
    assert torch.equal(tensors["token_ids"], tokens.ids[0])
    assert tensors["hidden_states"].shape == (len(tokens.ids[0]), 2, 32)
    assert reply["usage"]["prompt_tokens"] == len(tokens.ids[0]) and json.dumps(reply)


def test_a_folder_that_is_gone_is_named_by_serve_model(
    lvlm: LVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx2

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    states = ServedStates(tmp_path, [1])
    states.folder = tmp_path / "gone"
    with listening(model_app(lvlm, "m", ServeSettings.of(upstream=""), states)) as url:
        body = {"model": "m", "messages": [{"role": "user", "content": "what is this"}], "max_tokens": 1}
        reply = httpx2.post(f"{url}/chat/completions", json=body, timeout=60)
    assert "hidden states cannot be written into" in reply.text and "--states-folder" in reply.text
