"""Hidden states from a server, in the form in which vLLM writes them (`extract_hidden_states`, 0.18 and later).

For every request the server writes a safetensors file into a folder that this machine sees as well, and its reply names the file
(`kv_transfer_params.hidden_states_path`). It holds `hidden_states` (tokens of the prompt, layers, width) and `token_ids` (tokens).
Layers are numbered as in `davsp.lvlm.base`: 0 is the embedding, l the output of block l before the final norm. Which layers
they are, neither the reply nor the file says, so the user says it. `FILE.lock` is locked until the file is whole. Whoever reads a
file takes it away, or the folder fills.

Source: vLLM's page "Hidden State Extraction" (v0.22 and main, read on 2026-11-29) and `ExampleHiddenStatesConnector`.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from davsp.errors import DavspError, words_of
from davsp.lvlm.base import LVLM, Canvas
from davsp.runtime.files import write_bytes

STATES, TOKENS, WHERE = "hidden_states", "token_ids", "hidden_states_path"
REPLY = "kv_transfer_params"
START = "start it as docs/evaluate.md says"
DEEPEST = 1000
"""No model has so many layers; a longer list is a slip of the user's."""


class ServedStates:
    """Where a server writes the hidden states of its prompts, and which.

    Args:
        folder: the server's `shared_storage_path`, as this machine sees it. Of the path in a reply the last part counts alone, so
            the folder may have another name there, and no reply leads out of it.
        layers: those that the server was told to write, in rising order; it writes them in that order whatever it was told.
        patience: seconds for which a file that the server has named is waited for.

    Raises:
        DavspError: no such folder; no layers, or not in rising order from 1.
    """

    def __init__(self, folder: str | Path, layers: Sequence[int], patience: float = 30.0) -> None:
        self.folder, self.layers, self.patience = Path(folder), tuple(layers), patience
        if not self.folder.is_dir():
            raise DavspError(
                f"there is no folder {folder} for the server's hidden states; give its shared_storage_path as this machine sees it "
                "(--states-folder)."
            )
        if (
            not self.layers
            or self.layers[0] < 1
            or any(b <= a for a, b in zip(self.layers, self.layers[1:], strict=False))
        ):
            raise DavspError(
                f"the layers of the server's hidden states are {list(self.layers)}; give them in rising order from 1, as the server "
                "was told them (--states-layers)."
            )

    def read(self, named: Any, counted: int | None) -> Float[Tensor, "l d"]:
        """The states of the last prompt token at `layers`, float32; the file is taken away.

        Args:
            named: what the reply has as `kv_transfer_params`.
            counted: tokens of the prompt, as the reply counts them; None: it does not.

        Raises:
            DavspError: the reply names no file; it is missing, broken, or of another shape; states that are no numbers.
        """
        path = self._file(named)
        if path is None:
            raise DavspError(f"the server's reply names no file of hidden states ({REPLY}.{WHERE}); {START}.")
        tensors = self._whole(path)
        self._take_away(path)
        states, tokens = tensors.get(STATES), tensors.get(TOKENS)
        if states is None or tokens is None or states.dim() != 3 or tokens.dim() != 1:
            held = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items())) or "nothing"
            raise DavspError(
                f"{path} holds {held}, not {STATES} (tokens, layers, width) and {TOKENS} (tokens); this form of the server's is not known: "
                "take a vLLM that docs/evaluate.md names."
            )
        if states.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise DavspError(
                f"{path} holds states as {states.dtype}; start the server with --dtype bfloat16, float16 or float32."
            )
        if states.shape[1] != len(self.layers):
            raise DavspError(
                f"{path} holds {states.shape[1]} layers, and --states-layers names {len(self.layers)}; name those that the server was told "
                "(eagle_aux_hidden_state_layer_ids)."
            )
        told = len(tokens) if counted is None else counted
        if not len(states) == len(tokens) == told or not told:
            raise DavspError(
                f"{path} holds states of {len(states)} tokens and the ids of {len(tokens)}, of a prompt that the server counts as {told}; start "
                "it with --no-enable-prefix-caching and --no-enable-chunked-prefill."
            )
        last = states[-1].float()
        if not bool(last.isfinite().all()) or not bool(last.any(-1).all()):
            raise DavspError(
                f"{path} holds states that are NaN, infinite or all zero; this server cannot give this model's states: load it here "
                "(--engine transformers)."
            )
        return last

    def drop(self, named: Any) -> None:
        """Take away a file that nobody will read, if it is there; `named` as in `read`."""
        path = self._file(named)
        if path is not None and path.is_file():
            self._take_away(path)

    def _file(self, named: Any) -> Path | None:
        where = named.get(WHERE) if isinstance(named, dict) else None
        return self.folder / Path(where).name if isinstance(where, str) and Path(where).name else None

    def _whole(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file once it is written."""
        from safetensors.torch import load

        until = time.monotonic() + self.patience
        while True:
            try:
                with _written(path):
                    return load(path.read_bytes())
            except (
                Exception
            ) as error:  # not there, not whole, or locked; safetensors raises its own class, ValueError and KeyError
                if time.monotonic() < until:
                    time.sleep(0.02)
                    continue
                if isinstance(error, FileNotFoundError):
                    raise DavspError(
                        f"the server has named {path.name}, and {self.folder} does not hold it; give the folder that is its "
                        "shared_storage_path, as this machine sees it (--states-folder)."
                    ) from error
                if isinstance(error, BlockingIOError):
                    raise DavspError(
                        f"the server has not written {path} within {self.patience:g} seconds; see its log."
                    ) from error
                raise DavspError(
                    f"{path} cannot be read ({words_of(error)}); see the server's log, and that this user may read the folder."
                ) from error

    def _take_away(self, path: Path) -> None:
        try:
            path.unlink()
            _lock_of(path).unlink(missing_ok=True)
        except OSError as error:
            raise DavspError(
                f"{path} cannot be taken away ({error.strerror}), and each request leaves such a file; let this user write to "
                f"{self.folder}."
            ) from error


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Inside, no server is writing the file; BlockingIOError while one is. Older ones have no locks."""
    import fcntl  # not on Windows, where such a server does not run either

    lock = _lock_of(path)
    with open(lock) if lock.exists() else nullcontext() as file:
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def read_layers(text: str) -> tuple[int, ...]:
    """Layers as a user names them: 14, or 8,16,24, or 1-31.

    Raises:
        DavspError: it is none of these.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 30:
            raise DavspError(f"--states-layers {text!r} names no layers; give them as 14, 8,16,24 or 1-31.")
        low, high = int(first), int(last if dash else first)
        if not low <= high <= DEEPEST:
            raise DavspError(
                f"--states-layers {part.strip()} is no layer of a model; give numbers that rise, {DEEPEST} at most."
            )
        layers += range(low, high + 1)
    return tuple(layers)


def write(lvlm: LVLM, canvas: Canvas | None, question: str, served: ServedStates) -> dict[str, str]:
    """Write the states of one prompt as such a server does; returns what its reply says of them.

    Raises:
        DavspError: a folder that cannot be written to.
    """
    import fcntl

    from safetensors.torch import save

    tokens = lvlm.encode([question], lvlm.sizes(canvas))
    with torch.no_grad():
        inputs = lvlm.inputs(tokens, canvas) | {"use_cache": False, "output_hidden_states": True, "logits_to_keep": 1}
        hidden = lvlm.model(**inputs).hidden_states
    states = torch.stack([hidden[layer][0].cpu() for layer in served.layers], dim=1)  # (t, l, d)
    path = served.folder / f"{uuid.uuid4().hex}.safetensors"
    try:
        with open(_lock_of(path), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_bytes(path, save({STATES: states.contiguous(), TOKENS: tokens.ids[0].cpu()}))
    except OSError as error:
        raise DavspError(
            f"hidden states cannot be written into {served.folder} ({error.strerror}); let this user write there, with room for them "
            "(--states-folder)."
        ) from error
    return {WHERE: str(path)}
