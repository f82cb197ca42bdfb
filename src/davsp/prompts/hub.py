"""Prompts on the hub: there and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from davsp.errors import DavspError, words_of
from davsp.runtime.files import check_regular


def fetch(source: str | Path, revision: str | None, files: Sequence[str]) -> Path:
    """The folder of a prompt: as given, or in the hub client's cache.

    Args:
        source: a folder, or USER/NAME or USER/NAME@REVISION of the hub.
        revision: hub branch, tag or commit.
        files: to be fetched; nothing else is.

    Raises:
        DavspError: a pipe in place of a file, a revision of a folder, two revisions, or a hub id that cannot be loaded (offline: that is not in the cache).
    """
    if Path(source).is_dir():
        if revision is not None:
            raise DavspError(f"revision {revision!r} is for the hub, and {source} is a folder; leave it out")
        for name in files:
            check_regular(Path(source) / name)
        return Path(source)
    repo_id, _, behind = str(source).partition("@")
    if behind and revision not in (None, behind):
        raise DavspError(f"{source} and revision {revision!r} name two revisions; leave one out")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision or behind or None, allow_patterns=list(files)))
    except Exception as error:  # the hub client raises many kinds: bad name, not found, no network, no access
        raise DavspError(
            f"no prompt at {source}: it is neither a folder nor reachable on the hub ({words_of(error)})"
        ) from error


def push(
    repo_id: str, contents: Mapping[str, bytes], token: str | None = None, private: bool | None = None,
    revision: str | None = None, commit_message: str = "Visual safety prompt", gone: Sequence[str] = (),
) -> str:  # fmt: skip
    """Put files into a repository in one commit; the repository and the branch are made if they are not there.

    Args:
        gone: files of the prompt that was there before, which this one has not; they are taken away.

    Returns:
        The commit's address.

    Raises:
        DavspError: the hub cannot be reached, or refuses; none of the files is there then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api: Any = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations: list[Any] = [CommitOperationAdd(name, data) for name, data in contents.items()]
        old = (name for name in gone if api.file_exists(repo_id, name, revision=revision))
        operations += [CommitOperationDelete(name) for name in old]
        return str(api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision).commit_url)
    except Exception as error:  # as above
        raise DavspError(f"{repo_id} cannot be pushed to the hub ({words_of(error)}){login(error)}") from error


def login(error: Exception) -> str:
    """Advice to log in, where the hub said that it does not know or let in who asks."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return "; see `hf auth login`" if status in (401, 403) or "oken" in type(error).__name__ else ""
