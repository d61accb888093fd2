"""Turn the docstrings of the installed standard library into questions and answers for chat, split by name.

    python scripts/data/docstring_questions.py --out recipes/smollm2-chat/data

Writes train.jsonl, validation.jsonl and test.jsonl with the columns prompt, a question about a function or class with
what it is called with, and completion, its docstring as far as that is prose. The last part of the name decides the
split, so that a method and what overrides it are in one. topics.jsonl has questions about the language itself, answered
by the beginning of its documentation (pydoc_data.topics), to measure on what nobody trained on. The texts differ a
little between versions of Python; README.md says which one it was.
"""

import ast
import json
import re
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from docstring_pairs import Definition, described
from split_by_key import Keyed, Row, exit_code_of, fraction, parser_of, write_readme, write_splits

from distill.files import write_text

QUESTIONS = (
    "What does {} do?",
    "What is {} for?",
    "Explain {} in a few words.",
    "I found {}. What does it do?",
    "Please describe {}.",
)
NO_PROSE = re.compile(r"^\s|^[-=*>#:|]|>>>|->|::|^\w+:\s*$|\s{3}|[-=]{3}", re.MULTILINE)
"""Marks of tables, lists, headings and code."""


def main() -> None:
    """Read the library, write the splits, the topics and their licence."""
    parser = parser_of(__doc__, limit=20_000, held_out_limit=200)
    parser.add_argument("--shortest", type=int, default=60, help="characters that an answer has at least")
    parser.add_argument("--longest", type=int, default=500, help="characters that an answer has at most")
    options = parser.parse_args()
    root = Path(sysconfig.get_paths()["stdlib"])
    notes: Counter[str] = Counter()
    rows = questions(root, options.shortest, options.longest, notes)
    said = write_splits(options.out, rows, "completion", options, notes)
    topics = list(topic_questions(options.shortest, options.longest))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in topics]
    write_text(options.out / "topics.jsonl", "".join(lines))
    said.append(f"topics: {len(topics)} rows")
    print(f"  {said[-1]}")
    if (root / "LICENSE.txt").is_file():
        shutil.copyfile(root / "LICENSE.txt", options.out / "LICENSE")
    about = f"Documentation of Python {sys.version.split()[0]}, Copyright Python Software Foundation, PSF licence."
    write_readme(options.out, "Questions about Python's library", about, __doc__, {"rows": said})


def questions(root: Path, shortest: int, longest: int, notes: Counter[str]) -> Iterator[Keyed]:
    """Yield a question about each public function and class whose docstring begins with prose, each answer once."""
    seen: set[str] = set()
    for names, node, docstring in described(root, notes):
        answer = prose(docstring, longest)
        if len(answer) < shortest:
            notes["docstrings that begin with little prose, or with much"] += 1
        elif answer in seen:
            notes["answers that another name has too"] += 1
        else:
            seen.add(answer)
            subject = f"the {kind_of(names, node)} `{'.'.join(names)}{called_with(node)}` of Python's standard library"
            form = QUESTIONS[int(fraction(f"question {subject}") * len(QUESTIONS))]
            yield (names[-1].lower(),), {"prompt": form.format(subject), "completion": answer}


def topic_questions(shortest: int, longest: int) -> Iterator[Row]:
    """Yield a question about each topic of Python's help that begins with prose after its title."""
    from pydoc_data.topics import topics

    for _, text in sorted(topics.items()):
        title, _, rest = str(text).partition("\n")
        answer = prose(rest.lstrip("*=-\n"), longest)
        if len(answer) >= shortest:
            subject = re.sub(r"^The (?=\")", "the ", title)
            yield {"prompt": f"What does Python's documentation say about {subject}?", "completion": answer}


def prose(text: str, longest: int) -> str:
    """Return the paragraphs that a text begins with, as far as they are prose, of so many characters at most."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        words = " ".join(paragraph.split())
        if NO_PROSE.search(paragraph) or len("\n\n".join([*kept, words])) > longest:
            break
        kept.append(words)
    while kept and kept[-1].endswith(":"):  # it introduces what is no prose
        kept.pop()
    return "\n\n".join(kept)


def kind_of(names: list[str], node: Definition) -> str:
    """Name what is defined, by the capital letter of the class that a method is in."""
    if isinstance(node, ast.ClassDef):
        return "class"
    return "method" if len(names) > 1 and names[-2][:1].isupper() else "function"


def called_with(node: Definition) -> str:
    """Write the parameters of a function in brackets, without `self`; nothing for a class."""
    if isinstance(node, ast.ClassDef):
        return ""
    return f"({re.sub(r'^(self|cls)(, |$)', '', ast.unparse(node.args))})"


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
