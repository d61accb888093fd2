"""Split the rows of a JSON-lines file into train, validation and test, such that no key is in two of them.

    python scripts/data/split_by_key.py rows.jsonl --key lemma --answer label --out data/mine
    python scripts/data/split_by_key.py rows.jsonl --key head tail --answer relation --out data/mine --held-out 0.2

The sha256 of a key decides, so that a row keeps its place when others come or go. A row with several keys is kept
where they all belong to one split. Rows with an equal input are kept once; where their answers differ, all are left
out. Files over their limit keep the rows whose sha256 comes first, which is also the order in the file. Everything that
is left out is counted. The other scripts of this folder write their files with the functions here.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files import write_text

DIFFERS = "of an equal input but another answer"
SPLITS = ("train", "validation", "test")
Row = dict[str, Any]
Keyed = tuple[tuple[str, ...], Row]
"""A row after the keys that decide its split."""


def main() -> None:
    """Read, split, write."""
    parser = parser_of(__doc__, limit=1_000_000, held_out_limit=1_000_000)
    parser.add_argument("rows", type=Path, help="a .jsonl file")
    parser.add_argument("--key", nargs="+", required=True, help="columns; no value of theirs is in two splits")
    parser.add_argument("--answer", required=True, help="the column to be learned; the others are the input")
    options = parser.parse_args()
    rows = read_rows(options.rows, options.key, options.answer)
    write_splits(options.out, rows, options.answer, options, Counter())


def read_rows(path: Path, keys: list[str], answer: str) -> Iterator[Keyed]:
    """Read JSON objects that have these columns."""
    for number, line in enumerate(lines_of(path, "rows"), start=1):
        try:
            row = json.loads(line)
            _text(row).encode()  # half a surrogate pair has no UTF-8
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not JSON: {error}") from error
        missing = [name for name in [*keys, answer] if not isinstance(row, dict) or row.get(name) is None]
        if missing:
            raise InputError(f"{path}: line {number} has no {', '.join(missing)}; name other columns or drop the line")
        yield tuple(str(row[name]) for name in keys), row


def parser_of(doc: str | None, *, held_out: float = 0.1, limit: int, held_out_limit: int) -> argparse.ArgumentParser:
    """Make a parser with the options that all scripts of this folder have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--held-out", type=float, default=held_out, help="share of the keys in validation, and in test")
    parser.add_argument("--limit", type=int, default=limit, help="rows in a training file at most")
    parser.add_argument("--held-out-limit", type=int, default=held_out_limit, help="rows in each other file at most")
    return parser


def exit_code_of(work: Callable[[], None]) -> int:
    """Do the work; where the user's input is wrong say so in one message and return 2."""
    try:
        work()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def lines_of(path: Path, option: str) -> Iterator[str]:
    """Read the lines of a UTF-8 text file, without their ends."""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def fraction(text: str) -> float:
    """Draw a number in [0, 1) that follows from the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(keys: tuple[str, ...], held_out: float) -> str | None:
    """Name the split that all keys belong to; None where they belong to different ones."""
    drawn = [fraction(f"split {key}") for key in keys]
    names = {"test" if x < held_out else "validation" if x < 2 * held_out else "train" for x in drawn}
    return names.pop() if len(names) == 1 else None


def thin(
    rows: list[Keyed], answer: str, most: Callable[[Counter[str]], dict[str, int]], notes: Counter[str]
) -> list[Keyed]:
    """Keep about so many rows of an answer as `most` says, given how many there are; the same share in every split."""
    counts = Counter(row[answer] for _, row in rows)
    share = {name: limit / counts[name] for name, limit in most(counts).items() if counts[name]}
    kept = [(keys, row) for keys, row in rows if fraction(f"thin {_text(row)}") < share.get(row[answer], 1)]
    notes[f"of a frequent {answer}"] += len(rows) - len(kept)
    return kept


def write_splits(
    folder: Path, rows: Iterable[Keyed], answer: str, options: argparse.Namespace, left_out: Counter[str]
) -> list[str]:
    """Write train.jsonl, validation.jsonl and test.jsonl; print and return what was written and left out, by line.

    Args:
        folder: The folder of the files.
        rows: Rows after their keys.
        answer: The column to be learned; the others are the input.
        options: Those of `parser_of`.
        left_out: Counts of what whoever yields the rows leaves out, for the report; it may grow while they are read.

    Raises:
        InputError: A split has no row, or an option is out of its range.
    """
    if not 0 < options.held_out < 0.5 or min(options.limit, options.held_out_limit) < 1:
        raise InputError("--held-out is a share between 0 and 0.5, and limits are 1 or more")
    by_input: dict[str, tuple[tuple[str, ...], Row] | None] = {}
    for keys, row in rows:
        text = _text({name: value for name, value in row.items() if name != answer})
        if text not in by_input:
            by_input[text] = (keys, row)
            continue
        kept = by_input[text]
        equal = kept is not None and kept[1][answer] == row[answer]
        left_out["equal to another row" if equal else DIFFERS] += 1
        if kept is not None and not equal:
            left_out[DIFFERS] += 1
            by_input[text] = None
    files: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for keys, row in filter(None, by_input.values()):
        split = split_of(keys, options.held_out)
        if split is None:
            left_out["with keys of different splits"] += 1
        else:
            files[split].append(row)
    said = [_write(folder / f"{name}.jsonl", files[name], answer, options, left_out) for name in SPLITS]
    said += [f"left out: {count:,} {reason}" for reason, count in sorted(left_out.items()) if count]
    print("\n".join([f"{folder}", *(f"  {line}" for line in said)]), flush=True)
    return said


def _write(path: Path, rows: list[Row], answer: str, options: argparse.Namespace, left_out: Counter[str]) -> str:
    limit = options.limit if path.stem == "train" else options.held_out_limit
    if not rows:
        raise InputError(f"{path} would have no row: the source is too small for --held-out {options.held_out}")
    left_out["over the limit of their file"] += max(0, len(rows) - limit)
    rows = sorted(rows, key=lambda row: hashlib.sha256(_text(row).encode()).digest())[:limit]
    try:
        write_text(path, "".join(_text(row) + "\n" for row in rows))
    except OSError as error:
        raise InputError(f"--out: cannot write {path}: {error.strerror}") from error
    classes = Counter(row[answer] for row in rows if answer in ("label", "relation")).most_common()
    shown = ", ".join(f"{name} {count}" for name, count in classes)
    return f"{path.stem}: {len(rows):,} rows, {path.stat().st_size / 1e6:.1f} MB{shown and f'; {shown}'}"


def write_readme(folder: Path, name: str, about: str, doc: str | None, counts: dict[str, list[str]]) -> None:
    """Write README.md: whose data it is, how it was made, and the lines that `write_splits` returned."""
    text = f"# {name}, made into training data\n\n{about}\n\n```\n{(doc or '').strip()}\n```\n"
    tables = [f"\n## {name}\n\n" + "".join(f"- {line}\n" for line in lines) for name, lines in counts.items()]
    write_text(folder / "README.md", text + "".join(tables))


def _text(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
