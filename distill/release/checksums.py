"""The checksums of a release, and the files that are not what they say."""

from __future__ import annotations

from pathlib import Path

from distill.errors import InputError
from distill.files import sha256_of
from distill.recipe.locate import CHECKSUMS


def listed_files(folder: Path) -> dict[str, str]:
    """Read name -> sha256 of the files that a release was made of. Raises InputError where it does not say."""
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder} has no readable {CHECKSUMS}, so it is no release of distill") from error
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def changed_files(folder: Path) -> dict[str, tuple[str, str]]:
    """Find files that were changed, removed or added: name -> (sha256 as listed, as found), or what is in its place."""
    listed = listed_files(folder)
    files = [file for file in folder.rglob("*") if file.is_file() or file.is_symlink()]
    found = {str(file.relative_to(folder)): "a link" if file.is_symlink() else sha256_of(file) for file in files}
    found.pop(CHECKSUMS, None)
    names = sorted(listed.keys() | found.keys())
    pairs = {name: (listed.get(name, "not listed"), found.get(name, "missing")) for name in names}
    return {name: (claimed, own) for name, (claimed, own) in pairs.items() if claimed != own}
