"""Adapters of low rank on a student (LoRA, Hu et al. 2021, arXiv 2106.09685), by peft.

The adapted linear maps are replaced inside the model, whose class and other names stay what they are: forward passes,
hooks on layers and the head see a student like any other. At the end the adapters are added into the weights, and the
linear maps are put back.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from distill.errors import InputError
from distill.models.family import all_layers
from distill.models.sentence import unused_parameters
from distill.models.trainable import drawn_parameters, freeze
from distill.recipe.sections import Lora


def adapted_names(model: Any, spec: Lora) -> list[str]:
    """Name the linear maps that are adapted.

    Raises:
        InputError: A pattern matches no linear map, or the layers have none.
    """
    name_of = {module: name for name, module in model.named_modules()}
    linear = [name for module, name in name_of.items() if isinstance(module, nn.Linear | Conv1D)]
    if spec.targets == "all-linear":
        inside = {module for layer in all_layers(model) for module in layer.modules()}
        names = [name_of[module] for module in inside if name_of[module] in linear]
        if not names:
            raise InputError(f"lora: the layers of a {type(model).__name__} have no linear map of their own")
        return sorted(names)
    head, unused = name_of.get(model.get_output_embeddings()), unused_parameters(model)
    for pattern in spec.targets:
        found = [name for name in linear if spec.model_copy(update={"targets": [pattern]}).pattern_for(name)]
        if not found:
            some = ", ".join(linear[:3])
            raise InputError(f"lora.targets: {pattern!r} matches no linear map; there are e.g. {some}")
        if idle := [name for name in found if f"{name}.weight" in unused]:
            raise InputError(f"lora.targets: {pattern!r} matches {idle[0]}, which the vectors do not depend on")
        if head in found:
            raise InputError(
                f"lora.targets: {pattern!r} is the output head, which the loss reads; use lora.also for it"
            )
    return [name for name in linear if spec.pattern_for(name)]


class Adapters:
    """The adapters of one student: put in, and in the end merged."""

    def __init__(self, model: Any, spec: Lora):
        """Put adapters in and freeze all else but `spec.also`, and what was drawn at random.

        Raises:
            InputError: A pattern of `spec` matches nothing.
        """
        names = adapted_names(model, spec)
        also = [*spec.also, *drawn_parameters(model)]  # what is drawn means nothing before it has learnt
        if also:
            freeze(model, [], also)
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad} if also else set()
        if both := sorted(name for name in learning if name.rpartition(".")[0] in names):
            raise InputError(f"lora.also: {both[0]} is adapted as well; choose one with lora.targets")
        # Within a box that has no config, so that peft takes the names as they are: of models with experts it would
        # take `gate_proj` of a layer without experts for the experts of the others.
        box, targets = nn.ModuleDict({"student": model}), [f"student.{name}" for name in names]
        config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=targets)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # transposed maps: peft sets it right itself
            self.tuner = LoraModel(box, {"default": config}, "default")
        self.model, self.count = model, sum(isinstance(module, LoraLayer) for module in model.modules())
        assert self.count == len(names), "peft adapts exactly what is named"
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or name in learning)

    @property
    def parameters(self) -> set[Tensor]:
        """The adapters' own parameters."""
        return {parameter for name, parameter in self.model.named_parameters() if "lora_" in name}

    def describe(self) -> str:
        """Say in a line what learns, and which large weights of the layers nothing adapts."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        learning = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        plain = {
            name.rpartition(".")[2]: parameter
            for layer in all_layers(self.model)
            for name, parameter in layer.named_parameters()
            if parameter.ndim == 3 and not parameter.requires_grad
        }
        line = f"lora: adapters on {self.count} linear maps; {learning:,} of {total:,} parameters learn"
        return f"{line}; experts stay as they are ({', '.join(plain)})" if plain else line

    def merge(self) -> None:
        """Add the adapters to the weights, which must be fp32 by now, and put the linear maps back."""
        self.tuner.merge_and_unload()
        for module in self.model.modules():
            assert not isinstance(module, LoraLayer)
        self.model.requires_grad_(True)
