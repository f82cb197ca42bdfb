"""The pages say what is there: paths, modules, names, commands and options exist; the tree names every room."""

import ast
import json
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import davsp
from davsp.cli import app

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "davsp"
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS: Any = typer.main.get_command(app)
OTHERS = {"--no-deps", "--require-hashes", "--no-log-images", "--mm-processor-kwargs", "--chat-template"}
"""Options of other people's commands."""
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_map_names_every_room_in_the_order_of_imports() -> None:
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    rooms = {path.name + "/" for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    rooms |= {path.name for path in SOURCE.glob("*.py") if path.name != "__init__.py"}
    listed = re.findall(r"── (\S+)", tree)
    assert set(listed) == rooms and len(listed) == len(rooms)
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    level = {room: i for i, layer in enumerate(contract["layers"]) for room in layer.split(" | ")}
    levels = [level[room.removesuffix("/").removesuffix(".py")] for room in listed]
    assert levels == sorted(levels)  # the order in which rooms may import, as `make lint` checks it


def test_the_table_of_the_readme_is_the_committed_run() -> None:
    rows = json.loads((ROOT / "results" / "demo" / "metrics.json").read_text())["rows"]
    figures = {(r["defense"], r["benchmark"], r["metric"]): r for r in rows if r["split"] == "total"}
    columns = [*((form, "rsr") for form in ("sd", "typo", "sd_typo", "figstep")), ("utility", "accuracy")]
    columns.append(("benign", "over_refusal"))
    lines = (ROOT / "README.md").read_text().split("|---|---|---|---|---|---|---|\n")[1].splitlines()
    for defense, line in zip(
        ("none", "safety-text", "random-border", "additive", "davsp", "gate"), lines, strict=False
    ):
        cells = [
            "{value:.0f} <sub>{low:.0f}–{high:.0f}</sub>".format(
                **{name: 100 * figures[defense, *column][name] for name in ("value", "low", "high")}
            )
            for column in columns
        ]
        assert [cell.strip() for cell in line.split("|")[2:-1]] == cells, defense


def test_pages_that_the_code_names_exist() -> None:
    files = [path for path in SOURCE.rglob("*") if path.suffix in (".py", ".j2")]
    pages = {page for path in files for page in re.findall(r"docs/[\w-]+\.md", path.read_text())}
    assert len(pages) > 5 and [page for page in sorted(pages) if not (ROOT / page).exists()] == []


@each_page
def test_every_path_exists(page: Path) -> None:
    text = page.read_text()
    paths = re.findall(r"(?<![\w/.-])((?:src|tests|perf|runs|docs|results)/[\w./-]*[\w/])", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@each_page
def test_every_module_and_name_exists(page: Path) -> None:
    text = page.read_text()
    dotted = set(re.findall(r"(?<![\w/.`'-])`?(davsp(?:\.\w+)+)", text)) - {"davsp.pt"}
    assert [name for name in dotted if not _is_there(name.split(".")[1:])] == []
    for file, name in re.findall(r"`([\w/]+\.py)::([\w.]+)", text):
        assert (SOURCE / file).exists(), file
        assert _defines(SOURCE / file, name.split(".")), f"{file} has no {name}"


@each_page
def test_every_import_works(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "davsp":
                parts = str(node.module).split(".")[1:]
                assert [alias.name for alias in node.names if not _is_there([*parts, alias.name])] == []


@each_page
def test_every_command_has_the_options(page: Path) -> None:
    """In blocks of commands, and in a line of text."""
    for line in _commands(page.read_text()):
        command, name, words = COMMANDS, "davsp", line.split()
        while hasattr(command, "commands") and words and re.match("[a-z]", words[0]):
            name, words = f"{name} {words[0]}", words[1:]
            assert name.split()[-1] in command.commands, name
            command = command.commands[name.split()[-1]]
        options = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
        assert options <= {*_options(command), "--help", "--method"}, name  # the old form: for one release


@each_page
def test_every_option_is_one_of_some_command(page: Path) -> None:
    known = {option for command in _all(COMMANDS) for option in _options(command)}
    scripts = "".join(path.read_text() for path in (ROOT / "perf").glob("*.py"))
    options = re.findall(r"`(--[\w-]+)", page.read_text())
    assert [o for o in options if o not in known | OTHERS and o[2:].replace("-", "_") not in scripts] == []


def test_the_pages_hold_what_is_looked_for() -> None:
    """A pattern that finds nothing would find every page right."""
    text = "\n".join(page.read_text() for page in PAGES)
    patterns = (
        r"`([\w/]+\.py)::([\w.]+)",
        r"`(--[\w-]+)",
        r"^```python\n",
        r"(?<![\w/.-])(?:src|tests|docs|results)/[\w./-]",
    )
    assert min(len(re.findall(pattern, text, re.MULTILINE)) for pattern in patterns) >= 10
    assert len(_commands(text)) > 100


def _all(command: Any) -> list[Any]:
    """A command and those below it."""
    inner = getattr(command, "commands", {}).values()
    return [command, *(one for each in inner for one in _all(each))]


def _options(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def _commands(text: str) -> list[str]:
    """What follows `davsp` in every shell line and code span of a page, continued lines joined, without comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(block for language, block in blocks if language in ("", "sh")).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.split(r"&&|;", line.partition(" #")[0])]
    spans = re.findall(r"`(davsp [^`\n]+)`", text)
    return [line.removeprefix("davsp ") for line in (*parts, *spans) if re.match(r"davsp [a-z-]", line)]


def _is_there(parts: list[str]) -> bool:
    """Whether davsp.PARTS is a module, or a name in one."""
    place = SOURCE
    for i, part in enumerate(parts):
        if (place / part).is_dir():
            place = place / part
        elif (place / f"{part}.py").exists():
            return i + 1 == len(parts) or _defines(place / f"{part}.py", parts[i + 1 :])
        else:
            return (place == SOURCE and part in davsp.__all__) or _defines(place / "__init__.py", parts[i:])
    return True


def _defines(file: Path, parts: list[str]) -> bool:
    """Whether a file defines or imports a name; of a class the next part is its method."""
    body = _tree(file).body
    for part in parts:
        for node in body:
            if part in _names(node):
                body = node.body if isinstance(node, ast.ClassDef) else []
                break
        else:
            return False
    return True


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _names(node: ast.stmt) -> set[str]:
    match node:
        case ast.ClassDef() | ast.FunctionDef():
            return {node.name}
        case ast.ImportFrom() | ast.Import():
            return {alias.asname or alias.name for alias in node.names}
        case ast.Assign():
            return {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        case ast.AnnAssign(target=ast.Name() as target):
            return {target.id}
        case ast.If() | ast.Try():
            return {name for inner in node.body for name in _names(inner)}
    return set()
