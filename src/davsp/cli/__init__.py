"""The command line: parse, call the Python API, print. Heavy imports stay inside the commands, so that help is quick."""

import errno
import sys
import time
from typing import Any

import typer
from typer.core import TyperGroup

from davsp.cli import (
    attack,
    baseline,
    canaries,
    corruptions,
    data,
    evaluate,
    gate,
    judge,
    mini,
    prompt,
    published,
    reproduce,
    serve,
    train,
    web,
)
from davsp.cli.groups import add
from davsp.cli.inputs import complain, say
from davsp.errors import DavspError, Interrupted, Lost, words_of

STOPPED = (
    "stopped; what was finished is kept (stages of demo, checkpoints of train, answers of eval): "
    "give the same command again to go on from there."
)


class Commands(TyperGroup):
    """All commands; Ctrl-C in any of them says how to go on, where typer would end without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted(STOPPED) from None


def doctor() -> None:
    """Versions, devices and optional parts; what is broken or missing, and how to mend it (exit code 2 if broken)."""
    from rich.console import Console

    from davsp.doctor import examine, print_findings

    findings = examine()
    print_findings(Console(), findings)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(2)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Visual safety prompts: a trained picture frame that keeps a frozen vision-language model safe (DAVSP).",
)
add(app, train.demo)
add(app, train.vector)
add(app, train.train)
app.add_typer(baseline.app, name="baseline")
add(app, evaluate.evaluate, "eval")
add(app, judge.judge)
add(app, attack.attack)
add(app, corruptions.corruptions)
add(app, reproduce.reproduce)
add(app, prompt.apply)
add(app, prompt.info)
add(app, prompt.card)
add(app, gate.gate)
add(app, prompt.push)
add(app, published.import_published)
add(app, serve.serve)
add(app, serve.serve_model)
add(app, canaries.check)
add(app, web.app)
add(app, doctor)
app.add_typer(mini.app, name="mini")
app.add_typer(data.app, name="data")


_MENDS = {
    errno.ENOSPC: "; free space",
    errno.EDQUOT: "; free space",
    errno.EACCES: "; choose another folder",
    errno.EPERM: "; choose another folder",
    errno.EROFS: "; choose another folder",
}


def main() -> None:
    """Entry point: one sentence and exit code 2 for what the user can mend, 130 for Ctrl-C."""
    try:
        sys.argv[1:] = baseline.from_train(sys.argv[1:])  # before other processes are started by the same words
        app(standalone_mode=True)
    except Interrupted as stop:
        say(f"{stop}")
        sys.exit(130)
    except Lost as error:
        _leave(error)
    except DavspError as error:
        complain(f"davsp: {_explained(error) or error}")
        sys.exit(2)
    except OSError as error:  # a full disk, a folder without permission; some libraries raise it for what is no file
        why = (error.strerror or words_of(error)) + _MENDS.get(error.errno or 0, "")
        complain(f"davsp: {error.filename} cannot be used: {why}" if error.filename else f"davsp: {why}")
        sys.exit(2)
    except (ImportError, RuntimeError) as error:
        known = _explained(error)
        if known is None:
            raise
        complain(f"davsp: {known}")
        sys.exit(2)


def _leave(error: Lost) -> None:
    """End for another's sake: a second later than that one, so that launchers see first who failed."""
    from davsp.runtime.launch import LOST, launched

    if not launched():
        complain(f"davsp: {error}")
    time.sleep(1)
    sys.exit(LOST)


def _explained(error: Exception) -> str | None:
    from davsp.doctor import explain_import_error

    return explain_import_error(error)
