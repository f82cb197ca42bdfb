"""Reading and writing files: either the whole new file is there, or the old one is left as it was."""

import hashlib
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from davsp.errors import DavspError

Pathlike = str | Path


def write_all(folder: Pathlike, contents: Mapping[str, bytes]) -> None:
    """Write several files into `folder`; all are on the disk before the first one takes its place.

    Args:
        folder: made if missing.
        contents: file name -> bytes; the last one is put in place last, so it can serve as a seal.

    Raises:
        DavspError: the disk is full, or the folder can't be written to. No file has been changed.
    """
    folder, staged = Path(folder), {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
            staged[temporary] = folder / name
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes files private; ours are ordinary files
        for temporary, target in staged.items():
            os.replace(temporary, target)
    except OSError as error:
        place = folder / next(iter(contents)) if len(contents) == 1 else folder
        raise DavspError(
            f"cannot write {place}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        for temporary in staged:
            Path(temporary).unlink(missing_ok=True)


def sweep(folder: Pathlike) -> None:
    """Remove what `write_all` left in a folder when it was killed; nobody else may be writing there."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def alone(folder: Pathlike) -> Iterator[None]:
    """Keep every other process that also asks out of a folder; the end of this one, however it comes, lets them in.

    The lock is on the folder itself, so it leaves no file behind. Where there are none (Windows, some network file systems),
    a warning says so.

    Args:
        folder: made if missing.

    Raises:
        DavspError: another process has it, or it cannot be made.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DavspError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    handle = _lock(folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int | None:
    """A locked descriptor of a folder; None, with a warning, where folders have no locks."""
    handle = None
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except (ImportError, OSError) as error:
        if handle is not None:
            os.close(handle)
        if isinstance(error, BlockingIOError):
            raise DavspError(
                f"another davsp is writing into {folder}; wait until it has ended, or give another folder"
            ) from error
        warnings.warn(f"{folder} cannot be locked ({error}); let no second davsp write there", stacklevel=4)
        return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()


def write_bytes(path: Pathlike, data: bytes) -> None:
    """Write one file atomically (see `write_all`)."""
    path = Path(path)
    write_all(path.parent, {path.name: data})


def write_text(path: Pathlike, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Pathlike, value: Any) -> None:
    """Write indented JSON atomically. NaN is refused: it is not JSON."""
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """Indented JSON with a final newline.

    Raises:
        DavspError: the value holds a NaN or an infinity.
        TypeError: it holds something that JSON has no form for; of those only a path is written, as text.
    """
    try:
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_path) + "\n"
    except ValueError as error:
        raise DavspError(f"a figure is not a finite number, so it cannot be written as JSON: {error}") from error


def _path(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be written as JSON")


def save_tensors(path: Pathlike, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; `metadata` goes into its header."""
    # torch is slow to import and not needed for text files
    from safetensors.torch import save

    write_bytes(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))


def check_regular(path: Pathlike) -> None:
    """Raises DavspError at a pipe or a device in a stranger's folder, for which one would wait for ever."""
    if (
        os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    ):  # not Path's, which fails on a long name
        raise DavspError(f"{path} is a pipe or a device, not a file; put the file there")


def read_bytes(path: Pathlike) -> bytes:
    """The file's bytes.

    Raises:
        DavspError: it is missing or can't be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DavspError(f"cannot read {path}: {error.strerror or error}") from error


def read_text(path: Pathlike) -> str:
    """The text of a user's UTF-8 file, line ends as they are, without the byte order mark that editors on Windows put first.

    Raises:
        DavspError: missing, unreadable or not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DavspError(f"{path} is not UTF-8 text ({error}); save it as UTF-8, or fetch it again.") from error


def read_json(path: Pathlike) -> Any:
    """Parse a JSON file.

    Raises:
        DavspError: missing, unreadable or not JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DavspError(f"{path} is not JSON: {error}; restore or delete the file") from error


def read_tensors(path: Pathlike) -> dict[str, Any]:
    """The tensors of a safetensors file, on the CPU."""
    return read_tensors_and_metadata(path)[0]


def read_tensors_and_metadata(path: Pathlike) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and header metadata of a safetensors file.

    Raises:
        DavspError: missing, unreadable or not safetensors.
    """
    from safetensors.torch import load

    data = read_bytes(path)
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except Exception as error:  # the library raises its own class, and ValueError, and KeyError
        raise DavspError(f"{path} is not a safetensors file: {error}; restore or delete it") from error
    return tensors, header.get("__metadata__", {})


def read_torch(path: Pathlike, wanted: str) -> Any:
    """What a file of torch.save holds, on the CPU; read with `weights_only`, so that no code in it is run.

    Args:
        wanted: what to give instead, for the error.

    Raises:
        DavspError: missing, unreadable, no file of torch.save, or one that holds more than tensors.
    """
    import io

    import torch

    data = read_bytes(path)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        raise DavspError(f"{path} is not read, for it {_no_torch(data, error)}; give {wanted}.") from error


def _no_torch(data: bytes, error: Exception) -> str:
    """Why torch.load does not read a file. Its own words are left out: they advise to read the file without weights_only."""
    import io
    import zipfile

    zipped, pickled = data.startswith(b"PK"), data.startswith(b"\x80")  # torch.save's form, and that before 1.6
    if not zipped and not pickled:
        return "is no file of torch.save" if data else "is empty"
    if zipped and not zipfile.is_zipfile(io.BytesIO(data)):
        return "is cut"
    if isinstance(error, pickle.UnpicklingError):
        return "holds more than tensors, which may be code"
    return f"cannot be taken apart ({type(error).__name__})"


def sha256(path: Pathlike) -> str:
    """Hex SHA-256 of a file."""
    return sha256_bytes(read_bytes(path))


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def manifest(**extra: Any) -> dict[str, Any]:
    """What made a result: versions, machine, commit, time, command line; `extra` is added as it is."""
    import PIL
    import torch
    import transformers

    import davsp

    return {
        "davsp": davsp.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],  # not where it is installed
        **extra,
    }


def _commit() -> dict[str, Any]:
    """Commit and dirtiness of the checkout this package is run from; nothing when it is installed."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists() or not (root / "src" / "davsp").is_dir():
        return {}
    try:
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "-C", str(root), "status", "--porcelain"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return {}
    return {"commit": head.stdout.strip(), "dirty": bool(status.stdout.strip())}
