"""A prompt goes to the hub and comes back, at every revision, and offline from the cache.

The client reads its address and its mode when it is imported, so each side is a process of its own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from davsp import DavspError, VisualSafetyPrompt
from davsp.prompts.border import card
from davsp.prompts.hub import fetch
from hub_server import TOKEN, hub
from upstreams import canaried


def davsp(code: str, home: Path, url: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code that a user could run."""
    options = {"capture_output": True, "text": True, "timeout": 300, "cwd": home.parent}
    return subprocess.run([sys.executable, "-c", code], env=variables(home, url) | environment, **options)


def variables(home: Path, url: str) -> dict[str, str]:
    """An environment with a cache and a hub of its own."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return others | own


@contextmanager
def pushing(home: Path, url: str) -> Iterator[Callable[[str], str]]:
    """A program that pushes a folder a call, and what it prints."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": home.parent}
    environment = variables(home, url) | {"HF_TOKEN": TOKEN}
    with subprocess.Popen([sys.executable, "-c", PUSH_EACH], env=environment, **options) as program:

        def push(folder: str) -> str:
            program.stdin.write(f"{folder}\n")
            program.stdin.flush()
            return program.stdout.readline()

        yield push
        program.stdin.close()


PUSH = """
from davsp import DavspError, VisualSafetyPrompt
one = VisualSafetyPrompt.from_pretrained("first")
print(one.push_to_hub("user/vsp", license="apache-2.0"))
two = VisualSafetyPrompt.from_pretrained("second")
print(two.push_to_hub("user/vsp", license="apache-2.0"))
print(two.push_to_hub("user/vsp", license="mit", revision="next", commit_message="on a branch"))
try:
    one.push_to_hub("user/vsp", license="mit", token="wrong")
except DavspError as error:
    print(error)
"""
PUSH_EACH = """
import sys
from davsp import DavspError, VisualSafetyPrompt
for folder in sys.stdin:
    try:
        print(VisualSafetyPrompt.from_pretrained(folder.strip()).push_to_hub("user/vsp", license="mit"), flush=True)
    except DavspError as error:
        print(error, flush=True)
"""
PUSH_AND_PULL = """
from davsp import VisualSafetyPrompt
print(VisualSafetyPrompt.from_pretrained("first").push_to_hub("user/vsp", license="mit"))
again = VisualSafetyPrompt.from_pretrained("user/vsp")
print(again.config["license"], again.pixels_sha256(), again.canaries.digest())
"""
PULL = """
from davsp import DavspError, VisualSafetyPrompt
from davsp.defenses import load_defense
show = lambda p: print(p.config["license"], p.pixels_sha256())
show(VisualSafetyPrompt.from_pretrained("user/vsp"))
show(VisualSafetyPrompt.from_pretrained("user/vsp", revision={first!r}))
show(load_defense("user/vsp@{first}").prompt)
show(VisualSafetyPrompt.from_pretrained("user/vsp@next"))
for source, revision in (("user/vsp", "never"), ("user/none", None)):
    try:
        VisualSafetyPrompt.from_pretrained(source, revision)
    except DavspError as error:
        print(error)
"""


@pytest.fixture
def two(tmp_path: Path) -> list[VisualSafetyPrompt]:
    """Two borders, in folders."""
    borders = [VisualSafetyPrompt.create(24, 5, "random", seed=seed, text="be safe") for seed in (0, 1)]
    borders[0] = canaried(borders[0])
    borders[0].config["model_id"] = str(tmp_path / "llava-ft")  # a folder of this machine
    for name, prompt in zip(("first", "second"), borders, strict=True):
        prompt.save_pretrained(tmp_path / name)
    return borders


def test_there_and_back(two: list[VisualSafetyPrompt], tmp_path: Path):
    """A push and a pull by one process; test_there_and_back_and_offline has the rest."""
    with hub() as server:
        done = davsp(PUSH_AND_PULL, tmp_path / "home", server.url, HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr
        pushed, pulled = done.stdout.splitlines()
        files = server.repos["user/vsp"]["commits"][re.search(r"/user/vsp/commit/(\w{40})", pushed)[1]]
        assert sorted(files) == ["README.md", "canaries.json", "vsp.png", "vsp.safetensors", "vsp_config.json"]
        assert (
            str(tmp_path).encode() not in b"".join(files.values())
            and b'"model_id": "llava-ft"' in files["vsp_config.json"]
        )
    assert pulled == f"mit {two[0].pixels_sha256()} {two[0].canaries.digest()}"


@pytest.mark.slow
def test_there_and_back_and_offline(two: list[VisualSafetyPrompt], tmp_path: Path):
    home = tmp_path / "home"
    with hub() as server:
        pushed = davsp(PUSH, home, server.url, HF_TOKEN=TOKEN)
        assert pushed.returncode == 0, pushed.stderr
        commits = re.findall(r"/user/vsp/commit/(\w{40})", pushed.stdout)
        assert len(set(commits)) == 3
        assert pushed.stdout.splitlines()[3].startswith("user/vsp cannot be pushed to the hub (")
        files = server.repos["user/vsp"]["commits"][commits[1]]
        assert sorted(files) == ["README.md", "vsp.png", "vsp.safetensors", "vsp_config.json"]
        card = files["README.md"].decode()
        head = yaml.safe_load(card.split("---")[1])
        assert (
            head["license"] == "apache-2.0"
            and 'from_pretrained("user/vsp")' in card
            and "![the border](vsp.png)" in card
        )
        pull = PULL.format(first=commits[0])
        online = davsp(pull, home, server.url)
        assert online.returncode == 0, online.stderr
        lines = online.stdout.splitlines()
        pixels = [prompt.pixels_sha256() for prompt in two]
        expected = [f"apache-2.0 {pixels[1]}", *2 * [f"apache-2.0 {pixels[0]}"], f"mit {pixels[1]}"]
        assert lines[:4] == expected and len(lines) == 6
        assert all("neither a folder nor reachable on the hub" in line for line in lines[4:])
    offline = davsp(pull, home, server.url, HF_HUB_OFFLINE="1")  # and the server is no more
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout.splitlines()[:4] == expected


@pytest.mark.parametrize("step", [pytest.param("/lfs/", marks=pytest.mark.slow), "/commit/main"])
def test_a_push_that_fails_leaves_what_was_there(two: list[VisualSafetyPrompt], tmp_path: Path, step: str):
    """All files come in one commit, the last step; whatever fails, the repository holds the old border whole, or nothing."""
    home = tmp_path / "home"
    with hub() as server, pushing(home, server.url) as push:
        server.refused = step
        assert push("first").startswith("user/vsp cannot be pushed to the hub (")
        repo = server.repos["user/vsp"]
        assert not repo["commits"][repo["branches"]["main"]]
        server.refused = ""
        server.steps.clear()
        assert "/commit/" in push("first")
        assert server.steps[0] == "/api/repos/create" and server.steps[-1] == "/api/models/user/vsp/commit/main"
        assert sum("/commit/" in path for path in server.steps) == 1
        old = repo["branches"]["main"]
        server.refused = step
        assert "cannot be pushed" in push("second")
        assert repo["branches"]["main"] == old and len(repo["commits"][old]) == 5


def test_what_names_no_revision_or_two(two: list[VisualSafetyPrompt], tmp_path: Path):
    with pytest.raises(DavspError, match=r"revision 'main' is for the hub, and .*first is a folder"):
        VisualSafetyPrompt.from_pretrained(tmp_path / "first", revision="main")
    with pytest.raises(DavspError, match="user/vsp@a and revision 'b' name two revisions"):
        fetch("user/vsp@a", "b", [])


def test_no_licence_no_push(two: list[VisualSafetyPrompt]):
    with pytest.raises(DavspError, match="names no licence to publish it under"):
        two[0].push_to_hub("user/vsp")


def test_a_folders_path_is_no_base_model(tmp_path):
    from davsp.prompts.border import hub_name

    assert [hub_name(name) for name in ("llava-hf/llava-1.5-7b-hf", "davsp-mini")] == [
        "llava-hf/llava-1.5-7b-hf",
        "davsp-mini",
    ]
    assert [hub_name(name) for name in (None, str(tmp_path), "/gone/model", "a/b/c")] == [None] * 4


@pytest.mark.parametrize("model_id", ["/secret/llava-ft/", "secret/work/llava-ft", r"C:\secret\llava-ft"])
def test_a_card_names_a_folder_without_its_path(two, model_id):
    text = card(two[0].config | {"model_id": model_id, "revision": None})
    assert "secret" not in text and "# Visual safety prompt for llava-ft (a folder)\n" in text
    assert "| model | llava-ft (a folder) |" in text and "base_model" not in text
