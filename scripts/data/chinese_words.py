"""Turn the dictionary of jieba into JSON-lines files: Chinese words and names with their kind, split by word.

    pip install --no-deps jieba && python scripts/data/chinese_words.py --out data/chinese
    python scripts/data/chinese_words.py --source dict.txt --per-class 1000 --out data/chinese

Writes train.jsonl, validation.jsonl and test.jsonl with the columns text, a word of two or more Chinese characters, and
label, one of person, foreign_name (in characters that stand for sounds), place, organisation, number, idiom, noun and
verb. The kinds are the dictionary's, from newspapers and web pages, and some are wrong: a linear model on character
n-grams is right on 82 %. `--per-class` cuts the large classes. jieba is under the MIT licence according to its
metadata, which is copied; its code is not imported.
"""

import importlib.util
import re
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from split_by_key import Keyed, exit_code_of, lines_of, parser_of, thin, write_readme, write_splits

from distill.errors import InputError
from distill.files import write_text

KINDS = {
    "nr": "person", "nrt": "foreign_name", "ns": "place", "nt": "organisation", "m": "number", "i": "idiom",
    "n": "noun", "v": "verb",
}  # fmt: skip
"""The dictionary's tag: label. Its other tags are for few words or mixtures."""


def main() -> None:
    """Read the dictionary, write the splits and what its package says about the licence."""
    parser = parser_of(__doc__, limit=25_000, held_out_limit=4_000)
    parser.add_argument("--source", type=Path, help="dict.txt; default: that of the installed package jieba")
    parser.add_argument("--per-class", type=int, default=4_000, help="rows of a class, in all splits, about")
    options = parser.parse_args()
    if options.per_class < 1:
        raise InputError("--per-class is 1 or more")
    source = options.source or installed_dictionary()
    notes: Counter[str] = Counter()
    rows = thin(words(source, notes), "label", lambda found: dict.fromkeys(found, options.per_class), notes)
    counts = {"rows": write_splits(options.out, rows, "label", options, notes)}
    if options.source is None:
        write_text(options.out / "LICENSE", licence())
    else:
        print(f"no LICENSE written: look for the terms where {source} is from")
    about = "The dictionary of jieba, Copyright Sun Junyi, MIT licence."
    write_readme(options.out, "jieba's dictionary", about, __doc__, counts)


def installed_dictionary() -> Path:
    """Find the data file of the package without importing it."""
    found = importlib.util.find_spec("jieba")
    if found is None or not found.submodule_search_locations:
        raise InputError("the package jieba is not installed: `pip install --no-deps jieba`, or give --source dict.txt")
    return Path(found.submodule_search_locations[0], "dict.txt")


def licence() -> str:
    """Quote what the installed package says about itself; the package has no other file with its terms."""
    try:
        fields = distribution("jieba").metadata
    except PackageNotFoundError as error:
        raise InputError("jieba is there without its metadata; install it anew or give --source dict.txt") from error
    names = ("Name", "Version", "Home-page", "Author", "License", "Classifier")
    return "".join(f"{name}: {value}\n" for name in names for value in fields.get_all(name, []))


def words(path: Path, notes: Counter[str]) -> list[Keyed]:
    """List the words of the kinds in `KINDS`."""
    rows: list[Keyed] = []
    for number, line in enumerate(lines_of(path, "--source"), start=1):
        fields = line.split()
        if len(fields) != 3 or not fields[1].isdigit():
            raise InputError(f"{path}: line {number} is no 'word count tag': {line[:60]!r}")
        word, _, tag = fields
        if tag not in KINDS:
            notes["words of other kinds"] += 1
        elif not re.fullmatch(r"[\u4e00-\u9fff]{2,}", word):
            notes["words of one character or with others than Chinese ones"] += 1
        else:
            rows.append(((word,), {"text": word, "label": KINDS[tag]}))
    return rows


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
