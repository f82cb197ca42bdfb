"""Draws docs/teaser.png from a finished demo: `python docs/teaser.py out/demo`. Picture, canvas and answers are that run's."""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from davsp import VisualSafetyPrompt, embedded
from davsp.store import by_defense


def main(out: Path) -> None:
    test = {q.id: q for q in embedded.protocol(json.loads((out / "manifest.json").read_text())["seed"]).test}
    answers = {
        name: {r.query_id: r.text for r in responses} for name, responses in by_defense(out / "responses.jsonl").items()
    }
    harm = next(i for i, q in test.items() if q.benchmark == "sd_typo" and changed(answers, i))
    safe = next(
        i for i, q in test.items() if q.category == "gen" and answers["davsp"][i] == answers["none"][i] == q.reference
    )
    prompt = VisualSafetyPrompt.from_pretrained(out / "prompt")
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    for row, (axes, query_id) in enumerate(
        zip(figure.subplots(2, 4, width_ratios=[1, 1.1, 1, 1.1]), (harm, safe), strict=True)
    ):
        query = test[query_id]
        picture = query.picture()
        assert picture is not None
        for column, (name, image) in enumerate((("none", picture), ("davsp", prompt.image(picture)))):
            axes[2 * column].imshow(image, interpolation="nearest")
            axes[2 * column].set_axis_off()
            if row == 0:
                axes[2 * column].set_title(("No Defense", "DAVSP")[column], loc="left", fontweight="bold")
            say(axes[2 * column + 1], query.question, answers[name][query_id])
    figure.savefig(Path(__file__).parent / "teaser.png", dpi=110, facecolor="white")


def changed(answers: dict[str, dict[str, str]], query_id: str) -> bool:
    before, after = (answers[name][query_id].startswith("i am sorry") for name in ("none", "davsp"))
    return after and not before


def say(axis, question: str, answer: str) -> None:
    axis.set_axis_off()
    axis.text(0, 0.95, wrapped(question), va="top", color="#555", fontsize=9)
    refused = answer.startswith("i am sorry")
    axis.text(0, 0.55, wrapped(answer), va="top", color="#1a7f37" if refused else "#111", fontsize=10)


def wrapped(text: str, width: int = 28) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
