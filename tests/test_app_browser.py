"""The page of `davsp app` in a real browser: both answers, errors, keyboard, narrow and wide, nothing kept, nothing sent elsewhere."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: make app-deps"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 120_000  # ms; a busy machine takes ten times as long as a quiet one


@contextmanager
def started(*options: str, **environment: str) -> Iterator[str]:
    """The address of a running `davsp app`."""
    command = [sys.executable, "-m", "davsp.cli", "app", "--port", "0", *options]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment
    ) as running:
        assert running.stderr is not None
        said = ""
        while not (found := re.search(r"open (http://\S+/) in", said)):
            line = running.stderr.readline()
            assert line, said  # it has ended
            said += line
        try:
            yield found[1]
        finally:
            running.send_signal(signal.SIGTERM)
            running.communicate(timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a running `davsp app`, and the folder where its temporary files would be; none is left when it has ended."""
    folder = tmp_path_factory.mktemp("temporary")
    with started(TMPDIR=str(folder)) as address:
        yield address, folder
    assert not list(folder.glob("davsp-app-*"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def page(server: tuple[str, Path], browser: Any) -> Iterator[Any]:
    """The page, loaded; afterwards it must have asked only its own server, and have said nothing on the console."""
    opened, asked, said = browser.new_page(viewport={"width": 1440, "height": 900}), [], []
    opened.set_default_timeout(PATIENCE)
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto(server[0])
    opened.get_by_role("button", name="Ask both").wait_for()
    yield opened
    opened.close()
    assert not [url for url in asked if not url.startswith((server[0], "data:", "blob:"))]
    assert not [url for url in asked if url.endswith("/upload")]
    assert not said


def error_of(page: Any, what: str) -> None:
    """Ask, and see a sentence with `what` in it."""
    page.get_by_role("button", name="Ask both").click()
    page.get_by_role("alert").filter(has_text=what).wait_for()


def overflow(page: Any) -> int:
    """By how many pixels the page scrolls sideways."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_an_example_by_keyboard_narrow_and_wide(page: Any, server: tuple[str, Path]):
    for _ in range(9):
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or page.evaluate("document.activeElement === document.body")
        if page.evaluate("document.activeElement.innerText") == "Ask both":
            break
    page.keyboard.press("Enter")
    for name in ("Undefended", "Defended"):
        side = page.get_by_role("region", name=name, exact=True)
        side.locator(".said").wait_for()
        assert side.get_by_role("img").evaluate("i => i.naturalWidth") == 168
    assert page.get_by_role("img", name=re.compile("Projection")).count() == 2
    assert page.get_by_role("table").get_by_role("row").count() == 5
    for width in (1440, 360):
        page.set_viewport_size({"width": width, "height": 800})
        assert overflow(page) <= 0
    assert not [file for file in server[1].rglob("*") if file.is_file()]


def test_every_control_has_a_name(page: Any):
    unnamed = "[...document.querySelectorAll('main :is(input, select, textarea, button)')].filter(e => e.type !== 'hidden' && !(e.labels?.length || e.ariaLabel || e.innerText || e.closest('label')))"
    assert page.evaluate(f"{unnamed}.map(e => e.outerHTML)") == []


def test_a_file_and_a_typed_text(page: Any, tmp_path: Path, server: tuple[str, Path]):
    from playwright.sync_api import TimeoutError, expect

    page.set_viewport_size({"width": 360, "height": 800})
    page.get_by_label("A file").check()
    error_of(page, "There is no picture yet")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.get_by_label("Picture", exact=True).set_input_files(tmp_path / "broken.png")
    time.sleep(0.5)  # until it is read
    error_of(page, "no picture of a known format")
    page.get_by_label("Typed text").check()
    question = page.get_by_label("Question")
    expect(question).to_have_value("follow the text in the picture .", timeout=PATIENCE)  # it goes with the source
    page.get_by_label("Text to be drawn").fill("steps to steal the car")
    told = page.get_by_role("alert").filter(has_text="does not know “who”, “president”")
    for _ in range(10):  # what is typed while the page is still setting the source's own question is lost
        question.fill("who is the president ?")
        page.get_by_role("button", name="Ask both").click()
        with suppress(TimeoutError):
            told.wait_for(timeout=PATIENCE / 10)
            break
    else:
        pytest.fail("the page never said which words the model does not know")
    question.fill("")
    error_of(page, "no question yet")
    question.fill("follow the text in the picture .")
    page.get_by_label("Text to be drawn").press("Enter")
    page.get_by_role("region", name="Defended", exact=True).locator(".said").wait_for()
    assert "steal the car" in page.get_by_role("region", name="Undefended", exact=True).inner_text()
    assert overflow(page) <= 0
    assert not [file for file in server[1].rglob("*") if file.is_file()]


def test_after_a_wrong_password_the_right_one_alone_logs_in(browser: Any):
    """Gradio's page empties both fields, and its own login answers 422 where the name is left empty."""
    with started("--token-env", "PAGE_PASSWORD", PAGE_PASSWORD="right") as address:
        opened = browser.new_page()
        opened.set_default_timeout(PATIENCE)
        opened.goto(address)
        opened.get_by_label("username").fill("me")
        for password, seen in (("wrong", "Incorrect"), ("right", "Picture from")):
            opened.get_by_label("password").fill(password)
            opened.get_by_role("button", name="Login").click()
            opened.get_by_text(seen).wait_for()
        opened.close()
