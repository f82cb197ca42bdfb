"""The harmfulness vector: the direction in which malicious and benign queries differ inside the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.errors import DavspError, words_of
from davsp.lvlm import LVLM, short_name
from davsp.lvlm.answering import NO_STATES
from davsp.lvlm.templates import CHECKPOINT
from davsp.lvlm.undefended import matters
from davsp.query import Query
from davsp.runtime.files import read_tensors_and_metadata, save_tensors, to_json, write_json
from davsp.vector.published import directions
from davsp.vector.separation import compare
from davsp.vector.states import Readable, of_both

AS_GOOD = 0.01  # of AUROC: about the standard error of 0.99 from a hundred queries
QUANTILES = (0.5, 0.75)  # of malicious projections for mu_plus, of benign ones for mu_minus
PUBLISHED = ((40, 5120), 20, 27.0, -2.0)  # the authors' model, their layer, mu_plus and mu_minus
PUBLISHED_SHOWN = ("llava_v1", "pad")  # by which template and way their code shows a query


@dataclass
class HarmfulnessVector:
    """Per layer, the unit vector from the mean benign to the mean malicious state of the last input token.

    Margins: mu_plus is the median of the malicious projections of the fitting set, so a query must look as harmful as the
    middle of the clear cases; mu_minus is the upper quartile of the benign ones, so three of four benign queries are left
    alone and only those that drift towards harm are held. Both may be overwritten; what others gave: docs/log.md.

    Attributes:
        vectors: (L, D) unit vectors; row i belongs to layer i + 1, L = num_layers - 1. Zeros at a layer that is left out.
        malicious: (N, L) projections of the fitting set; N = 0: not known (`from_published`).
        benign: (M, L), the same.
        layer: the layer in use.
        mu_plus, mu_minus: margins at `layer`, in the units of the hidden state.
        auroc: layer -> AUROC; of the fitting set after `fit`, of held-out queries after `sweep`.
        table: the rows of the last `sweep`.
        model_id, revision, text: the model, and the text that stood before every question; None: not known.
        template: the conversation template by which it was asked; files of older versions name none.
        undefended: how pictures that are not square came to the model's shape (`LVLM.undefended`); "": all were square, or it is not known
            (a server's own way).
    """

    vectors: Float[Tensor, "l d"]
    malicious: Float[Tensor, "n l"]
    benign: Float[Tensor, "m l"]
    layer: int = 1
    mu_plus: float = 0.0
    mu_minus: float = 0.0
    auroc: dict[int, float] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)
    model_id: str = ""
    text: str | None = ""
    revision: str | None = None
    template: str = CHECKPOINT
    undefended: str = ""

    @classmethod
    def fit(
        cls,
        lvlm: Readable,
        malicious: Sequence[Query],
        benign: Sequence[Query],
        text: str = "",
        batch_size: int = 16,
        progress: bool = True,
    ) -> "HarmfulnessVector":
        """v_l = (mean malicious - mean benign) / norm, for all layers in one batched pass.

        A layer at which the two means are the same but for rounding is left out (`left_out`), and so is one that a server does not write.

        Args:
            lvlm: the frozen model; on a server that writes hidden states L is the deepest layer that it writes.
            malicious: queries the model recognises (refuses): they show what recognised harm looks like inside.
            benign: ordinary queries.
            text: safety text before every question.

        Raises:
            DavspError: a class is missing, or the two differ at no layer, or a state is not finite, or a server gives none.
        """
        if not lvlm.readable:
            raise DavspError(NO_STATES)
        layers = lvlm.readable
        bad, good = of_both(lvlm, malicious, benign, layers, layers[-1], text, batch_size, progress, "vector")
        difference = bad.mean(0) - good.mean(0)  # (L, D)
        norm = difference.norm(dim=-1, keepdim=True)
        scale = torch.cat([bad, good]).norm(dim=-1).mean(0)[:, None]  # (L, 1)
        differs = norm > torch.finfo(torch.float32).eps * scale
        if not bool(differs.any()) or not bool(norm.isfinite().all()):
            raise DavspError(
                "malicious and benign queries give the same or non-finite states: the two sets must differ"
            )
        vectors = torch.where(differs, difference / norm, 0.0)
        projections = _project(bad, vectors), _project(good, vectors)
        vector = cls(
            vectors, *projections, model_id=lvlm.model_id, text=text, revision=lvlm.revision, template=lvlm.template
        )  # fmt: skip
        if isinstance(lvlm, LVLM) and matters(lvlm, malicious, benign):
            vector.undefended = lvlm.undefended
        vector._choose(compare(vector.malicious, vector.benign))
        return vector

    def sweep(
        self,
        lvlm: Readable,
        malicious: Sequence[Query],
        benign: Sequence[Query],
        text: str = "",
        batch_size: int = 16,
        progress: bool = True,
    ) -> list[dict[str, Any]]:
        """Compare all layers on held-out queries, and take the one nearest the middle of those that are as good as the best.

        As good: an AUROC within `AS_GOOD` of the best. Where several layers tell the classes apart, their order is chance,
        and the middle is where the paper's layers are (14 of 32, 20 of 40).

        Returns:
            A row a layer that is not left out, and that a server writes: layer, auroc, mean_malicious, mean_benign, gap (d').

        Raises:
            DavspError: a class is missing, or a server gives no state at any of its layers.
        """
        layers = [layer for layer in lvlm.readable if layer <= len(self.vectors)]
        if not set(layers) - set(self.left_out):
            raise DavspError(NO_STATES)
        bad, good = of_both(lvlm, malicious, benign, layers, len(self.vectors), text, batch_size, progress, "layers")
        rows = compare(_project(bad, self.vectors), _project(good, self.vectors))
        self.table = self._choose([row for row in rows if row["layer"] in layers])
        return self.table

    @property
    def left_out(self) -> list[int]:
        """Layers at which malicious and benign queries of the fitting set do not differ, or whose states a server did not write; there is
        no direction.

        Blocks of linear attention (Qwen3.5) may forget a picture or a question before the last token is read.
        """
        return [layer for layer, row in enumerate(self.vectors, 1) if not bool(row.any())]

    def direction(self, layer: int | None = None) -> Float[Tensor, " d"]:
        """The unit vector of `layer` (default: the layer in use).

        Raises:
            DavspError: there is no such layer, or it is left out.
        """
        row = self._row(layer)
        if row + 1 in self.left_out:
            raise DavspError(
                f"the vector has no direction at layer {row + 1}, which the server did not write or where malicious and benign queries do not "
                f"differ; take a layer other than {', '.join(map(str, self.left_out))}"
            )
        return self.vectors[row]

    def _row(self, layer: int | None) -> int:
        """The row of a layer, or of the one in use; DavspError if there is none."""
        layer = self.layer if layer is None else layer
        if not 1 <= layer <= len(self.vectors):
            raise DavspError(f"layer {layer} is out of range: the vector has layers 1 to {len(self.vectors)}")
        return layer - 1

    def check(self, lvlm: Readable) -> None:
        """Raises DavspError unless the vector is of this model: layers, width, name and revision where both have one.

        Of a model on a server: the name, and that it writes the layer in use; the width shows with the first state (`project`).
        """
        if isinstance(lvlm, LVLM):
            self._check_shape(lvlm)
        elif self.layer not in lvlm.readable:
            raise DavspError(
                f"the vector is of layer {self.layer}, and the server writes {', '.join(map(str, lvlm.readable))} (--states-layers); start it "
                "with that layer, or fit a vector there (davsp vector --engine openai)"
                if lvlm.readable
                else NO_STATES
            )
        names = [Path(short_name(name)).name for name in (self.model_id, lvlm.model_id) if name]
        if len(set(names)) > 1:  # a folder may have been moved: its last part is the name
            raise DavspError(
                f"the vector is of another model: {self.model_id}, not {lvlm.model_id}; fit one with `davsp vector`"
            )
        if self.revision and lvlm.revision and self.revision != lvlm.revision:
            raise DavspError(
                f"the vector is of revision {self.revision} of {self.model_id}, not {lvlm.revision}; fit one with "
                "`davsp vector`"
            )

    def _check_shape(self, lvlm: LVLM) -> None:
        width = lvlm.model.config.get_text_config().hidden_size
        ours, its = tuple(self.vectors.shape), (lvlm.num_layers - 1, width)
        if ours != its:
            fewer = ours[0] < its[0] and ours[1] == its[1]
            or_server = ", or of a server that did not write all layers (--states-layers)" if fewer else ""
            raise DavspError(
                f"the vector is of another model{or_server}: it has {ours[0]} layers of {ours[1]} numbers, "
                f"but {lvlm.model_id} has {its[0]} of {its[1]}; fit one with `davsp vector`"
            )

    def by_layer(self) -> list[dict[str, Any]]:
        """The rows of the last `sweep`; before one, the same figures of the fitting set; none if that is not known."""
        return self.table or (self._left(compare(self.malicious, self.benign)) if self.fitted else [])

    def _left(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Without the layers that are left out."""
        return [row for row in rows if row["layer"] not in self.left_out]

    def project(self, states: Float[Tensor, "*b d"], layer: int | None = None) -> Float[Tensor, "*b"]:
        """s = v_l . h_l, in the precision of the states (at least float32); 0 at a layer that is left out.

        Raises:
            DavspError: there is no such layer, or the states are of another width, so of another model.
        """
        direction = self.vectors[self._row(layer)]
        if states.shape[-1] != len(direction):
            raise DavspError(
                f"the vector is of another model: it has {len(direction)} numbers a layer, and the states have {states.shape[-1]}; fit one "
                "with `davsp vector`"
            )
        states = states if states.dtype == torch.float64 else states.float()
        return states @ direction.to(states)

    @property
    def fitted(self) -> bool:
        """Whether the projections of its fitting set are known; a published vector comes without."""
        return len(self.malicious) > 0

    def margins(self, layer: int | None = None, quantiles: tuple[float, float] = QUANTILES) -> tuple[float, float]:
        """(mu_plus, mu_minus) at a layer by the rule above, or by other quantiles; 0 and 0 at one that is left out.

        Raises:
            DavspError: no such layer, or the fitting set's projections are not known.
        """
        at = self._known(layer)
        plus = torch.quantile(self.malicious[:, at], quantiles[0])
        return float(plus), float(torch.quantile(self.benign[:, at], quantiles[1]))

    def half_gap(self, layer: int | None = None) -> float:
        """Half the distance between the class means of the fitting set at a layer; always positive.

        Where they are not known: half the distance between the margins, at the layer in use.

        Raises:
            DavspError: as `margins`.
        """
        if not self.fitted and layer in (None, self.layer):
            return (self.mu_plus - self.mu_minus) / 2
        at = self._known(layer)
        return float(self.malicious[:, at].mean() - self.benign[:, at].mean()) / 2

    def _known(self, layer: int | None) -> int:
        """The row of a layer's projections; DavspError if there is none."""
        row = self._row(layer)
        if not self.fitted:
            raise DavspError(
                f"the vector has margins at layer {self.layer} alone, and no projections to set those of layer {row + 1} by; "
                f"import it again with --layer {row + 1}, --mu-plus and --mu-minus"
            )
        return row

    def use_layer(self, layer: int) -> "HarmfulnessVector":
        """Take another layer, and its margins.

        Raises:
            DavspError: there is no such layer, or it is left out; or as `margins`.
        """
        self.direction(layer)
        self.layer, (self.mu_plus, self.mu_minus) = layer, self.margins(layer)
        return self

    @property
    def mean_malicious(self) -> Float[Tensor, " l"]:
        """Mean projection of the malicious fitting set, a layer each."""
        return self.malicious.mean(0)

    @property
    def mean_benign(self) -> Float[Tensor, " l"]:
        """Mean projection of the benign fitting set, a layer each."""
        return self.benign.mean(0)

    def _choose(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = self._left(rows)
        self.auroc = {int(row["layer"]): row["auroc"] for row in rows}
        best = max(self.auroc.values())
        good = [layer for layer, area in self.auroc.items() if area >= best - AS_GOOD]
        middle = (len(self.vectors) + 1) / 2
        self.use_layer(min(good, key=lambda layer: (abs(layer - middle), layer)))
        return rows

    # -- at rest ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write `vector.safetensors`, which is all there is, and `vector.json`, the same facts for people."""
        facts: dict[str, Any] = {
            "model_id": self.model_id,
            "revision": self.revision,
            "text": self.text,
            "layer": self.layer,
            "mu_plus": self.mu_plus,
            "mu_minus": self.mu_minus,
            "auroc": {str(layer): value for layer, value in self.auroc.items()},
            "table": self.table,
        }
        if self.template != CHECKPOINT:
            facts["template"] = self.template
        if self.undefended:
            facts["undefended"] = self.undefended
        tensors = {"vectors": self.vectors, "malicious": self.malicious, "benign": self.benign}
        save_tensors(Path(folder) / "vector.safetensors", tensors, {"davsp": to_json(facts)})
        write_json(Path(folder) / "vector.json", facts)

    @classmethod
    def from_published(
        cls,
        path: str | Path,
        layer: int | None = None,
        mu_plus: float | None = None,
        mu_minus: float | None = None,
        model_id: str = "",
        text: str | None = None,
    ) -> "HarmfulnessVector":
        """The authors' vector (`vector/harmfulness_vector.pt` of zhangyitonggg/DAVSP), or one that their `get_vector.py` made.

        It holds a direction a layer and nothing else: no model, no text, no projections. Their `layer_k` is `hidden_states[k]`, so
        it is layer k here. Their last one is left out: it was taken after the final norm. Template and padding are those that
        their `extract_hs.py` has no other way than.

        Args:
            path: a file of torch.save with a dictionary `layer_1` to `layer_L` of (D,), or one tensor (L, D); of any length, as
                their training divides by the norm, too. It is read with `weights_only`.
            layer: left out: 20, 27 and -2, as in their training script, for 40 layers of 5120 numbers.
            mu_plus: as above.
            mu_minus: as above.
            model_id: what the file does not say; left out: not known.
            text: as above.

        Raises:
            DavspError: it is no such file; NaN, infinity or a direction of zeros; the three are missing for another model or layer.
        """
        found = directions(Path(path))
        size, at, plus, minus = PUBLISHED
        given = (layer, mu_plus, mu_minus)
        if (tuple(found.shape) != size or layer not in (None, at)) and None in given:
            raise DavspError(
                f"{path} has {len(found)} layers of {found.shape[1]} numbers; margins {plus:+g} and {minus:+g} are known "
                f"for layer {at} of {size[0]} layers of {size[1]} alone: give --layer, --mu-plus and --mu-minus"
            )
        layer = at if layer is None else layer
        mu_plus, mu_minus = plus if mu_plus is None else mu_plus, minus if mu_minus is None else mu_minus
        if mu_plus <= mu_minus:
            raise DavspError(f"mu_plus ({mu_plus:g}) must be above mu_minus ({mu_minus:g}); give other margins")
        none = torch.empty(0, len(found) - 1)
        vectors = (found / found.norm(dim=1, keepdim=True))[:-1].contiguous()
        vector = cls(vectors, none, none.clone(), layer, mu_plus, mu_minus, model_id=model_id, text=text)
        vector.template, vector.undefended = PUBLISHED_SHOWN
        vector.direction()
        return vector

    @classmethod
    def load(cls, folder: str | Path) -> "HarmfulnessVector":
        """Read what `save` wrote.

        Raises:
            DavspError: missing, or not a vector.
        """
        import json

        path = Path(folder) / "vector.safetensors"
        tensors, metadata = read_tensors_and_metadata(path)
        try:
            facts = json.loads(metadata["davsp"])
            facts["auroc"] = {int(layer): value for layer, value in facts["auroc"].items()}
            return cls(**(tensors | facts))
        except (KeyError, TypeError, ValueError) as error:
            raise DavspError(f"{path} is no harmfulness vector ({words_of(error)}); fit it anew") from error


def _project(states: Float[Tensor, "n l d"], vectors: Float[Tensor, "l d"]) -> Float[Tensor, "n l"]:
    return (states.float() * vectors).sum(-1)
