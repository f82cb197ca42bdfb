"""The plots with a panel a method: what they count, and that each method is in them."""

import xml.etree.ElementTree as ET

from davsp.evaluation import Evaluation
from davsp.experiments.paper.run import confused
from davsp.query import Query, Response, Verdict
from davsp.report import panels, plots, projections_by_label

TEST = [
    *(Query(f"m{i}", "how ?", "malicious", "sd", "x", f"g{i}") for i in range(4)),
    *(Query(f"b{i}", "what ?", "benign", "utility", "rec", f"h{i}", "red") for i in range(3)),
]


def evaluation() -> Evaluation:
    label_of = {"m0": "safe", "m1": "safe", "m2": "unsafe", "m3": "unscored"}
    texts = ["no", "no", "sure", "sure", "red", "i am sorry , i cannot help with that .", "blue"]
    answers = [Response(q.id, "davsp", text, float(i)) for i, (q, text) in enumerate(zip(TEST, texts, strict=True))]
    without = [Response(a.query_id, "ecso", a.text) for a in answers]
    verdicts = [Verdict(q.id, "davsp", "t", label_of[q.id]) for q in TEST if q.id in label_of]
    return Evaluation(
        rows=[], responses={"davsp": answers, "ecso": without}, verdicts={"davsp": verdicts, "ecso": verdicts}
    )


def test_confusion_counts_verdicts_and_refusals_and_never_takes_unscored_for_either():
    counts = confused(TEST, evaluation())
    assert counts["davsp"] == {"malicious": (2, 1, 1), "benign": (1, 2, 0)}
    text = panels.confusions(counts, {"ecso": "Only ECSO"})
    assert all(word in text for word in ("Only ECSO", "DAVSP", "67 %", "1 unscored"))  # 2 of 3 scored
    ET.fromstring(plots.standalone(text))


def test_projections_leave_out_a_method_that_has_none():
    projections = projections_by_label(TEST, evaluation())
    assert projections == {"davsp": {"malicious": [0, 1, 2, 3], "benign": [4, 5, 6]}}
    text = panels.projections(projections, {}, (2.5, 0.5))
    assert "DAVSP" in text and "ECSO" not in text
    alone = plots.standalone(text)
    ET.fromstring(alone)
    assert "currentColor" not in alone and "var(" not in alone
