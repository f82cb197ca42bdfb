"""Starting the processes that share a piece of work, by torch's own launcher, and which GPUs each may use.

`--num-processes N` starts N on this machine. On several machines the user calls torchrun on each; davsp then starts none.
"""

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from davsp.errors import DavspError
from davsp.runtime import parallel

VISIBLE = "CUDA_VISIBLE_DEVICES"
RUN, OURS = "TORCHELASTIC_RUN_ID", "davsp-"
LOST = 3  # exit code of a process that ends because another has ended
SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    *(getattr(signal, name) for name in ("SIGHUP", "SIGQUIT") if hasattr(signal, name)),
)

Entry = tuple[str | Callable[..., Any], tuple[str, ...], str]


def launched() -> bool:
    """Whether `launch` started this process; it then says for all why one of them has ended."""
    return os.environ.get(RUN, "").startswith(OURS)


def launch(command: Sequence[str], count: int) -> int:
    """Run `davsp COMMAND` as `count` processes that find each other; returns the exit code of the one that failed first.

    Process 0 has the terminal; of another only the last line of its errors is shown, if it fails. One that fails ends all.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    entry, words, method = _entry(command)
    before = {number: signal.getsignal(number) for number in SIGNALS}  # the launcher sets its own and leaves them
    disabled = logging.root.manager.disable
    with tempfile.TemporaryDirectory() as logs:
        hidden = {i: Std.ALL if i else Std.NONE for i in range(count)}
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=OURS + uuid.uuid4().hex, rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0, monitor_interval=0.05, start_method=method,
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=hidden), shutdown_timeout=120,  # a step may be under way
        )  # fmt: skip
        logging.disable(logging.CRITICAL)  # its words on every process that ends
        try:
            elastic_launch(config, entry)(*words)
        except ChildFailedError as error:
            return _ended({rank: failure.exitcode for rank, failure in error.failures.items()}, count, Path(logs))
        except SignalException as stop:  # the processes were told: process 0 saves and says so
            if stop.sigval != signal.SIGINT:
                print(f"davsp: stopped by {stop.sigval.name}; give the same command again to go on.", file=sys.stderr)
            return 128 + stop.sigval
        finally:
            logging.disable(disabled)
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0


def _entry(command: Sequence[str]) -> Entry:
    """What every process runs, its arguments, and how a Python function is started, if it is one."""
    return sys.executable, ("-m", "davsp.cli", *command), "spawn"


def _ended(codes: Mapping[int, int], count: int, logs: Path) -> int:
    """Say why a run has ended, if process 0 has not said so itself; returns the exit code.

    Args:
        codes: number of the process -> how it ended, below 0 by a signal. Those that were ended for another's sake are among them.
    """
    likely = {-signal.SIGTERM: 2, LOST: 1}
    rank, code = min(codes.items(), key=lambda one: (likely.get(one[1], 0), one[1] >= 0, one[0]))
    who = f"process {rank} of {count} (numbered from 0)"
    if code < 0:
        name = signal.Signals(-code).name
        why = "; often the machine's memory was full" if code == -signal.SIGKILL else ""
        print(f"davsp: {who} was ended by {name}{why}: give the same command again to go on.", file=sys.stderr)
        return 2
    if rank > 0:
        words = [
            line for path in logs.rglob(f"{rank}/stderr.log") for line in path.read_text(errors="replace").splitlines()
        ]
        words = [line.strip(" │") for line in words if any(map(str.isalnum, line))]  # a panel's last line is its frame
        last = words[-1] if words else "it left no word"
        print(last if last.startswith("davsp: ") else f"davsp: {who} failed: {last}", file=sys.stderr)
    elif code == LOST:
        print(f"davsp: {who} lost the others; give the same command again to go on.", file=sys.stderr)
    return code


def take_gpus(each: int | None) -> str | None:
    """Leave to this process the GPUs that are its own by its number on this machine (LOCAL_RANK); no other is seen from here on.

    To be called before anything asks CUDA.

    Args:
        each: GPUs a process; None: one where there are several processes.

    Returns:
        Where a model is put if the user does not say; None: the usual place.

    Raises:
        DavspError: there are fewer GPUs than asked for; without any, `each` is refused.
    """
    import torch

    if each is None and parallel.processes() == 1:
        return None
    count = torch.cuda.device_count()  # by the driver's own library, so that CUDA is not set up yet
    if count == 0:
        if each is not None:
            raise DavspError("--gpus-per-process needs GPUs, and there is none here; leave it out.")
        return None
    size = each or 1
    check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), size)
    names = os.environ[VISIBLE].split(",") if os.environ.get(VISIBLE) else [str(i) for i in range(count)]
    first = int(os.environ.get("LOCAL_RANK", 0)) * size
    os.environ[VISIBLE] = ",".join(names[first : first + size])
    if torch.cuda.device_count() != size:
        raise DavspError(
            f"GPU {os.environ[VISIBLE]} cannot be set apart for process {parallel.rank()}; start it with {VISIBLE} set."
        )
    return "auto" if size > 1 else "cuda"


def check_gpus(processes: int, each: int | None) -> None:
    """Raises DavspError if processes on this machine need more GPUs than it has; one that has none is passed over."""
    import torch

    count = torch.cuda.device_count()
    if count and processes * (each or 1) > count:
        raise DavspError(
            f"{processes} processes with {each or 1} GPU{'s' if (each or 1) > 1 else ''} each are more than the {count} GPUs here; "
            "give fewer."
        )
