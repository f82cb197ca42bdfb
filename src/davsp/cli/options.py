"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub id of the LVLM; left out: davsp-mini, which ships, as davsp-mini-narrow and davsp-mini-qwen do."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Hub branch, tag or commit of the model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto; left out: a GPU if there is one.")]
Malicious = Annotated[
    Path | None, typer.Option(help="Folder or .jsonl of malicious queries; left out: the embedded protocol's.")
]
Benign = Annotated[
    Path | None, typer.Option(help="Folder or .jsonl of benign queries; left out: the embedded protocol's.")
]
Out = Annotated[Path, typer.Option(help="Folder to write into.")]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.")]
Canvas = Annotated[
    int | None, typer.Option(help="Side of the canvas in pixels, where the model takes many sizes (Qwen2-VL).")
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; left out: float32 on CPU, bfloat16 on a GPU.")
]
Quantization = Annotated[str | None, typer.Option(help="4bit or 8bit, by bitsandbytes on a GPU.")]
Processes = Annotated[
    int, typer.Option("--num-processes", min=1, help="Processes on this machine, a GPU each; the work is shared.")
]
Queries = Annotated[
    Path | None,
    typer.Option("--queries", "--data", help="Folder or .jsonl of your own queries; left out: the embedded test."),
]
Benchmark = Annotated[
    list[str] | None,
    typer.Option(
        help="A published set, NAME=FOLDER: mm_safetybench, figstep, vlguard, mm_vet, mme, llava_bench. Repeatable."
    ),
]
Split = Annotated[
    str, typer.Option(help="Of the published sets: a part by its name, or the test of a FILE.json of davsp data split.")
]
SplitFile = Annotated[str | None, typer.Option("--split", help="FILE.json of davsp data split, to take queries from.")]
Rebuild = Annotated[
    bool, typer.Option("--rebuild", help="Typeset FigStep's and TYPO's pictures; the benchmark's name then says so.")
]
Types = Annotated[
    list[str] | None,
    typer.Option(
        "--type",
        help="Picture types of MM-SafetyBench: sd_typo, sd, typo, text. Repeatable; left out: the first three.",
    ),
]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Go on past broken pictures and rows, and say what was left out.")
]
JUDGE_URL = "The judge's OpenAI-compatible server; left out: OpenAI, and guards run here by transformers."
JUDGE_KEY = "Environment variable with the judge's key; left out: OPENAI_API_KEY for OpenAI, no key else."
EACH = " Of several judges NAME=VALUE for one of them, repeatable; a bare value is for all others."
JudgeUrl = Annotated[list[str] | None, typer.Option("--judge-url", help=JUDGE_URL + EACH)]
JudgeKey = Annotated[list[str] | None, typer.Option("--judge-key-env", help=JUDGE_KEY + EACH)]
JudgeModel = Annotated[
    list[str] | None,
    typer.Option(help=f"The model to ask; left out: a guard's own weights, if it runs here.{EACH}"),
]
GraderRuns = Annotated[
    int | None,
    typer.Option(
        "--grader-runs",
        min=1,
        help="How often the grader mm-vet is asked about each answer; the score is the mean (5 in the paper). Left out: 1.",
    ),
]
MaxUnscored = Annotated[
    float, typer.Option(min=0, max=1, help="Share of unscored answers above which the command fails.")
]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests to a server under way at once; fewer after a 429.")]
Timeout = Annotated[float, typer.Option(min=0.01, help="Seconds for one request.")]
Cache = Annotated[
    Path | None, typer.Option(help="File of verdicts to look up and add to; left out: one in the run's folder.")
]
