"""Hooks of mkdocs: pages made from files that the repository holds already, and links that leave docs/.

The start page is README.md. A link to another Markdown file of the repository (a model's card, a table of results) becomes a
page of its own; a link to anything else outside docs/ is copied beside it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?!https?:|mailto:|#)(?P<to>[^)#\s]+)(?P<at>#[^)\s]*)?\)")
API = """# Python

What `import davsp` gives; it is cheap, torch comes with the first name that is used.

"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the start page, both references, and what pages link to outside docs/."""
    pages: dict[str, str | bytes] = {
        "index.md": (ROOT / "README.md").read_text(),
        "reference/cli.md": command_line(),
        "reference/api.md": API + "\n\n".join(f"::: {name}" for name in public()),
    }
    waiting = [(f.src_uri, f.content_string) for f in files.documentation_pages()] + [
        ("index.md", str(pages["index.md"]))
    ]
    while waiting:
        page, text = waiting.pop()
        for link in LINK.finditer(text):
            target = outside(page, link["to"])
            if target is None or target.startswith("docs/") or site_name(target) in pages:
                continue
            path = ROOT / target
            if not path.exists():
                raise PluginError(f"docs: {page} links to {link['to']}, which is not in the repository")
            if path.is_dir():
                continue
            pages[site_name(target)] = path.read_text() if path.suffix == ".md" else path.read_bytes()
            if path.suffix == ".md":
                waiting.append((site_name(target), path.read_text()))
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ to their pages; of a link to a folder only the words stay."""
    here = page.file.src_uri

    def follow(link: re.Match[str]) -> str:
        target = outside(here, link["to"])
        if target is None:
            return link[0]
        if (ROOT / target).is_dir():
            return link["text"]  # a folder has no page
        return f"[{link['text']}]({relative(site_name(target), here)}{link['at'] or ''})"

    return LINK.sub(follow, markdown)


SOURCES = {"index.md": "README.md"}
"""Page of the site -> its file in the repository; the others are docs/PAGE."""


def outside(page: str, link: str) -> str | None:
    """The path in the repository that a link means; None if it goes from one page of docs/ to another as it stands.

    Args:
        page: of the site.
        link: as it is written.
    """
    where = SOURCES.get(page, f"docs/{page}")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(where), link))
    return None if page not in SOURCES and target.startswith("docs/") else target


def site_name(target: str) -> str:
    """Where a file of the repository stands in the site."""
    if target == "README.md" or target.startswith("docs/"):
        return "index.md" if target == "README.md" else target.removeprefix("docs/")
    name = f"repository/{target}"
    if Path(target).name == "README.md":
        name = f"repository/{posixpath.basename(posixpath.dirname(target))}.md"
    SOURCES[name] = target
    return name


def relative(name: str, page: str) -> str:
    return posixpath.relpath(name, posixpath.dirname(page) or ".")


def command_line() -> str:
    """The help of every command, as Typer has it."""
    import typer
    from typer.cli import get_docs_for_click

    from davsp.cli import app

    command = typer.main.get_command(app)
    whole_summaries(command)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="davsp"), name="davsp")
    return re.sub(r"^# .*$", "# Command line", text, count=1, flags=re.MULTILINE)


def whole_summaries(command: Any) -> None:
    """Have each command below listed with its whole first line, which would be cut after some words."""
    for each in getattr(command, "commands", {}).values():
        each.short_help = (each.help or "").strip().partition("\n")[0]
        whole_summaries(each)


def public() -> list[str]:
    """Every public name with the module that it comes from: `import davsp` itself holds none before it is used."""
    import davsp

    return [f"{getattr(davsp, name).__module__}.{name}" for name in davsp.__all__ if name[0] != "_"]
