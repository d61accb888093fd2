"""Small corpora of texts that are written by a test, with a tokenizer that knows every text."""

from __future__ import annotations

import json
import tempfile
from hashlib import sha256
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.data import TASKS, Corpus
from distill.data.prepare import prepare
from distill.data.rows import Order
from distill.recipe.schema import AllData


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that its texts can be read again."""
    vocabulary = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=10**6, **names)


def prepared(folder: Path, seed: int = 0, looks: bool = False, **data) -> Corpus:
    """Prepare the corpus of a section `data`, by default of `data.jsonl`, for classification."""
    given = {
        "task": "classification",
        "max_length": 100,
        **({} if "train" in data else {"source": "./data.jsonl"}),
        **data,
    }
    spec = AllData.model_validate(given)
    order = Order(TASKS[spec.task](), spec, byte_tokenizer(), seed, folder, looks=looks, packs=True)
    return prepare(order, Path(tempfile.mkdtemp(dir=folder)))


def texts_of(corpus: Corpus, split: str) -> list[str]:
    """Read the examples of a split again."""
    examples, tokenizer = corpus.splits[split], byte_tokenizer()
    return [tokenizer.decode(examples[index].tolist(), skip_special_tokens=True) for index in range(len(examples))]


def labels_of(corpus: Corpus, split: str) -> dict[str, str | None]:
    """Text -> class of the examples of a split; None where it is hidden or not there."""
    examples = corpus.splits[split]
    labels = examples.take(range(len(examples)))["label"].tolist()
    names = [None if label < 0 else corpus.classes[label] for label in labels]
    return dict(zip(texts_of(corpus, split), names, strict=True))


def write_rows(folder: Path, rows, name: str = "data.jsonl") -> None:
    """Write texts, or pairs of text and label, as JSON lines."""
    pairs = [
        {"text": each} if isinstance(each, str) else dict(zip(("text", "label"), each, strict=True)) for each in rows
    ]
    (folder / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def is_held_out(text: str, share: float = 0.2) -> bool:
    """Tell whether the hash of a text puts it into the test split."""
    return int.from_bytes(sha256(f"split:{text}".encode()).digest()[:4], "big") / 2**32 < share
