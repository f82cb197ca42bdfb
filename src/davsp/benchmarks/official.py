"""Index files as their authors published them, by hash: whether a download is theirs, or was edited on the way.

The hashes were taken from public repositories on 2026-11-29, of the bytes there:

- FigStep: github.com/ThuCCSLab/FigStep at 0861b17.
- MM-SafetyBench: github.com/isXinLiu/MM-SafetyBench at b80eede, out of the history of a public fork.
- VLGuard: github.com/ys-zong/VLGuard at a2f85c9.
- MM-Vet: mm-vet.json of the release, in github.com/Haoming2000/VLM-Benchmarks at 6d394c9. Its questions and pictures are those of
  llava-mm-vet.jsonl in github.com/haotian-liu/LLaVA at 32cebc3.
- LLaVA-Bench: the copy in github.com/turingmotors/heron at c666ceb, which says that it is of liuhaotian/llava-bench-in-the-wild.
- MOSSBench: github.com/xirui-li/MOSSBench at 8d68b06. Its two index files have one name, so the folder is part of it.
- SIUO: github.com/sinwang20/SIUO at 18974b6; whether the file on the Hub has the same bytes could not be seen.
- MME: tools/eval_tool.zip of github.com/BradyFU/Awesome-Multimodal-Large-Language-Models at dd29509 (branch Evaluation).
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from davsp.runtime.files import read_bytes, sha256_bytes

BOM = b"\xef\xbb\xbf"

FILES: dict[str, dict[str, str]] = {
    "figstep": {
        "safebench.csv": "8e47f40b9b490fa2ca1393cdceb6081e9928848646f4b45fdd43726be941b394",
        "SafeBench-Tiny.csv": "e5f85f7d0323fe2e4afa99f6715ee97c2581d93856af4728a72fdec94338e867",
        "benign_sentences_without_harmful_phase.csv": "3a4d660f9b66a7750ce91c199c0a5719f2465816c73d28eee1642cecb691d034",
    },
    "mm_safetybench": {
        "01-Illegal_Activitiy.json": "e2db149c809c86fc5e6ef285bc17ca45228b19349ebd73125e7408098a273be9",
        "02-HateSpeech.json": "462672c4ca05d43a5502de61cbee0f5c12b76c9e7164e7b947f0ce8d1971bcb8",
        "03-Malware_Generation.json": "da4ceec8e02f130cac70ffabc6127f9d2a9d7466cd9f992c5f9c7ecb0a9645ae",
        "04-Physical_Harm.json": "f58c97aee2e22257b1b813d94ac7147cdb9e3c1b9c93a03eb14e1f3f32ab879e",
        "05-EconomicHarm.json": "9146c5eebeed31fcb48a1d622edca2e41c8880430c7e5ba715ed74e2f799ffd7",
        "06-Fraud.json": "869f47fa08e683d3220e7a4ec071482324748346d17462e0060cedec03cdadc0",
        "07-Sex.json": "23f4080200eca1701ce15295784e2c2291b2a8bb9883fd34ba92933b4297ceb7",
        "08-Political_Lobbying.json": "a9c64065b449a1a14ad332ff1fb630a55e8cf5b8f99f2269b230a6414cc2526e",
        "09-Privacy_Violence.json": "836d48648f9bc6ff1bf32291a7b05a2248c64c15bf363e0afcf8566922e5fdcd",
        "10-Legal_Opinion.json": "7281f218f74090dafe4df0a2b27c5e6f85949727a14e51418eaadda93811ce72",
        "11-Financial_Advice.json": "3220e4b9c8c9c588dfb61d4805b5dc1be9839089037b3701daea9af4a9ee298f",
        "12-Health_Consultation.json": "f3163717d2e397494a69a9462bb61f36c6ca1533b8f36d715593f50377df6895",
        "13-Gov_Decision.json": "83d3188cf488f08b82baedefdf6a7f28927834ea76e4de0217048bd217a9a0c9",
    },
    "vlguard": {
        "train.json": "1b44eb5438090baf6b94aafa09099d88183c41162d0a1298b70535852516aca1",
        "test.json": "a0b6479d0add65d9d1c06da5c89babd30d411bda47146445c13f32778a114980",
    },
    "mossbench": {
        "data/images_information/information.json": "a5f7701c0a068391a3ba10714dd95f3357d664c84faf47b747e425ff9806a352",
        "data_contrast/images_information/information.json": "ec00786d6be370284bb398dd61978c279e372f0fd9114e8ca39032e20ea14f1e",
    },
    "siuo": {"siuo_gen.json": "0a65c3443e75d0d6106550d73100753f19fe9fcb415e6ea138d5c7f04d31f228"},
    "mm_vet": {"mm-vet.json": "6eced3121b9865098ea72aca233ca5ff7fd7b81374494d878815b9f856442d8e"},
    "llava_bench": {
        "questions.jsonl": "a80b369a4b629f79f8c0f9a2aa9b565f0cfe34734d3bcdd30cb4e38712c07e21",
        "context.jsonl": "3bd0087816e69c36904f5760d10b80bf6d2b2c60c916fc5520d45c9737a87dbc",
        "answers_gpt4.jsonl": "f8af161127fedaa11575ee5f70cee0b4ea9e183c5824b5d47cb2b63bba9bf691",
    },
}
"""Benchmark -> name of an index file, with its folders where the name is not enough -> its sha256 as published."""

MME_QUESTIONS = {
    "OCR": "d1e23bd88f401c68d50ac3e2be2120daa6317e9c31d5edbba0955328f9a362ec",
    "artwork": "2df2430f71b6ddb8f98894b67ce4eeba0a8b7929705a7ff776cdd1319394b193",
    "celebrity": "d59745dc1b93440562a64b18c5b59880ca0325d333c15ee4eb3f3ac36c5c3ad2",
    "code_reasoning": "75d5ef264e62feca1e88fc1404d9d2fb71092ab29170a8cdc4e72093fbcecc54",
    "color": "80db0a575ff5423a41977908a071cccebd883ff3cf982284d69206a8f46ed164",
    "commonsense_reasoning": "78d3ce87a78b32494a1edff8070f37273c9316ded66f6236a62d68e64cbf1449",
    "count": "4f345dffeaf797f2bcbaae6d745089c4bb493ada2f38095162486b7a9a813a26",
    "existence": "bc4b44d619ea2e74f490821fb43cc9c8ab775a48d7a1f4825fd21b80ac6e94a0",
    "landmark": "8c4d947ac7ff563269322f5432a1f0d5eeb52b22a23cdb31019118a8df493300",
    "numerical_calculation": "6ecf7ce227783ef1d8ed085591a78c36decc0a5253f0d7ec538f8d52624aef87",
    "position": "ff5bddd07155b317a80a97d58b944ba466e461ddcbe43901c1a8b0984128fa89",
    "posters": "d170d2e2efd4d477d1936cf6f7074421935294972ada777d6f19300b158b102a",
    "scene": "15f55b8ebee512caf1663b3b9d1cc6953b58b40b9415a4ae3770a53ccc952615",
    "text_translation": "8078d3a955a69972be679625a3c27d8279c564295486aa192d42b19ccd720326",
}
"""Subtask -> `questions_hash` of its list in eval_tool: the release has the questions in a thousand files, one a picture."""


def is_official(benchmark: str, path: Path) -> bool | None:
    """Whether an index file is the published one, line ends and a byte order mark aside; None where no hash is known."""
    names = FILES.get(benchmark, {}).items()
    known = next((digest for name, digest in names if f"/{path.as_posix()}".endswith(f"/{name}")), None)
    if known is None:
        return None
    text = read_bytes(path).removeprefix(BOM).replace(b"\r\n", b"\n")
    return known in {sha256_bytes(text), sha256_bytes(text.replace(b"\n", b"\r\n"))}


def questions_hash(rows: Iterable[tuple[str, str, str]]) -> str:
    """The sha256 of questions in any order: (picture, question, answer), a picture without its suffix, spaces as one each."""
    lines = sorted(
        f"{Path(picture).stem}\t{' '.join(question.split())}\t{answer}\n" for picture, question, answer in rows
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()
