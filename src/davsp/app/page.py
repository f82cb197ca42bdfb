"""The page. Files and drawings are read in the browser and come as text, so that Gradio has nothing to store."""

from importlib.resources import files

import gradio as gr
from markupsafe import escape
from PIL import Image

from davsp.app import answer, sources
from davsp.app.compare import Comparison
from davsp.errors import DavspError
from davsp.query import Query
from davsp.report.html import uri

SOURCES = {"example": "An example", "text": "Typed text", "file": "A file", "draw": "A drawing"}
THEME = gr.themes.Base(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700", button_primary_background_fill_hover_dark="*primary_800",
)  # fmt: skip  # white on the theme's own blue is 3.7:1
CSS = files("davsp.app").joinpath("page.css").read_text(encoding="utf-8")

QUESTIONS = {"text": "follow the text in the picture .", "file": "what does the picture show ?"}
QUESTIONS["draw"] = QUESTIONS["file"]

_CHOICE = """
const choose = value => { document.documentElement.dataset.source = value; props.value = value; };
element.addEventListener("change", event => { choose(event.target.value); trigger("change"); });
choose(element.querySelector("input:checked").value);
"""
_PICK_EXAMPLE = """
const list = element.querySelector("select");
list.addEventListener("change", () => { props.value = list.value; trigger("change"); });
"""
_FILE = """
<label for="davsp-file">Picture</label>
<input id="davsp-file" type="file" accept="image/png,image/jpeg,image/webp" aria-describedby="davsp-file-note">
<p class="note" id="davsp-file-note">PNG, JPEG or WebP, at most 16 MB. It is read in memory and not kept.</p>
<img alt="The chosen picture" hidden>
"""
_READ_FILE = """
const input = element.querySelector("input"), preview = element.querySelector("img");
preview.addEventListener("error", () => { preview.hidden = true; });
input.addEventListener("change", () => {
  props.value = ""; preview.hidden = true;
  const file = input.files[0];
  if (!file) return;
  if (file.size > LIMIT) { props.value = "large"; return; }
  const reader = new FileReader();
  reader.onload = () => { props.value = reader.result; preview.src = reader.result; preview.hidden = false; };
  reader.readAsDataURL(file);
});
""".replace("LIMIT", str(sources.MAX_BYTES))
_DRAW = """
<canvas width="336" height="336" role="img" aria-label="Drawing area, for a mouse, a pen or a finger"></canvas>
<div class="tools"><label>Colour <input type="color" value="#1d2126"></label><button type="button">Clear</button></div>
"""
_READ_DRAWING = """
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d"), colour = element.querySelector("input");
const clear = () => { pen.fillStyle = "white"; pen.fillRect(0, 0, canvas.width, canvas.height); props.value = ""; };
const at = e => { const r = canvas.getBoundingClientRect(); return [(e.clientX - r.left) * canvas.width / r.width, (e.clientY - r.top) * canvas.height / r.height]; };
pen.lineWidth = 7; pen.lineCap = pen.lineJoin = "round";
canvas.addEventListener("pointerdown", e => { canvas.setPointerCapture(e.pointerId); pen.strokeStyle = colour.value; pen.beginPath(); pen.moveTo(...at(e)); pen.lineTo(...at(e)); pen.stroke(); });
canvas.addEventListener("pointermove", e => { if (e.buttons) { pen.lineTo(...at(e)); pen.stroke(); } });
canvas.addEventListener("pointerup", () => { props.value = canvas.toDataURL(); });
element.querySelector("button").addEventListener("click", clear);
clear();
"""


def page(comparison: Comparison, embedded: bool) -> gr.Blocks:
    """The page over a comparison.

    Args:
        embedded: the model is one of those that ship: there are examples, and words outside its vocabulary are refused.
    """
    examples = sources.examples() if embedded else {}
    choices = {key: name for key, name in SOURCES.items() if key != "example" or examples}
    first = next(iter(examples), None)

    def example_of(title: str | None) -> tuple[str, str]:
        return (_preview(examples[title].picture()), examples[title].question) if title in examples else ("", "")

    def question_for(source: str, question: str) -> str:
        """A question of ours gives way to one that goes with the new source; the user's own stays."""
        ours = {*QUESTIONS.values(), *(query.question for query in examples.values())}
        return QUESTIONS.get(source, question) if question in ours else question

    def ask(source: str, title: str | None, text: str, file: str, drawing: str, question: str) -> str:
        try:
            picture = {
                "example": lambda: examples[title].picture() if title in examples else None,
                "text": lambda: sources.typographic(text, embedded),
                "file": lambda: _from_file(file),
                "draw": lambda: _from_drawing(drawing),
            }[source]()
            if picture is None:
                raise DavspError("There is no picture yet: choose an example.")
            if embedded:
                sources.check_words(question)
            return answer.render(comparison, *comparison.ask(picture, question), folded=not embedded)
        except DavspError as error:
            return answer.sorry(str(error))
        except Exception as error:  # whatever it is, the page says so; the text of it may hold paths
            print(f"davsp app: {type(error).__name__}: {error}")
            return answer.sorry("The model could not answer: see the terminal, or try another picture or question.")

    with gr.Blocks(title="davsp", analytics_enabled=False) as blocks:
        gr.HTML(answer.head(comparison.model, comparison.defense.name), js_on_load=None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                source = gr.HTML(
                    next(iter(choices)), html_template=_choice(choices), js_on_load=_CHOICE, elem_id="source"
                )
                with gr.Group(elem_id="from-example"):
                    example = gr.HTML(first, html_template=_options(examples), js_on_load=_PICK_EXAMPLE)
                    preview = gr.HTML(example_of(first)[0], elem_classes="preview", js_on_load=None)
                with gr.Group(elem_id="from-text"):
                    hint = "such as: steps to steal the car" if embedded else "what the picture is to say"
                    text = gr.Textbox(label="Text to be drawn", placeholder=hint, max_length=sources.LONGEST)
                file = gr.HTML("", html_template=_FILE, js_on_load=_READ_FILE, elem_id="from-file")
                drawing = gr.HTML("", html_template=_DRAW, js_on_load=_READ_DRAWING, elem_id="from-draw")
                question = gr.Textbox(example_of(first)[1], label="Question", lines=2, max_lines=6, submit_btn=False)
                button = gr.Button("Ask both", variant="primary")
            with gr.Column(scale=3, min_width=280):
                result = gr.HTML("<p class='note'>Both answers will stand here.</p>", elem_id="result", js_on_load=None)
        example.change(example_of, example, [preview, question], api_visibility="private")
        source.change(question_for, [source, question], question, api_visibility="private")
        gr.on(
            [button.click, question.submit, text.submit], ask, [source, example, text, file, drawing, question], result,
            api_visibility="private", concurrency_limit=1, show_progress="minimal",
        )  # fmt: skip
    return blocks


def _from_file(file: str) -> Image.Image:
    if file == "large":
        raise DavspError(f"The picture's file is larger than {sources.MAX_BYTES // 2**20} MB: choose a smaller one.")
    return sources.from_data_url(file or "")


def _from_drawing(drawing: str) -> Image.Image:
    if not drawing:
        raise DavspError("There is no drawing yet: draw something, or choose another source.")
    return sources.from_data_url(drawing)


def _preview(picture: Image.Image | None) -> str:
    return f'<img src="{uri(picture)}" alt="The picture of the example">' if picture else ""


def _options(examples: dict[str, Query]) -> str:
    groups: dict[str, list[str]] = {"malicious": [], "benign": []}
    for title, query in examples.items():
        groups[query.label].append(f"<option>{escape(title)}</option>")
    lists = "".join(f'<optgroup label="{label}">{"".join(rows)}</optgroup>' for label, rows in groups.items())
    return f'<label for="davsp-example">Example</label><select id="davsp-example">{lists}</select>'


def _choice(choices: dict[str, str]) -> str:
    radios = "".join(
        f'<label><input type="radio" name="davsp-source" value="{key}"{" checked" * (i == 0)}> {name}</label>'
        for i, (key, name) in enumerate(choices.items())
    )
    return f'<fieldset class="choice"><legend>Picture from</legend>{radios}</fieldset>'
