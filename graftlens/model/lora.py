"""What PEFT's layers hold, in parts: the base's tensors, and what an adapter adds to each matrix.

LoRA layers (on linear maps, GPT-2's transposed ones, embeddings and single parameters), modules
that are saved whole and single trained tokens are read as they are, whatever their ranks, scales
and biases. Every other kind of layer has to be multiplied out: `in_parts` gives None.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graftlens.model.additions import Addition, LowRank, RowVectors
from graftlens.model.arch import UnsupportedArchitectureError


@dataclass
class Parts:
    """A model with adapters, in parts.

    Attributes:
        state: tensors by the names that they have without PEFT.
        additions: a module's name -> what is added to its matrix, as [d_out, d_in].
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    additions: dict[str, list[Addition]] = field(default_factory=dict)

    def cloned(self) -> "Parts":
        """The same, of copies of all tensors."""
        state = {name: tensor.clone() for name, tensor in self.state.items()}
        additions = {
            name: [one.like(*(tensor.detach().clone() for tensor in one.tensors)) for one in own]
            for name, own in self.additions.items()
        }
        return Parts(state, additions)


class _NotInPartsError(Exception):
    """A layer whose weight is not the base's plus something of low rank."""


def in_parts(name: str, model: nn.Module) -> Parts | None:
    """The tensors of a model into which PEFT has put its layers; None if some must be merged.

    Args:
        name: the source's name, for messages.
        model: the model inside a PeftModel; what is read are its own tensors, not copies.

    Raises:
        UnsupportedArchitectureError: adapters that are switched off.
    """
    parts = Parts()
    try:
        _Reader(name, parts).read(model, "")
    except _NotInPartsError:
        return None
    return parts


class _Reader:
    def __init__(self, name: str, parts: Parts) -> None:
        self.name, self.parts = name, parts

    def read(self, module: Any, name: str) -> None:
        """A module, whose name without PEFT is `name`, and all that is inside it."""
        from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
        from peft.tuners.trainable_tokens import TrainableTokensLayer
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import (
            AuxiliaryTrainingWrapper,
            ModulesToSaveWrapper,
            TrainableTokensWrapper,
        )

        if getattr(module, "disable_adapters", False) is True:
            raise UnsupportedArchitectureError(
                f"source {self.name!r}: the model's adapters are switched off (in {name}), so it "
                "runs as its base. Switch them on (model.base_model.enable_adapter_layers()), or "
                "give the base."
            )
        kind = type(module)
        if kind is ModulesToSaveWrapper:
            self.read(_saved(module), name)
        elif kind is TrainableTokensWrapper:
            self.read(module.token_adapter, name)
        elif kind is TrainableTokensLayer:
            self._tokens(module, name)
        elif kind is Linear:
            self._adapted(module, name, _of_linear)
        elif kind is Embedding:
            self._adapted(module, name, _of_embedding)
        elif kind is ParamWrapper:
            self._adapted(module, name, _of_parameter)
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise _NotInPartsError
        else:
            here = f"{name}." if name else ""
            saved = [
                *module.named_parameters(recurse=False),
                *(
                    (key, b)
                    for key, b in module.named_buffers(recurse=False)
                    if _saves(module, key)
                ),
            ]
            self.parts.state |= {here + key: tensor.detach() for key, tensor in saved}
            for key, inner in module.named_children():
                self.read(inner, here + key)

    def _adapted(self, layer: Any, name: str, read: Any) -> None:
        """A layer of LoRA: its base, and an addition for each adapter that is active in it."""
        self.read(layer.base_layer, name)
        if layer.merged:
            return  # PEFT's forward then is the base's, to which they were added
        for adapter in layer.active_adapters:
            if adapter not in {*layer.lora_A, *layer.lora_embedding_A}:
                continue
            if adapter in layer.lora_variant:
                raise _NotInPartsError
            self.parts.additions.setdefault(name, []).append(read(layer, adapter))
            if layer.lora_bias[adapter]:
                self._bias(layer, adapter, f"{name}.bias")

    def _bias(self, layer: Any, adapter: str, name: str) -> None:
        """The bias of an adapter's B, which the layer's own need not have."""
        own = layer.lora_B[adapter].bias.detach() * layer.scaling[adapter]
        base = self.parts.state.get(name)
        self.parts.state[name] = own if base is None else base + own

    def _tokens(self, layer: Any, name: str) -> None:
        """A table, single rows of which are replaced."""
        self.read(layer.base_layer, name)
        if layer.merged:
            return
        table = layer.base_layer.weight.detach()
        for adapter in layer.active_adapters:
            if adapter not in layer.token_indices:
                continue
            rows = torch.tensor(layer.token_indices[adapter], device=table.device)
            if len(rows.unique()) < len(rows):
                raise _NotInPartsError
            trained = layer.trainable_tokens_delta[adapter].detach()
            change = trained.to(table.dtype) - table[rows]
            self.parts.additions.setdefault(name, []).append(RowVectors(rows, change))


def _saves(module: nn.Module, buffer: str) -> bool:
    return buffer not in module._non_persistent_buffers_set


def _saved(wrapper: Any) -> Any:
    """The module that runs: the one that was trained, unless another adapter is active."""
    active: Sequence[str] = wrapper.active_adapters
    trained = [adapter for adapter in active if adapter in wrapper.modules_to_save]
    # PEFT runs the original as soon as one of the active adapters has none of its own here.
    if not trained or len(trained) < len(active):
        return wrapper.original_module
    return wrapper.modules_to_save[trained[0]]


def _of_linear(layer: Any, adapter: str) -> LowRank:
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return LowRank(a.detach(), b.detach(), float(layer.scaling[adapter]))


def _of_embedding(layer: Any, adapter: str) -> LowRank:
    # PEFT adds (B A)^T to the table, whose rows are tokens.
    a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return LowRank(b.detach().T, a.detach().T, float(layer.scaling[adapter]))


def _of_parameter(layer: Any, adapter: str) -> LowRank:
    from transformers.pytorch_utils import Conv1D

    if layer.parameter_name != "weight" or layer.num_experts != 1:
        raise _NotInPartsError
    added = _of_linear(layer, adapter)
    if isinstance(layer.get_base_layer(), Conv1D):  # which keeps W^T, to which B A is added
        return LowRank(added.b.detach().T, added.a.detach().T, added.scale)
    return added
