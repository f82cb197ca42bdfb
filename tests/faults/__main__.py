"""`make faults`: all parts with fixed seeds and counts; writes docs/reliability.md, and ends with exit code 1 if a promise is broken.

python -m faults [PART ...]    some parts alone; the page is left as it is
"""

import logging
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from davsp.runtime.files import write_text
from davsp.serve.pictures import quiet
from faults import Seen, bodies, floods, kills, pictures, replies

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
LIBRARIES = ("pillow", "httpx2", "httptools", "uvicorn", "starlette", "pybase64", "torch")


class Part(NamedTuple):
    """One part with what it sends, what must hold, and how much of it is tried."""

    run: Callable[[int, int], Seen]
    sends: str
    holds: str
    seed: int
    count: int


PARTS = {
    "bodies": Part(
        bodies.run,
        "requests to `/v1/chat/completions` and `/v1/responses`: good ones, changed in up to three places of their JSON (values, keys, types, "
        "pictures put or spread into texts), written in several ways, some with changed bytes",
        "never a 5xx; a refusal has OpenAI's shape and sends nothing on. In what leaves, every picture is a canvas with the defense's frame, every "
        "question has its text, and nothing else is a picture: no data URL, no `![](…)`, in any text, key or JSON in a text, nor where texts are joined",
        0, 20_000,
    ),
    "pictures": Part(
        pictures.run,
        "pictures drawn in every mode of PNG, JPEG and WebP, interlaced, with 16 bits, palettes, transparency, EXIF turns, odd chunks; animated ones, "
        "other formats; whole, cut, with bytes behind or changed, with another head, with a false size, small files of many pixels",
        "a 200 has exactly the canvas that `davsp eval` makes of the same file; else a 400 in shape. A whole picture is never refused",
        0, 6000,
    ),
    "judge": Part(
        replies.judge,
        "replies of a judge's server: 30 % are faults (errors, waits, cut, packed, deep, huge, no HTTP, prose, labels in disguise, thoughts), "
        "each with the wrong label wherever there is room",
        "no verdict is made up, none is lost, none is asked for again once it was there",
        0, 4000,
    ),
    "upstream": Part(
        replies.upstream,
        "replies of the model's server to the proxy, whole and as streams, odd, broken and changed, before a border and before ECSO",
        "the upstream's own bytes, or an error in shape; a stream that breaks says so; ECSO gives no answer that the model did not give",
        0, 5000,
    ),
    "floods": Part(
        floods.run,
        f"{floods.CLIENTS} clients at once with bodies, heads, paths, values, nesting and pictures beyond what is held, and clients that hang up",
        "each reads its 4xx although it sends all first; another client's texts are all answered; all room is given back",
        0, 600,
    ),
    "kills": Part(
        kills.run,
        "`davsp eval`, killed at a file operation (with what was not flushed lost in part) or at any other moment, and started again",
        "the files of a run that was not killed; at most one batch is answered again for each kill; nothing is left behind",
        0, 20,
    ),
}  # fmt: skip

START = """# Reliability

`make faults` wrote this page; edit `tests/faults/`, not this. It sends davsp what nobody writes by hand, drawn by fixed seeds, and looks at what comes out by rules of its own. A short form of each part is in `make test`. What is promised is in [SECURITY.md](../SECURITY.md).
"""
END = """
## What libraries did

In words, as nothing is committed that breaks other software.

- **Pillow** answers broken files with errors of many kinds, some of them no `OSError`. So whatever its decoders raise counts as a broken picture. It warns of odd EXIF and chunks, each in a text of its own. Python keeps every such text, so a client could have filled memory and log slowly. `davsp serve` ignores its warnings since this was seen.
- **Pillow** passes over broken EXIF when it opens a JPEG, and reads it anew in a copy of another mode, where it raises `SyntaxError`. So a grey or CMYK JPEG whose EXIF names no byte order was a 500 of the proxy (nothing was sent on). Pictures that are made plain RGB now leave it behind.
- **Pillow** takes a file whose last bytes are missing for whole if the pixels are all there. `davsp eval` and the proxy then read the same pixels.
- **json** gives up on deep nesting with `RecursionError`, and on a number of more than 4,300 digits with `ValueError`. Both are counted or caught before they matter.
- **email.utils** raises `OverflowError` and others at odd dates in `Retry-After`. They count as no wait.
- **httptools** keeps a header until it is whole, whatever its length. `davsp serve` counts the bytes before it sees them.

## What this does not show

Time and memory under load: `python perf/proxy.py --hostile` measures these. Model families, training, and a machine that loses power in earnest. Faults are drawn from what we thought of: none seen here means that these are mended, not that there are no others.
"""


def page(seen: dict[str, Seen], seconds: dict[str, float]) -> str:
    """The page, in Markdown."""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines = [
        START,
        f"On {datetime.now(UTC):%Y-%m-%d}: davsp {version('davsp')}, Python {platform.python_version()} on {platform.system()}, {libraries}.",
        "",
        "| part | seed | inputs | broken promises | seconds |",
        "|---|---|---|---|---|",
        *(
            f"| [{name}](#{name}) | {PARTS[name].seed} | {one.tried:,} | **{len(one.broken)}** | {seconds[name]:.0f} |"
            for name, one in seen.items()
        ),
    ]
    for name, one in seen.items():
        sends, holds = PARTS[name].sends, PARTS[name].holds
        lines += ["", f"## {name}", "", f"**Sent:** {sends}.", "", f"**Must hold:** {holds}.", ""]
        lines += ["| what came of it | times |", "|---|---|"]
        lines += [f"| {what} | {often:,} |" for what, often in sorted(one.outcomes.items())]
    return "\n".join(lines) + "\n" + END


def main(names: list[str]) -> int:
    """Run and show; 1 if a promise is broken."""
    quiet()  # as `davsp serve` does
    logging.disable(logging.WARNING)  # uvicorn tells of each request that is none
    seen, seconds = dict[str, Seen](), dict[str, float]()
    for name in names or PARTS:
        part, start = PARTS[name], time.monotonic()
        seen[name] = part.run(part.seed, part.count)
        seconds[name] = time.monotonic() - start
        print(f"{name}: {seen[name].tried:,} tried, {len(seen[name].broken)} broken, {seconds[name]:.0f} s", flush=True)
        for one in seen[name].broken[:20]:
            print("  " + one)
    if not names:
        write_text(PAGE, page(seen, seconds))
        print(f"wrote {PAGE}")
    return int(any(one.broken for one in seen.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
