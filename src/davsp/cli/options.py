"""Options that several commands have: single ones, and groups (see `davsp.cli.groups`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

TEST_SET, JUDGES = "Test set", "Judges"  # headings in --help

GRAMMAR = (
    "none; none:WAY (pictures shown in another way than --undefended says); safety-text; safety-text=TEXT; NAME=FOLDER of a prompt; adashield-s; adashield-s:prefix; "
    "pat:vicuna, pat:llama-2 or pat:transfer, the published strings behind AdaShield's text (pat:vicuna:alone without); ecso; ecso+INNER; "
    "ecso-adaptive+INNER; gate+INNER (looks through INNER and answers without: gate:answer, or with the thresholds of davsp gate gate:states, gate:first; then NAME=FOLDER may be a gate without a border; gate:KIND,ecso lets ECSO answer); intervention:TIMES, :plus, :minus or :to:NUMBER (with --vector), alone or +INNER. A text joins "
    "what follows it, too: adashield-s:prefix+INNER. INNER is any of these, or a bare FOLDER."
)
"""What --defense takes; `davsp.cli.defenses` reads it."""

Recipe = Annotated[
    str | None,
    typer.Option(
        help="published: the setting of the authors' code (docs/published.md), or own: davsp's. Other options win over it. Left "
        "out: own; in davsp reproduce published, but for the models that ship."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder to write into.")]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.")]
Resume = Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1, help="Only so many of each set (drawn; of your own queries the first).", rich_help_panel=TEST_SET
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Longest answer, in tokens; left out: 48 for the models that ship, 1024 for every other."),
]
GraderRuns = Annotated[
    int | None,
    typer.Option(
        "--grader-runs",
        min=1,
        help="How often the grader mm-vet is asked about each answer; the score is the mean (5 in the paper). Left out: 1.",
        rich_help_panel=JUDGES,
    ),
]
Benchmark = Annotated[
    list[str] | None,
    typer.Option(
        help="A published set, NAME=FOLDER: mm_safetybench, figstep, vlguard, mm_vet, mme, llava_bench, mossbench, siuo, mssbench, "
        "holisafe, mm_safetybench_pp. Repeatable."
    ),
]
SplitFile = Annotated[str | None, typer.Option("--split", help="FILE.json of davsp data split, to take queries from.")]
Rebuild = Annotated[
    bool, typer.Option("--rebuild", help="Typeset FigStep's and TYPO's pictures; the benchmark's name then says so.")
]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Go on past broken pictures and rows, and say what was left out.")
]


AllowOutside = Annotated[
    bool, typer.Option("--allow-outside", help="Take pictures from outside the folder of a file of queries, too.")
]
TrustEnv = Annotated[
    bool,
    typer.Option(
        "--trust-env", help="Reach servers through the proxies that HTTP_PROXY and the like name; else directly."
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    panel: ClassVar[str] = "Model"
    name: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Folder or hub id of the LVLM; left out: davsp-mini, which ships, as davsp-mini-narrow and "
            "davsp-mini-qwen do.",
        ),
    ] = None
    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit of the model.")] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto; left out: a GPU if there is one.")] = None
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; left out: float32 on CPU, bfloat16 on a GPU.")
    ] = None
    quantization: Annotated[str | None, typer.Option(help="4bit or 8bit, by bitsandbytes on a GPU.")] = None
    attn_implementation: Annotated[
        str | None,
        typer.Option(help="eager, sdpa, flash_attention_2, …, as transformers names them; left out: its choice."),
    ] = None
    canvas: Annotated[
        int | None,
        typer.Option(
            help="Side of the canvas in pixels, where the model takes many sizes (Qwen-VL, GLM, Mistral 3, tiles)."
        ),
    ] = None
    template: Annotated[
        str | None,
        typer.Option(
            help="Of LLaVA-1.5: checkpoint, or by LLaVA's own code llava_v1 (as DAVSP's authors) or vicuna_v1, with a system "
            "sentence. Left out: checkpoint; in davsp reproduce llava_v1."
        ),
    ] = None
    template_kwargs: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE that the checkpoint's chat template is told, such as enable_thinking=false; VALUE is JSON, else a text. "
            "Repeatable; a server gets them as chat_template_kwargs."
        ),
    ] = None
    undefended: Annotated[
        str | None,
        typer.Option(
            help="What is done to a picture that is not square and has no visual prompt: pad, or crop (LLaVA), …; left out: "
            "as the model's authors do. See docs/families.md."
        ),
    ] = None


@dataclass(frozen=True)
class ProcessOptions:
    """How many processes share the work."""

    panel: ClassVar[str] = "Processes"
    num_processes: Annotated[
        int,
        typer.Option(
            min=1, help="Processes on this machine that share the work; on several machines start it by torchrun."
        ),
    ] = 1
    gpus_per_process: Annotated[
        int | None, typer.Option(min=1, help="GPUs that hold the model of a process; left out: one.")
    ] = None


@dataclass(frozen=True)
class TestSetOptions:
    """What is asked: published sets, a user's own queries, or the embedded test."""

    panel: ClassVar[str] = TEST_SET
    queries: Annotated[
        Path | None,
        typer.Option("--queries", "--data", help="Folder or .jsonl of your own queries; left out: the embedded test."),
    ] = None
    benchmark: Benchmark = None
    split: Annotated[
        str,
        typer.Option(help="Of the published sets: a part by its name, or the test of a FILE.json of davsp data split."),
    ] = "test"
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            help="Picture types of MM-SafetyBench: sd_typo, sd, typo, text. Repeatable; left out: the first three.",
        ),
    ] = None
    rebuild: Rebuild = False
    skip_broken: SkipBroken = False
    allow_outside: AllowOutside = False

    @property
    def embedded(self) -> bool:
        """Whether the embedded test is asked, which is for the models that ship."""
        return not (self.queries or self.benchmark)


@dataclass(frozen=True)
class RowOptions:
    """The defenses that are the rows of a table."""

    panel: ClassVar[str] = "Defenses"
    prompt: Annotated[
        Path | None, typer.Option(help="Folder or hub id of a prompt: adds the row davsp, or additive for noise.")
    ] = None
    defense: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A row of the table, repeatable: {GRAMMAR} See docs/defenses.md. Left out: none, the safety text and "
            "--prompt."
        ),
    ] = None
    text: Annotated[
        str | None,
        typer.Option(
            help='Safety text of the row safety-text ("" leaves the row out); left out: the own one of a model that ships.'
        ),
    ] = None
    vector: Annotated[Path | None, typer.Option(help="Folder of a vector: records the projection of every answer.")] = (
        None
    )


@dataclass(frozen=True)
class MaliciousOptions:
    """Malicious queries to train on: a user's own, of a split file, or the embedded ones."""

    panel: ClassVar[str] = "Data"
    split: SplitFile = None
    benchmark: Benchmark = None
    malicious: Annotated[
        Path | None, typer.Option(help="Folder or .jsonl of malicious queries; left out: the embedded protocol's.")
    ] = None
    allow_outside: AllowOutside = False


@dataclass(frozen=True)
class DataOptions(MaliciousOptions):
    """Queries of both classes to fit or train on."""

    benign: Annotated[
        Path | None, typer.Option(help="Folder or .jsonl of benign queries; left out: the embedded protocol's.")
    ] = None


@dataclass(frozen=True)
class LoopOptions:
    """Of the loop that trains pixels; what is left out stays as the method has it."""

    panel: ClassVar[str] = "Training"
    steps: Annotated[int | None, typer.Option(help="How many.")] = None
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.")] = None
    optimizer: Annotated[str | None, typer.Option(help="sign or adam.")] = None
    lr: Annotated[float | None, typer.Option("--lr", "--alpha", help="Step in pixel units, white = 1.")] = None
    micro_batch: Annotated[int | None, typer.Option(help="Rows in memory at a time; left out: the whole batch.")] = None
    activation_checkpointing: Annotated[bool, typer.Option(help="Compute activations twice to save memory.")] = False


@dataclass(frozen=True)
class DefenderOptions:
    """The text model that writes AdaShield-A's prompts."""

    panel: ClassVar[str] = "Defender of AdaShield-A"
    defender: Annotated[str | None, typer.Option(help="Text model that writes prompts.")] = None
    defender_url: Annotated[
        str | None, typer.Option(help="Its OpenAI-compatible server, which sees the model's answers; left out: OpenAI.")
    ] = None
    defender_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable with its key; left out: OPENAI_API_KEY for OpenAI, no key else."),
    ] = None


JUDGE_URL = "The judge's OpenAI-compatible server; left out: OpenAI, and guards run here by transformers."
JUDGE_KEY = "Environment variable with the judge's key; left out: OPENAI_API_KEY for OpenAI, no key else."
EACH = " Of several judges NAME=VALUE for one of them, repeatable; a bare value is for all others."


@dataclass(frozen=True)
class JudgeOptions:
    """Where the judges are that ask a model."""

    panel: ClassVar[str] = JUDGES
    judge_url: Annotated[list[str] | None, typer.Option(help=JUDGE_URL + EACH)] = None
    judge_model: Annotated[
        list[str] | None,
        typer.Option(help=f"The model to ask; left out: a guard's own weights, if it runs here.{EACH}"),
    ] = None
    judge_key_env: Annotated[list[str] | None, typer.Option(help=JUDGE_KEY + EACH)] = None
    judge_max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest reply of a judge, its thought included; left out: a label's.")
    ] = None
    judge_sees: Annotated[
        list[str] | None,
        typer.Option(
            help="picture: a chat judge (davsp, davsp-mmsafety, mm-safetybench, adashield) is shown the request, its own "
            "picture and words, before the answer. Left out: the answer as published. Of several judges NAME=picture for "
            "one of them, repeatable."
        ),
    ] = None
    reasoning_tags: Annotated[
        str,
        typer.Option(
            help="Pairs of tags around what a model or judge thinks, as JSON, or none: judged is what follows. An empty "
            "first tag: the prompt opens the thought."
        ),
    ] = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'


@dataclass(frozen=True)
class VerdictOptions(JudgeOptions):
    """And what is done with their verdicts."""

    max_unscored: Annotated[
        float, typer.Option(min=0, max=1, help="Share of unscored answers above which the command fails.")
    ] = 0.02
    cache: Annotated[
        Path | None, typer.Option(help="File of verdicts to look up and add to; left out: one in the run's folder.")
    ] = None


@dataclass(frozen=True)
class OneJudgeOptions(VerdictOptions):
    """The same where there is one judge; two of the options have a second name."""

    judge_url: Annotated[list[str] | None, typer.Option("--judge-url", "--base-url", help=JUDGE_URL)] = None
    judge_key_env: Annotated[list[str] | None, typer.Option("--judge-key-env", "--api-key-env", help=JUDGE_KEY)] = None


@dataclass(frozen=True)
class RequestOptions:
    """Of requests to a server, the model's or a judge's."""

    panel: ClassVar[str] = "Requests to servers"
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests to a server under way at once; fewer where it is crowded.")
    ] = 8
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds for one request.")] = 300.0
    trust_env: TrustEnv = False


@dataclass(frozen=True)
class JudgeRequestOptions(RequestOptions):
    """Of requests to a judge alone, which answers in fewer words."""

    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds for one request.")] = 60.0
