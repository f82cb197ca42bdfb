"""The six benchmarks of the paper, one module each: `load` what was downloaded, `check` it, and score as its authors do."""

from pathlib import Path
from types import ModuleType

from davsp.benchmarks import figstep, llava_bench, mm_safetybench, mm_vet, mme, vlguard
from davsp.benchmarks.source import Report
from davsp.errors import DavspError

BENCHMARKS: dict[str, ModuleType] = {
    module.NAME: module for module in (mm_safetybench, figstep, vlguard, mm_vet, mme, llava_bench)
}

__all__ = ["BENCHMARKS", "check", "figstep", "llava_bench", "mm_safetybench", "mm_vet", "mme", "vlguard"]


def check(root: Path) -> list[Report]:
    """A report of every data set in `root`, which holds one, or folders that hold one each.

    What cannot be read at all is a report with that as its only fault.

    Raises:
        DavspError: `root` is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise DavspError(f"{root} is no folder; give the one that holds the data sets.")
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    found = []
    for name in BENCHMARKS:
        here = _check(name, root)
        below = [] if here.layout else [_check(name, folder) for folder in folders]
        found += [report for report in [here, *below] if report.layout]
    return found


def _check(name: str, folder: Path) -> Report:
    try:
        return BENCHMARKS[name].check(folder)
    except DavspError as error:
        return Report(name, folder, "unreadable", broken=(str(error),))
