"""The programs that `step.py` compares: (teacher, student) -> (batch -> loss); each does the same step."""

from __future__ import annotations

from functools import partial


def plain_ce(_teacher, student):
    """Cross-entropy as transformers computes it; no teacher."""
    return lambda batch: student.train()(**_inputs(batch), labels=batch["labels"]).loss


def naive(teacher, student):
    """The loop that everybody writes first."""
    return _on_logits(teacher, student, _kl_div)


def _kl_div(own, target):
    from torch.nn import functional

    own, target = own.float().log_softmax(-1).flatten(0, 1), target.float().softmax(-1).flatten(0, 1)
    return functional.kl_div(own, target, reduction="batchmean")


def _inputs(batch):
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def _on_logits(teacher, student, loss):
    import torch

    def step(batch):
        with torch.no_grad():
            target = teacher(**_inputs(batch)).logits
        return loss(student(**_inputs(batch)).logits[:, :-1], target[:, :-1])

    return step


def ours(teacher, student, *, terms=("logits",), compile_layers=None, chunk=None, head_precision=None):
    """As a recipe with `match: logits` trains; on a GPU with compiled layers, as `training.compile: auto` has it."""
    from distill.losses import Objective, layer_map
    from distill.models.family import all_layers, layers_of
    from distill.recipe.schema import Term
    from distill.teacher import LiveTeacher
    from distill.training.compiled import CompiledLayers
    from distill.training.model import DistillModel

    depths = len(layers_of(student)), len(layers_of(teacher))
    pairs = [(layer, 2 * layer + 1) for layer in range(depths[0])]
    made = [Term(match=match, **({"map": pairs} if match == "hidden" else {})) for match in terms]
    maps = partial(layer_map, plan=None, student_layers=depths[0], teacher_layers=depths[1])
    objective = Objective(made, "next_token", maps, chunk=chunk, head_precision=head_precision)
    device = next(student.parameters()).device
    if compile_layers is None:
        compile_layers = device.type == "cuda"
    if compile_layers and depths[0]:
        CompiledLayers("step", print).compile([*all_layers(student), *all_layers(teacher)])
    source, model = LiveTeacher(teacher, objective.teacher, device), DistillModel(student, objective)

    def step(batch):
        loss, _ = model(batch, source(batch), objective.counts([batch]))
        for line in objective.notices():
            print(line, flush=True)
        return loss

    step.prepare = objective.locate  # on the host, where the loader makes the batch
    return step


def ours_bf16_teacher(teacher, student):
    """The same with the teacher in bf16, which it is on a GPU anyway."""
    import torch

    return ours(teacher.to(torch.bfloat16), student)


def ours_frozen(teacher, student):
    """The embeddings and half of the student's layers are the teacher's first ones, and frozen."""
    from distill.models.trainable import freeze

    half = len(student.model.layers) // 2
    student.model.embed_tokens.load_state_dict(teacher.model.embed_tokens.state_dict())
    for layer in range(half):
        student.model.layers[layer].load_state_dict(teacher.model.layers[layer].state_dict())
    freeze(student, ["*.embed_tokens.*", *(f"*.layers.{layer}.*" for layer in range(half))])
    return ours(teacher, student)


def trl_gkd(teacher, student):
    """The divergence of TRL's GKDTrainer, forward KL."""
    from trl.experimental.gkd import GKDTrainer

    loss = GKDTrainer.generalized_jsd_loss
    return _on_logits(teacher, student, lambda own, target: loss(own, target, beta=0.0) / own.shape[1])


def torchtune_kl(teacher, student):
    """Torchtune's ForwardKLLoss (soft cross-entropy)."""
    from torchtune.modules.loss import ForwardKLLoss

    loss = ForwardKLLoss()
    return _on_logits(teacher, student, lambda own, target: loss(own, target, own.new_zeros(own.shape[:2]).long()))


def textbrewer_ce(teacher, student):
    """TextBrewer's kd_ce_loss (soft cross-entropy)."""
    from textbrewer.losses import kd_ce_loss

    return _on_logits(teacher, student, kd_ce_loss)


def liger_jsd(teacher, student, *, compiled=False):
    """Liger's chunked loss from hidden states, forward KL."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    device = next(student.parameters()).device
    size = 1024 if device.type == "cuda" else 256
    settings = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.0}
    loss = LigerFusedLinearJSDLoss(**settings, compiled=compiled, chunk_size=size)

    def step(batch):
        with torch.no_grad():
            target = teacher.model(**_inputs(batch)).last_hidden_state[:, :-1].flatten(0, 1)
        own = student.model(**_inputs(batch)).last_hidden_state[:, :-1].flatten(0, 1)
        weight, labels = student.lm_head.weight, batch["labels"][:, 1:].flatten()
        if device.type == "cuda":  # its products do not look at autocast
            own, weight = own.bfloat16(), weight.bfloat16()
        return loss(own, weight, target, teacher.lm_head.weight, labels)

    return step


ARMS = {
    "plain_ce": plain_ce,
    "naive": naive,
    "ours": ours,
    "ours_labels": partial(ours, terms=("labels", "logits")),
    "ours_hidden": partial(ours, terms=("logits", "hidden")),
    "ours_bf16_teacher": ours_bf16_teacher,
    "ours_frozen": ours_frozen,
    "ours_plain_layers": partial(ours, compile_layers=False),
    **{f"ours_chunk_{size}": partial(ours, chunk=size) for size in (512, 1024, 2048, 4096, 8192)},
    **{f"ours_{kind}_head": partial(ours, head_precision=kind) for kind in ("bf16", "tf32", "fp32")},
    "trl_gkd": trl_gkd,
    "liger_jsd": liger_jsd,
    "liger_jsd_compiled": partial(liger_jsd, compiled=True),
    "torchtune_kl": torchtune_kl,
    "textbrewer_ce": textbrewer_ce,
}
USUAL = {
    "cpu": [
        *("plain_ce", "naive", "ours", "ours_labels", "ours_hidden", "ours_bf16_teacher", "ours_frozen"),
        *("trl_gkd", "liger_jsd", "torchtune_kl", "textbrewer_ce"),
    ],
    "cuda": [
        *("plain_ce", "naive", "trl_gkd", "liger_jsd", "liger_jsd_compiled"),
        *("ours", "ours_labels", "ours_hidden", "ours_plain_layers"),
    ],
}
"""Device -> arms that are measured unless others are named."""
