"""The command line: help, the words that go with a model, and which model is which."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from command import run
from davsp import cli, embedded
from davsp.cli.inputs import is_mini, is_shipped
from davsp.embedded.words import vocabulary
from davsp.errors import DavspError


def test_help_does_not_import_torch():
    code = "import sys, davsp.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def commands(group: typer.core.TyperGroup, *words: str) -> Iterator[tuple[str, ...]]:
    """The words of every command, those of sub-commands too."""
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, *words, name)
        else:
            yield (*words, name)


COMMANDS = sorted(commands(typer.main.get_group(cli.app)))


def test_every_command_is_found():
    assert len(COMMANDS) == 28 and {("eval",), ("baseline", "pat"), ("data", "split")} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_at_80_columns_gives_descriptions_half_of_the_width(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*command, "--help") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert lines and max(map(len, lines)) == 80
    for line in lines:
        cells = [cell for cell in re.split(" {2,}", line.strip("│ ")) if cell[0] != "["]  # [default: …] is no column
        assert len(cells) <= 2, line
        goes_on = line.startswith("│   ")  # a description whose names stand above
        if cells and (goes_on or len(cells) == 2):
            start = line.index(cells[-1], 2 if goes_on else 2 + len(cells[0]))
            assert 80 - start - 2 >= 40, line


def test_help_has_a_panel_for_each_group_of_options(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("eval", "--help") == 0
    help = capsys.readouterr().out
    titles = re.findall(r"╭─ (.+?) ─+╮", help)
    assert titles == [
        "Options",
        "Defenses",
        "Test set",
        "Model",
        "Where the model runs",
        "Processes",
        "Judges",
        "Requests to servers",
    ]
    panel = help.split("╭─ Model ─")[1].split("╰")[0]
    assert re.findall(r"^│ (--[\w-]+)", panel, re.M) == [
        "--model", "--revision", "--device", "--dtype", "--quantization", "--attn-implementation", "--canvas", "--template", "--template-kwargs",
        "--undefended",
    ]  # fmt: skip


def test_the_embedded_test_comes_with_its_text_by_whatever_name_a_server_calls_the_model(tmp_path, monkeypatch, capsys):
    def stop(lvlm, defenses, *arguments, **options):
        raise DavspError(f"{lvlm.model_id} {defenses['safety-text'].text}")

    monkeypatch.setattr("davsp.evaluation.evaluate", stop)
    server = ("--engine", "openai", "--base-url", "http://127.0.0.1:9/v1", "--api-model", "served")
    assert run("eval", *server, "--limit", 1, "--out", tmp_path / "out") == 2
    assert f"served {embedded.SAFETY_TEXT}" in capsys.readouterr().err


def test_a_model_that_ships_is_known_by_name_and_by_folder(tiny_folder):
    for name in (None, *embedded.MODELS):
        assert is_shipped(name)
        assert is_shipped(folder := str(embedded.FOLDER.parent / (name or "davsp-mini"))) and is_shipped(folder + "/")
    for other in (str(tiny_folder), str(embedded.FOLDER.parent), "davsp-mini-wide", "llava-hf/llava-1.5-7b-hf"):
        assert not is_shipped(other)


def test_a_folder_is_davsp_mini_by_its_canvas_and_words(tiny_folder: Path, tmp_path: Path):
    assert not is_mini(tmp_path) and not is_mini(tiny_folder)
    (tmp_path / "config.json").write_text("[1]")
    assert not is_mini(tmp_path)
    size = len(vocabulary())
    for canvas, words in ((168, size), (192, size), (336, size), (168, size + 1)):
        config = {"vision_config": {"image_size": canvas}, "text_config": {"vocab_size": words}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert is_mini(tmp_path) == (canvas != 336 and words == size)
    config = {"model_type": "qwen2_vl", "vision_config": {}, "text_config": {"vocab_size": size}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_mini(tmp_path)
