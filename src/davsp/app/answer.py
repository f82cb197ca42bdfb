"""A comparison as HTML that goes into the page; pictures are in it as data, so no file is written."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from davsp.app import plots
from davsp.app.compare import Comparison, Side, margins_by_layer
from davsp.report.cells import label
from davsp.report.html import uri

_ENVIRONMENT = Environment(
    loader=PackageLoader("davsp.app", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


def render(comparison: Comparison, before: Side, after: Side, folded: bool) -> str:
    """Both canvases and answers, both projections, the layers, the cost.

    Args:
        folded: an answer that is no refusal is shown only when it is unfolded: what a real model says may be harmful.
    """
    vector = comparison.vector
    projections: dict[str, object] = {
        "axis": None,
        "layers": None,
        "layer": None,
        "at": None,
        "margins": None,
        "ticks": False,
    }
    if vector is not None:
        n, margins = vector.layer - 1, (vector.mu_plus, vector.mu_minus)
        at = before.curve[n], after.curve[n]
        known = vector.malicious[:, n].tolist(), vector.benign[:, n].tolist()
        projections = {
            "axis": Markup(plots.axis(*at, margins, *known)),
            "layers": Markup(plots.layers(before.curve, after.curve, margins_by_layer(vector), vector.layer)),
            "layer": vector.layer,
            "at": at,
            "margins": margins,
            "ticks": vector.fitted,
        }
    template = _ENVIRONMENT.get_template("answer.html.j2")
    defense = label(comparison.defense.name)
    return template.render(
        before=before, after=after, folded=folded, uri=uri, costs=_costs(before, after), defense=defense, **projections
    )


def head(model: str, defense: str) -> str:
    """The page's heading: what is asked, and what stands before it."""
    return (
        '<header class="head"><h1>What a visual safety prompt changes</h1>'
        f"<p>One question, two answers of <b>{escape(model)}</b>: as it is, and behind <b>{escape(label(defense))}</b>. "
        "No picture and no question is kept.</p></header>"
    )


def sorry(why: str) -> str:
    """One sentence that says what went wrong and how to mend it."""
    return f'<p role="alert" class="alert">{escape(why)}</p>'


def _costs(before: Side, after: Side) -> list[tuple[str, str, str]]:
    rows = [
        ("time, ms", *(f"{1000 * s.seconds:,.0f}" for s in (before, after))),
        ("calls of the model", *(f"{s.calls}" for s in (before, after))),
        ("tokens of the prompt", *(f"{s.prompt_tokens:,}" for s in (before, after))),
        ("of these for the picture", *(f"{s.image_tokens:,}" for s in (before, after))),
    ]
    return [(name, a, b) for name, a, b in rows]
