"""The pages say what is there: paths, modules, names, commands and options exist; the tree names every room."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import typer

import davsp
from davsp.cli import app

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "davsp"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
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
def test_every_command_has_the_options(page: Path) -> None:
    for line in _commands(page.read_text()):
        words = line.split()
        command, name = typer.main.get_command(app), "davsp"
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            name, words = f"{name} {words[0]}", words[1:]
            assert name.split()[-1] in command.commands, name
            command = command.commands[name.split()[-1]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        asked = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
        assert asked <= known | {"--help"}, f"{name}: {asked - known}"


def _commands(text: str) -> list[str]:
    """What follows `davsp` in every shell line of a page, continued lines joined, without comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(block for language, block in blocks if language in ("", "sh")).replace("\\\n", " ").splitlines()
    return [
        found[1]
        for line in lines
        for part in re.split(r"&&|;", line.partition(" #")[0])
        if (found := re.match(r"\s*davsp ((?:[a-z-].*)|--.*)", part))
    ]


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
