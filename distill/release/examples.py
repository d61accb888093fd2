"""The examples of a model card: Python that runs the student and its other forms, and prints something short."""

from __future__ import annotations

import json

from distill.release.evidence import Evidence
from distill.release.forms import examples as form_examples
from distill.release.wording import one_line, printable

USES = {
    "AutoModelForSequenceClassification": (
        "text-classification",
        "print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])",
    ),
    "AutoModelForTokenClassification": (
        "token-classification",
        "print([model.config.id2label[i] for i in model(**inputs).logits.argmax(-1)[0].tolist()])",
    ),
    "AutoModelForCausalLM": (
        "text-generation",
        "tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]\n"
        "print(tokenizer.decode(tokens, skip_special_tokens=True))",
    ),
    "AutoModelForMaskedLM": (
        "fill-mask",
        "logits = model(**inputs).logits[inputs.input_ids == tokenizer.mask_token_id]\n"
        "print(tokenizer.batch_decode(logits.argmax(-1)))",
    ),
    "AutoModelForSeq2SeqLM": (
        "text2text-generation",
        "tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]\n"
        "print(tokenizer.decode(tokens, skip_special_tokens=True))",
    ),
    "AutoModelForQuestionAnswering": (
        "question-answering",
        "output = model(**inputs)\n"
        "start = output.start_logits[0].argmax()\n"
        "end = start + output.end_logits[0, start:].argmax()\n"
        "print(tokenizer.decode(inputs.input_ids[0, start : end + 1], skip_special_tokens=True))",
    ),
    "AutoModel": (
        "sentence-similarity",
        "vectors = model.encode(['Some text.'])\nprint(vectors.shape, vectors[0, :3].round(2))",
    ),
    "AutoModelForSpeechSeq2Seq": (
        "automatic-speech-recognition",
        "sound = numpy.zeros(16_000, 'float32')  # a second of silence; put samples of your own in its place\n"
        "print(pipeline('automatic-speech-recognition', folder)(sound)['text'])",
    ),
}
"""Class of transformers -> hub task and the lines that use the model and print something short, always the same."""
KIND_USES = {
    "multi_label": (
        "scores = model(**inputs).logits.sigmoid()[0].tolist()\n"
        "print([model.config.id2label[i] for i, score in enumerate(scores) if score > 0.5])"
    ),
    "regression": "print(round(model(**inputs).logits.item(), 2))",
}
"""Kind of predictions -> the lines that use the model, where these are not those of its class."""
STUDENT = "the student"
"""Title of the example that runs the student itself."""
VECTORS = "AutoModel"
"""Class of models without a head, whose vectors sentence-transformers makes."""


def card_examples(evidence: Evidence) -> dict[str, str]:
    """Write Python that runs the student, by the title `STUDENT`, and each other form of the release, by its own."""
    recipe = evidence.recipe
    return {STUDENT: snippet(evidence), **form_examples(recipe.release.also, evidence.auto_class, recipe.name)}


def snippet(evidence: Evidence) -> str:
    """Write Python that loads and uses the student with transformers, and the release's own code where it has some."""
    name, kind = one_line(evidence.auto_class), str(evidence.evaluation["data"].get("kind"))
    _, use = USES.get(name, ("", ""))
    use, given = KIND_USES.get(kind, use), _given(evidence, name)
    folder = f'folder = "{evidence.recipe.name}"  # this folder, or its id on the hub'
    code = ", trust_remote_code=True" if evidence.release_format == "native" else ""
    if name == "AutoModelForSpeechSeq2Seq":
        return f"import numpy\nfrom transformers import pipeline\n\n{folder}\n{use}"
    if name == VECTORS:
        load = f"model = SentenceTransformer(folder{code})"
        return f"from sentence_transformers import SentenceTransformer\n\n{folder}\n{load}\n{use}"
    return f"""from transformers import {name}, AutoTokenizer

{folder}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {name}.from_pretrained(folder{code})
{f"inputs = {given}" if use else "print(model.num_parameters())  # what it reads is up to its class"}
{use}""".rstrip()


def _given(evidence: Evidence, name: str) -> str:
    """Write the expression that makes the inputs of the example from texts of our own."""
    if name == "AutoModelForMaskedLM":
        return 'tokenizer(f"Paris is the {tokenizer.mask_token} of France.", return_tensors="pt")'
    if evidence.recipe.data.task == "chat":
        return """tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello!"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
    pair = ["Another text."] if len(evidence.sample) == 1 and "pair" in evidence.recipe.data.columns else []
    first, *rest = (*evidence.sample, *pair)
    texts = [printable(text) for text in (f"{evidence.recipe.data.prefix or ''}{first}", *rest)]
    return f'tokenizer({", ".join(json.dumps(text, ensure_ascii=False) for text in texts)}, return_tensors="pt")'
