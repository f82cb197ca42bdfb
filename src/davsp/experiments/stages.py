"""Steps of an experiment that leave their results on disk, each with a hash of what it was made from."""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rich.console import Console
from rich.markup import escape

from davsp.errors import DavspError
from davsp.lvlm import LVLM, fingerprint
from davsp.lvlm.undefended import not_square
from davsp.prompts.base import P, Prompt
from davsp.runtime import parallel
from davsp.runtime.files import alone, read_bytes, read_json, write_json
from davsp.runtime.files import sha256 as file_hash
from davsp.store import queries_hash
from davsp.training import TrainSettings, train
from davsp.training.checkpoint import METRICS
from davsp.vector import HarmfulnessVector

if TYPE_CHECKING:
    from davsp.embedded.data import Protocol

T = TypeVar("T")


@dataclass
class Stages:
    """Results on disk, each with a hash of its inputs; prints a line a stage.

    Attributes:
        seconds: stage -> what it took when it was made, also where it is kept from a run before.
    """

    out: Path
    console: Console

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = {}
        if parallel.rank() > 0:
            self.console = Console(quiet=True)

    def run(
        self, name: str, inputs: Any, make: Callable[[bool], object], load: Callable[[], T], together: bool = False
    ) -> T:
        """What `load` reads, after `make(resume)` if it is not there or not whole.

        resume is False where the inputs have changed; the folder of the stage's training is deleted then. Meanwhile no other
        process runs a stage of the same folder.

        Args:
            together: several processes share the work of `make`, and all call it; else the first one alone does.

        Raises:
            DavspError: another process runs one, or what `make` and `load` raise.
        """
        with nullcontext() if parallel.rank() > 0 else alone(self.out / "stages"):
            return self._run(name, inputs, make, load, together)

    def _run(self, name: str, inputs: Any, make: Callable[[bool], object], load: Callable[[], T], together: bool) -> T:
        first = parallel.rank() == 0
        path = self.out / "stages" / f"{name}.json"
        digest = sha256(json.dumps(inputs, default=str).encode()).hexdigest()
        record: dict[str, Any] = read_json(path) if path.exists() else {}
        same = bool(record) and record["inputs"] == digest
        whole, result = False, None
        if first and same and record["done"]:
            try:
                whole, result = True, load()
            except DavspError as error:
                whole = False
                self.console.print(
                    f"[yellow]{name}: made anew, as what was kept is not whole ({escape(str(error))})[/]"
                )
        same, whole = parallel.shared((same, whole))
        if whole:
            self.line(name, f"kept; it took {record['seconds']:.1f} s", 0.0)
            self.seconds[name] = round(record["seconds"], 2)
            return cast(T, result) if first else load()
        if first:
            self._begin(name, same, bool(record))
            write_json(path, {"inputs": digest, "done": False})
        start = time.perf_counter()
        parallel.wait()
        if together:
            make(same)
        elif first:
            with parallel.alone():
                make(same)
        parallel.wait()
        made = load()
        seconds = time.perf_counter() - start
        if first:
            write_json(path, {"inputs": digest, "done": True, "seconds": seconds})
        self.line(name, "made" if not same else "finished", seconds)
        return made

    def _begin(self, name: str, same: bool, before: bool) -> None:
        """Remove what rests on other inputs; before the new ones are noted: a kill in between must not leave a checkpoint of the
        old ones to go on from."""
        if same:
            return
        if before:
            self.console.print(f"[yellow]{name}: made anew, as what it rests on has changed[/]")
        if (old := self.out / "train" / name).exists():
            shutil.rmtree(old)

    def line(self, name: str, note: str, seconds: float) -> None:
        self.seconds[name] = round(seconds, 2)
        self.console.print(f"[bold]{name:<10}[/] {seconds:7.1f} s  {note}", highlight=False)


def fitted_vector(stages: Stages, lvlm: LVLM, data: "Protocol", text: str) -> HarmfulnessVector:
    """The vector with its layer chosen on held-out queries, or where there are none on those it is made of."""
    folder = stages.out / "vector"
    sets = (data.vector_malicious, data.vector_benign, data.sweep_malicious, data.sweep_benign)

    def make(resume: bool) -> None:
        vector = HarmfulnessVector.fit(
            lvlm, data.vector_malicious, data.vector_benign, text, progress=not stages.console.quiet
        )
        if data.sweep_malicious and data.sweep_benign:
            vector.sweep(lvlm, data.sweep_malicious, data.sweep_benign, text, progress=not stages.console.quiet)
        if parallel.rank() == 0:
            vector.save(folder)

    inputs = [fingerprint(lvlm), text, *(queries_hash(queries) for queries in sets)]
    if lvlm.undefended == "pad" and any(map(not_square, sets)):
        inputs.append("pad")  # in white; older vectors are of other pictures
    return stages.run("vector", inputs, make, lambda: HarmfulnessVector.load(folder), together=True)


def trained_prompt(
    stages: Stages,
    name: str,
    start: P,
    lvlm: LVLM,
    data: "Protocol",
    vector: HarmfulnessVector,
    settings: TrainSettings,
    saved: Path,
    vector_file: Path | None = None,
) -> P:
    """Train `start` on the protocol's training queries, save it in `saved`; the prompt as it reads back from there.

    Args:
        vector_file: where the vector was saved; None: by `fitted_vector` in the same stages' folder.
    """
    folder = stages.out / "train" / name

    def make(resume: bool) -> None:
        probe = [*data.sweep_malicious, *data.sweep_benign]
        if parallel.rank() == 0 and resume and folder.exists() and not (folder / METRICS).exists():
            shutil.rmtree(folder)  # a checkpoint without its metrics can't be gone on from
        parallel.wait()
        progress = not stages.console.quiet
        sets = data.train_malicious, data.train_benign
        prompt: Prompt = train(lvlm, start, *sets, vector, settings, folder, resume, progress, _pictured(probe))
        if parallel.rank() == 0:
            prompt.save_pretrained(saved)

    sizes = {name: getattr(start, name, None) for name in ("padding", "eps")}
    kind = {"kind": start.kind, "text": start.text, **sizes}
    if getattr(start, "resizes", 1) != 1:
        kind["resizes"] = 2
    vector_hash = file_hash(vector_file or stages.out / "vector" / "vector.safetensors")
    sets = data.train_malicious, data.train_benign, data.sweep_malicious, data.sweep_benign
    inputs = [fingerprint(lvlm), kind, settings.model_dump(), vector_hash, *map(queries_hash, sets)]

    def load() -> P:
        records(folder / METRICS)  # the report draws them
        if not saved.is_dir():  # from_pretrained would take the name for one on the hub
            raise DavspError(f"there is no folder {saved}")
        return type(start).from_pretrained(saved)

    return stages.run(name, inputs, make, load, together=True)


def _pictured(queries: list[Any]) -> list[Any]:
    return [q for q in queries if q.image is not None]


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a training's metrics.

    Raises:
        DavspError: one of them is no JSON.
    """
    try:
        return [json.loads(line) for line in read_bytes(path).splitlines() if line]
    except ValueError as error:
        raise DavspError(f"{path} is damaged ({error}); delete the folder of that training to make it anew") from error
