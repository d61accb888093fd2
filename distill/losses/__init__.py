"""The training loss: what a student can match, how that is compared, and how the terms are added up.

`LOGITS`, `HIDDEN`, `ATTENTION` and `RELATION` are pure functions that return one value per position; `Objective` alone
shifts, masks, scales, weights and counts; `layer_map` says which layers are compared.

Your own loss is one function. Write it in any importable module,

    def huber(student: Tensor, teacher: Tensor, *, delta: float = 1.0) -> Tensor:
        return torch.nn.functional.huber_loss(student, teacher, delta=delta, reduction="none").mean(-1)

and name it in the recipe; its keyword-only arguments are its parameters:

    losses:
      - {match: hidden, loss: "my_losses:huber", params: {delta: 0.5}}

It receives the valid positions of both sides, [N, D] (hidden states) or [N, V] (logits, with `temperature` as a further
keyword-only argument), must compute in fp32 or wider, cope with N = 0, and return [N]: no mean over positions, no mask,
no temperature², no weight. A loss for everybody is the same function with a row in the table at the foot of
`logits.py` or `hidden.py`; the shared tests then cover it, and ask for a number derived by hand.
"""

from distill.losses.hidden import HIDDEN
from distill.losses.kinds import PREDICTION_KINDS
from distill.losses.logits import LOGITS
from distill.losses.mapping import LayerMap, layer_map
from distill.losses.matches import MATCHES
from distill.losses.objective import Objective, label_loss
from distill.losses.relation import ATTENTION, RELATION
from distill.losses.terms import Maps

__all__ = [
    "ATTENTION",
    "HIDDEN",
    "LOGITS",
    "MATCHES",
    "PREDICTION_KINDS",
    "RELATION",
    "LayerMap",
    "Maps",
    "Objective",
    "label_loss",
    "layer_map",
]
