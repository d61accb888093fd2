"""Push a release to the model hub: what is listed in its checksums and nothing else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from distill.errors import InputError, RunError
from distill.recipe.locate import CHECKSUMS
from distill.release.checksums import changed_files, listed_files

TOKEN = "HF_TOKEN"  # noqa: S105 (the name of a variable)


@dataclass(frozen=True)
class Push:
    """A release on its way to a repository."""

    folder: Path
    repository: str
    public: bool
    exists: bool
    uploaded: dict[str, int]
    """Name of each file -> bytes."""
    removed: tuple[str, ...]
    """Files of the repository that the release does not have."""

    def describe(self) -> list[str]:
        """Say what would be done, a line for each file."""
        kind = "public" if self.public else "private"
        lines = [f"{'to' if self.exists else 'a new repository,'} {self.repository} ({kind}):"]
        lines += [f"  {name}, {size / 1e6:,.1f} MB" for name, size in self.uploaded.items()]
        return lines + [f"  {name} is removed there" for name in self.removed]


def prepare_push(folder: Path, repository: str, *, public: bool) -> Push:
    """Look at a release and at the repository that it goes to; nothing is sent but questions.

    Raises:
        InputError: There is no token, the folder is not as it was released, or the repository is public and that was
            not asked for, or the other way round.
        RunError: The hub cannot be reached.
    """
    if not os.environ.get(TOKEN):
        raise InputError(f"{TOKEN} is not set; put a token that may write into the environment, never into a recipe")
    if changed := changed_files(folder):
        listed = ", ".join(list(changed)[:5])
        raise InputError(f"{folder} is not as it was released: {listed}; `distill verify` says more")
    sizes = {name: (folder / name).stat().st_size for name in sorted([*listed_files(folder), CHECKSUMS])}
    try:
        there = _api().model_info(repository)
    except RepositoryNotFoundError:
        return Push(folder, repository, public, exists=False, uploaded=sizes, removed=())
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise _explain(error, repository) from error
    if bool(there.private) is public:
        kind, flag = ("private", "leave out --public") if there.private else ("public", "add --public")
        raise InputError(f"{repository} is {kind} already; {flag}, or name another")
    removed = tuple(sorted({each.rfilename for each in there.siblings or ()} - sizes.keys() - {".gitattributes"}))
    return Push(folder, repository, public, exists=True, uploaded=sizes, removed=removed)


def push(prepared: Push) -> str:
    """Create the repository where it is missing, and send everything as one commit; returns the commit's address.

    Raises:
        InputError: The token may not write there.
        RunError: The hub refused it, or cannot be reached.
    """
    api = _api()
    try:
        if not prepared.exists:
            api.create_repo(prepared.repository, private=not prepared.public)
        # `upload_folder` takes patterns, which a file may be named like, and with hf_xet makes several commits.
        added = [CommitOperationAdd(name, prepared.folder / name) for name in prepared.uploaded]
        removed = [CommitOperationDelete(name) for name in prepared.removed]
        done = api.create_commit(prepared.repository, [*removed, *added], commit_message="Release by distill")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, RuntimeError, ValueError) as error:
        raise _explain(error, prepared.repository) from error
    return str(done.commit_url)


def _api() -> HfApi:
    return HfApi(token=os.environ[TOKEN], library_name="distill")


def _explain(error: Exception, repository: str) -> InputError | RunError:
    """Put an error of the hub into one line; none of them holds the token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if status in (401, 403):
        return InputError(f"the token in {TOKEN} may not write to {repository}: {reason}")
    if isinstance(error, HFValidationError):
        return InputError(f"{repository!r} is no name of a repository, ORG/NAME: {reason}")
    return RunError(f"the model hub: {reason}; what was sent is not visible until the whole is there")
