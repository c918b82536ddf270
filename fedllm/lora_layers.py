"""What a LoRA layer may hold besides A and B: a trained core between fixed factors, and a dense matrix that rounds were folded into.

Both leave PEFT's own layer as it is; `plain_factors` gives the A and B of the plain layer that does the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedllm.errors import UserError

ADAPTER = "default"
CORE = ".core.weight"  # how the name of a core ends
PREFIX = "base_model.model."  # of PEFT's model, before the name a module has in the base


class CoredA(nn.Linear):
    """LoRA's A [r, in] with a trained core R [r, r] behind it: x -> R A x, which PEFT multiplies by B (Fed-SB, arXiv 2502.15436)."""

    def __init__(self, a: nn.Linear):
        super().__init__(a.in_features, a.out_features, bias=False, device="meta")
        self.weight = a.weight
        self.core = nn.utils.skip_init(nn.Linear, a.out_features, a.out_features, bias=False, device=a.weight.device, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(super().forward(x))


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's LoRA layers by their names in the model."""
    return {name: module for name, module in model.named_modules() if ADAPTER in getattr(module, "lora_A", ())}


def check_rank(model: nn.Module, why: str) -> None:
    """Raise UserError where r is larger than a side of a target: its factors then cannot be orthonormal. why: the config key and value."""
    for name, layer in lora_layers(model).items():
        r, most = layer.r[ADAPTER], min(layer.lora_A[ADAPTER].in_features, layer.lora_B[ADAPTER].out_features)
        if r > most:
            raise UserError(f"lora.r={r}: expected at most {most}, the smaller side of {name.removeprefix(PREFIX)}, with {why}")


def add_cores(model: nn.Module) -> None:
    """Put a core behind every A; its numbers are set by whoever starts the adapter."""
    for layer in lora_layers(model).values():
        layer.lora_A[ADAPTER] = CoredA(layer.lora_A[ADAPTER])


def add_dense(model: nn.Module) -> dict[str, Tensor]:
    """A dense matrix D [out, in] of zeros beside every LoRA layer, which then gives W x + (alpha/r) B A x + D x.

    Returns them by the layers' names, to be written in place. They are float32 whatever the base's dtype: a round's change is smaller
    than what bfloat16 weights resolve, and folded into them it would be lost.
    """
    return {name: _add_dense(layer) for name, layer in lora_layers(model).items()}


def _add_dense(layer: nn.Module) -> Tensor:
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    layer.dense = torch.zeros(b.out_features, a.in_features, device=b.weight.device)
    layer.register_forward_hook(_with_dense)
    return layer.dense


def _with_dense(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output if layer.disable_adapters else output + F.linear(inputs[0].float(), layer.dense).to(output.dtype)


def beside_adapter(model: nn.Module) -> dict[str, Tensor]:
    """What of a model is neither trained nor its base's, by name, to be read or written in place: fixed factors, dense matrices."""
    found = {}
    for name, layer in lora_layers(model).items():
        factors = {f"{name}.A": layer.lora_A[ADAPTER].weight, f"{name}.B": layer.lora_B[ADAPTER].weight}
        found |= {key: value for key, value in factors.items() if not value.requires_grad}
        if getattr(layer, "dense", None) is not None:
            found[f"{name}.dense"] = layer.dense
    return found


@torch.no_grad()
def plain_factors(layer: nn.Module) -> tuple[Tensor, Tensor, float | None]:
    """A [rank, in], B [out, rank] of the plain layer that gives the same, and its alpha (None: the config's).

    With a core B takes it in. With a dense matrix the whole is factored again, to its exact rank, and alpha is that rank (scaling 1).
    """
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].weight
    if isinstance(a, CoredA):
        b = b @ a.core.weight
    if getattr(layer, "dense", None) is None:
        return a.weight, b, None
    whole = layer.dense.double() + layer.scaling[ADAPTER] * (b.double() @ a.weight.double())
    values, vectors = torch.linalg.eigh(whole @ whole.T if len(whole) <= whole.shape[1] else whole.T @ whole)
    rank = max(1, int((values > values[-1] * len(values) * torch.finfo(torch.float64).eps).sum()))  # what is below was rounding
    basis = vectors[:, -rank:]  # of the columns where these are the shorter ones, else of the rows
    a, b = (basis.T @ whole, basis) if len(whole) <= whole.shape[1] else (basis.T, whole @ basis)
    return a.float(), b.float(), rank
