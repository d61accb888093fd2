"""Files and folders that are either complete or not there, and what they contain."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distill.errors import InputError

MAX_JSON = 100_000_000
"""Bytes of a JSON file that is read."""
LFS = b"version https://git-lfs.github.com/"
"""What a pointer of Git LFS begins with."""
REMOVE = "remove it, and give the same command again: its stage makes it anew"


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file's content; a file that has not changed is read once per process."""
    stat = path.stat()
    # The change time is the kernel's own: `os.utime` cannot set it, so an edited file never passes for the old one.
    return _sha256(_Content(path, (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)))


@dataclass(frozen=True)
class _Content:
    """A file as it is now, also after it or its folder was renamed."""

    path: Path = field(compare=False)
    signature: tuple[int, ...]


@lru_cache(maxsize=4096)
def _sha256(content: _Content) -> str:
    with content.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_fetched(path: Path) -> None:
    """Refuse the pointer that Git LFS leaves in the place of a file that was not fetched. Raises InputError."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS))
    except OSError:  # said by whoever reads it
        return
    if start == LFS:
        raise InputError(f"{path} is a pointer of Git LFS, not the file itself; fetch it with git lfs pull")


def content_of(path: Path) -> str:
    """Return one sha256 over a file, or over the names and contents of all files below a folder; empty when missing."""
    if path.is_file():
        return sha256_of(path)
    if not path.is_dir():
        return ""
    listing = {str(file.relative_to(path)): sha256_of(file) for file in sorted(path.rglob("*")) if file.is_file()}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def cache_folder(kind: str) -> Path:
    """Return the folder of the user's cache for one kind of content, made where it is missing; only they can read it.

    Raises:
        InputError: It cannot be made.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(os.environ.get("DISTILL_CACHE") or f"{home}/distill").expanduser() / kind
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(root, os.W_OK):
            raise PermissionError(None, "nothing can be written to it")
    except OSError as error:
        raise InputError(f"{root} cannot be the cache: {error.strerror}; set DISTILL_CACHE to a folder") from error
    return root


def write_text(path: Path, text: str) -> None:
    """Replace a file's content at once: readers see the old text or the new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)
    with temporary.open("x", encoding="utf-8") as file:  # a new file: a link of that name would be written through
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with `write_text`; refuses NaN, which is not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, **options: Any) -> Any:
    """Read JSON. Raises InputError when the file is no regular one, is huge, nested too deeply or no JSON.

    Args:
        path: The file.
        options: Those of `json.loads`.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")  # a pipe may never end
        with path.open("rb") as file:
            content = file.read(MAX_JSON + 1)
        if len(content) > MAX_JSON:
            raise ValueError(f"it has more than {MAX_JSON:,} bytes")
        return json.loads(content, **options)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError as `read_json`, and when the file holds something else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object")
    return found


def read_written(path: Path, shape: Any, fix: str = REMOVE) -> Any:
    """Read JSON that distill wrote. Raises InputError as `read_json`, and where it is not as it was written.

    Args:
        path: The file.
        shape: Type that the content must have, as pydantic checks it; other keys may be there.
        fix: What the user can do about a file of another shape.
    """
    try:
        found = read_json(path, parse_constant=_refuse_constant)
        TypeAdapter(shape).validate_json(json.dumps(found), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise InputError(f"{path} is not as distill wrote it ({place}: {first['msg']}); {fix}") from error
    except InputError as error:
        raise InputError(f"{error}; {fix}") from error
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def parts_of(value: Any) -> Iterator[Any]:
    """Yield a JSON value and everything inside it, the outer parts first."""
    left = [value]
    while left:
        value = left.pop()
        yield value
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the place of `path` when the block ends without an error.

    Its files get the permissions that the umask gives new ones.

    The old folder is moved aside, the new one in, and only then is the old one removed: whenever the process is killed,
    one of them is whole. Where that happens between the two moves, `put_back` restores the old one.
    """
    temporary, aside = path.with_name(f".{path.name}.tmp"), _aside(path)
    put_back(path)
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        readable = temporary.stat().st_mode & 0o666  # the umask's, as `mkdir` got it; safetensors writes 600
        for path_inside in (*temporary.rglob("*"), temporary):
            if path_inside.is_file():
                path_inside.chmod(readable)
            flush(path_inside)
    except BaseException:
        remove(temporary)  # half a folder is of no use, and the disk may be full
        raise
    if path.is_symlink() or path.exists():
        os.rename(path, aside)
    os.rename(temporary, path)
    flush(path.parent)
    remove(aside)


def put_back(path: Path) -> None:
    """Finish a replacement by `fresh_folder` that was killed: the old folder returns unless a new one is in place."""
    aside = _aside(path)
    if path.exists():
        remove(aside)
    elif aside.exists():
        os.rename(aside, path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def remove(path: Path) -> None:
    """Remove a file or a folder with everything in it, if it is there; of a link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_plain_name(name: Any) -> bool:
    """Tell whether a name that a stranger's file gives to another file leads nowhere else than into a folder."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..")


def flush(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
