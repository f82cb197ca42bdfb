"""The bar of everything that takes long: how far, how fast, how long still."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from davsp.runtime import parallel


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="progress.data.speed")


def bar(console: Console) -> Progress:
    """Name, bar, count, rate and time left of each task; gone when done, silent on a quiet console and in all processes but the first."""
    columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=console.quiet or parallel.rank() > 0)
