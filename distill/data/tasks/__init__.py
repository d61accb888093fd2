"""Tasks, one file each; a row of `TASKS` names one."""

from collections.abc import Callable

from distill.data.tasks.causal_lm import CausalLM
from distill.data.tasks.chat import Chat
from distill.data.tasks.classification import Classification
from distill.data.tasks.embedding import Embedding
from distill.data.tasks.masked_lm import MaskedLM
from distill.data.tasks.question_answering import QuestionAnswering
from distill.data.tasks.relation_extraction import RelationExtraction
from distill.data.tasks.seq2seq import Seq2Seq
from distill.data.tasks.speech_to_text import SpeechToText
from distill.data.tasks.task import Task
from distill.data.tasks.token_classification import TokenClassification

__all__ = ["TASKS", "Task"]

TASKS: dict[str, Callable[[], Task]] = {
    "classification": Classification,
    "causal_lm": CausalLM,
    "question_answering": QuestionAnswering,
    "relation_extraction": RelationExtraction,
    "token_classification": TokenClassification,
    "chat": Chat,
    "masked_lm": MaskedLM,
    "embedding": Embedding,
    "seq2seq": Seq2Seq,
    "speech_to_text": SpeechToText,
}
"""Name in a recipe -> task; a function of the user's own that returns a `Task` is named `package.module:function`."""
