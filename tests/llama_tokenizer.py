"""A tokenizer as Llama 2 has it, trained by SentencePiece on a few words; the converter needs no list to know it."""

from __future__ import annotations

import io
import random

from conversations import TEMPLATES
from tiny import WORDS
from tokenizers import normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

MARKS = ("<|im_start|>", "<|im_end|>")


def save_pieces(folder):
    """Write `tokenizer.model` and the tokenizer made of it, with marks and a chat template; returns the folder."""
    import sentencepiece

    chooser, model = random.Random(0), io.BytesIO()
    texts = (" ".join(chooser.choices(WORDS, k=8)) for _ in range(300))
    given = {"model_type": "bpe", "vocab_size": 318, "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **given)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    words = LlamaTokenizer.from_pretrained(folder).backend_tokenizer
    words.pre_tokenizer = None  # the file of Llama 2 puts a space in front of every piece of text, after marks too
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    names = {"bos_token": "<s>", "eos_token": MARKS[1], "unk_token": "<unk>", "pad_token": "<unk>"}
    found = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names)
    found.add_special_tokens({"extra_special_tokens": list(MARKS)})
    found.chat_template = TEMPLATES["chatml"]
    found.save_pretrained(folder)
    return folder
