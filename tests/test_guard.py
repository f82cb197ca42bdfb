"""Guards by transformers: the mechanics, on a model small enough to be taught two replies. No released guard is run."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from davsp import DavspError, Query, Response
from davsp.judges.cache import VerdictCache
from davsp.judges.guard import HARMBENCH, LLAMA_GUARD_3, LLAMA_GUARD_4, LocalGuard
from davsp.judges.prompts import JudgePrompt
from judge_server import items

AS_TEXT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] | trim }} {% endfor %}judge "
AS_PARTS = (
    "{% for m in messages %}{{ m['role'] }} {% for p in m['content'] %}{{ p['text'] }} {% endfor %}{% endfor %}judge "
)
BLIND = "{% for m in messages %}{{ m['role'] }} {% endfor %}judge "
WORDS = [
    "<pad>",
    "</s>",
    "<unk>",
    "user",
    "assistant",
    "judge",
    "safe",
    "unsafe",
    "\n",
    "S1",
    "S10",
    ",",
    "kite",
    "rock",
]
WORDS += ["yes", "no", "what", "is", "it", "a"]


def save_guard(folder: Path, template: str | None, replies: dict[str, str]) -> Path:
    """A Llama of two layers that was taught what to say where the answer is a kite, and where it is a rock."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Split(" ", "removed")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip
    rows = []
    for answer, reply in replies.items():
        for length in (1, 2, 4):
            prompt = tokenizer(f"user what assistant {' '.join(['it is a', answer] * length)} judge ")["input_ids"]
            rows.append((prompt, [WORDS.index(word) for word in reply.split(" ")] + [1]))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60 if replies else 0):
        for prompt, reply_ids in rows:
            ids = torch.tensor([prompt + reply_ids])
            target = ids.clone()
            target[0, : len(prompt)] = -100
            optimizer.zero_grad()
            model(input_ids=ids, labels=target).loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answers(*texts: str) -> list[tuple[Query, Response]]:
    return [(Query(f"q{i}", "what", "malicious", "t"), Response(f"q{i}", "none", t)) for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_guard(tmp_path_factory.mktemp("guard"), AS_TEXT, {"kite": "safe", "rock": "unsafe \n S1 , S10"})


def test_labels_in_batches_of_several_lengths(taught: Path, tmp_path: Path) -> None:
    texts = [
        "it is a rock it is a rock",
        "it is a kite",
        "it is a rock",
        "it is a kite it is a kite it is a kite it is a kite",
    ]
    whole = LocalGuard(LLAMA_GUARD_3, str(taught), device="cpu", batch_size=4, cache=VerdictCache(tmp_path / "c"))
    verdicts = whole.judge_all(answers(*texts))
    assert [v.label for v in verdicts] == ["unsafe", "safe", "unsafe", "safe"]
    assert verdicts[0].reason == "S1 Violent Crimes, S10 Hate" and verdicts[0].raw == "unsafe\nS1,S10"
    assert verdicts[0].judge == f"llama-guard-3/2:{taught.name}"
    single = LocalGuard(LLAMA_GUARD_3, str(taught), device="cpu", batch_size=1).judge_all(answers(*texts))
    assert [v.label for v in single] == [v.label for v in verdicts]

    def fail(prompts: list[list[int]]) -> None:
        raise AssertionError("asked again")

    whole._generate = fail  # type: ignore[assignment, method-assign]
    assert whole.judge_all(answers(*texts)) == verdicts


def test_other_weights_under_the_same_name_are_another_judge(taught: Path, tmp_path: Path) -> None:
    other = save_guard(tmp_path / taught.name, AS_TEXT, {})
    guards = [LocalGuard(LLAMA_GUARD_3, str(folder), device="cpu") for folder in (taught, other)]
    assert guards[0].name == guards[1].name
    query, response = answers("it is a kite")[0]
    assert guards[0]._key(query, response.text) != guards[1]._key(query, response.text)


@pytest.mark.parametrize("prompt", [LLAMA_GUARD_3, HARMBENCH], ids=lambda p: p.name)
def test_a_random_model_gives_no_label(prompt: JudgePrompt, tmp_path: Path) -> None:
    guard = LocalGuard(prompt, str(save_guard(tmp_path, AS_TEXT, {})), device="cpu")
    verdicts = guard.judge_all(items(3))
    assert {v.label for v in verdicts} == {"unscored"}
    assert all(v.reason.startswith("the judge's reply") for v in verdicts)


def test_a_template_that_takes_parts(tmp_path: Path) -> None:
    guard = LocalGuard(LLAMA_GUARD_4, str(save_guard(tmp_path, AS_PARTS, {})), device="cpu")
    query, response = answers("a rock")[0]
    assert guard._tokens(query, response.text) == [WORDS.index(w) for w in "user what assistant a rock judge".split()]


@pytest.mark.parametrize("template", [BLIND, None])
def test_a_template_that_hides_the_answer(template: str | None, tmp_path: Path) -> None:
    guard = LocalGuard(LLAMA_GUARD_3, str(save_guard(tmp_path, template, {})), device="cpu")
    with pytest.raises(DavspError, match="no chat template that shows question and answer"):
        guard.judge_all(answers("it is a kite"))


def test_an_answer_too_long(taught: Path) -> None:
    verdicts = LocalGuard(LLAMA_GUARD_3, str(taught), device="cpu").judge_all(answers("kite " * 600, "it is a rock"))
    assert [v.label for v in verdicts] == ["unscored", "unsafe"]
    assert verdicts[0].reason == "too long for the judge (604 of 512 tokens)"


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(DavspError, match="cannot be loaded"):
        LocalGuard(LLAMA_GUARD_3, str(tmp_path / "none"), device="cpu")


def test_a_device_that_is_not_here_and_cut_weights(tmp_path: Path) -> None:
    """Torch raises an AssertionError for the one, safetensors an error of its own for the other."""
    folder = save_guard(tmp_path, AS_TEXT, {})
    with pytest.raises(DavspError, match="device 'cuda:99' cannot be used here"):
        LocalGuard(LLAMA_GUARD_3, str(folder), device="cuda:99")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(DavspError, match="cannot be loaded"):
        LocalGuard(LLAMA_GUARD_3, str(folder), device="cpu")
