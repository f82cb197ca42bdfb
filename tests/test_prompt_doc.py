"""The ten lines in docs/prompt.md that need nothing but Pillow make the canvases that davsp makes."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from davsp import VisualSafetyPrompt
from davsp.query import open_picture
from tiny import picture

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "prompt.md").read_text(), re.DOTALL)
RECIPE, USE = BLOCKS[:2]


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    """The names that the block in the docs defines."""
    names: dict[str, Any] = {}
    exec(compile(RECIPE, "docs/prompt.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A border with a text that no Latin-1 holds."""
    made = tmp_path_factory.mktemp("prompt")
    VisualSafetyPrompt.create(56, 9, "random", seed=1, text="please “be” safe – 安全").save_pretrained(made)
    return made


def test_the_recipe_imports_pillow_alone_and_has_ten_lines_in_its_function():
    tree = ast.parse(RECIPE)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [getattr(node, "module", None) for node in imports] == ["PIL"]
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert function.body[-1].end_lineno - function.body[0].lineno + 1 <= 10


def palette(size: tuple[int, int], clear: bool = False) -> Image.Image:
    image = picture(3, size).quantize(16)
    if clear:
        image.info["transparency"] = 3
    return image


def one_clear_colour(size: tuple[int, int]) -> Image.Image:
    """RGB, and the colour of its first pixel is transparent."""
    image = picture(1, size).quantize(4).convert("RGB")
    image.info["transparency"] = image.getpixel((0, 0))
    return image


MODES = {
    "RGB": lambda size: picture(1, size),
    "RGB and one transparent colour": one_clear_colour,
    "grey": lambda size: picture(1, size).convert("L"),
    "one bit": lambda size: picture(1, size).convert("1"),
    "alpha": lambda size: Image.merge("RGBA", [*picture(1, size).split(), picture(2, size).convert("L")]),
    "grey and alpha": lambda size: Image.merge("LA", [picture(i, size).convert("L") for i in (1, 2)]),
    "palette": palette,
    "palette and transparency": lambda size: palette(size, clear=True),
}
SIZES = [(56, 56), (38, 38), (100, 41), (41, 100), (1, 1), (1, 90), (333, 200)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_the_recipe_makes_davsps_canvas(mode, size, recipe, folder: Path, tmp_path: Path):
    MODES[mode](size).save(tmp_path / "picture.png")
    _same(recipe, folder, tmp_path / "picture.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo(orientation, recipe, folder: Path, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(5, (60, 44)).save(tmp_path / "photo.jpg", exif=exif)
    _same(recipe, folder, tmp_path / "photo.jpg")


def test_a_photo_in_webp(recipe, folder: Path, tmp_path: Path):
    MODES["alpha"]((50, 70)).save(tmp_path / "photo.webp", lossless=True)
    _same(recipe, folder, tmp_path / "photo.webp")


def test_the_lines_of_use_give_davsps_question(recipe, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vsp.png").write_bytes((folder / "vsp.png").read_bytes())
    picture(6, (90, 60)).save("photo.jpg")
    names = dict(recipe)
    exec(compile(USE, "docs/prompt.md", "exec"), names)
    prompt = VisualSafetyPrompt.from_pretrained(folder)
    assert names["question"] == prompt.question("What is this?")
    with Image.open("defended.png") as defended:
        assert defended.tobytes() == prompt.image(open_picture(Path("photo.jpg"))).tobytes()
    names["vsp"].close()


def _same(recipe: dict[str, Any], folder: Path, file: Path) -> None:
    wanted = VisualSafetyPrompt.from_pretrained(folder).image(open_picture(file))
    with Image.open(file) as image, Image.open(folder / "vsp.png") as vsp:
        made = recipe["defend"](image, vsp)
    assert (made.mode, made.size) == ("RGB", wanted.size) and made.tobytes() == wanted.tobytes()
