"""Fixed factors from public gradients (`lora.init: public`): LoRA-SB's start, free of privacy cost (arXiv 2411.19557, 2502.15436).

The gradient of one example with respect to the full weight is G = sum of dy x^T over its positions. A gets the leading right singular
vectors of all examples' G on top of each other, B (with cores) the leading left ones of all G side by side: unlike the vectors of their
mean these do not mind that the labels of public text are drawn at random. The core stays zero, so that the model begins unchanged.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedllm.lora_layers import ADAPTER, CoredA, check_rank, lora_layers
from fedllm.training.engine import Encoded, TorchEngine

OVERSAMPLING = 4  # directions looked at for each one kept


def public_start(engine: TorchEngine, public: Encoded, examples: int, seed: int) -> dict[str, Tensor]:
    """Set A (and B, with cores) of every layer; returns those of them that are not trained, by name, which no seed alone gives back.

    examples: how many public examples are looked at; which ones follows from the seed. Raises UserError for an r above a target's side.
    """
    check_rank(engine.model, "lora.init=public")
    chosen = np.random.default_rng([seed, 4]).permutation(len(public))[:examples]
    layers = lora_layers(engine.model)
    generator = torch.Generator().manual_seed(seed)
    spaces = {name: Spaces(layer, generator) for name, layer in layers.items()}
    for _ in engine.updates(public, [np.array([i]) for i in chosen]):
        pass
    fixed = {}
    with torch.no_grad():
        for name, layer in layers.items():
            rows, columns = spaces[name].leading()
            a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            a.weight.copy_(rows)
            if isinstance(a, CoredA):
                b.weight.copy_(columns)
            for key, value in ((f"{name}.lora_A.{ADAPTER}.weight", a.weight), (f"{name}.lora_B.{ADAPTER}.weight", b.weight)):
                if not value.requires_grad:
                    fixed[key] = value
    return fixed


class Spaces:
    """The row and the column space of one layer's gradients, taken in the backward pass.

    Of S = sum of G^T G (and of G G^T) only S Omega is kept, for a fixed Gaussian Omega of a few more columns than directions wanted:
    Nystrom's approximation S Omega (Omega^T S Omega)^-1 Omega^T S has the same leading eigenvectors, in one pass and little memory.
    """

    def __init__(self, layer: nn.Module, generator: torch.Generator):
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        self.rank = a.out_features
        self.mix_in, self.mix_out = (
            torch.randn(side, min(side, OVERSAMPLING * self.rank + 8), generator=generator).to(a.weight.device)
            for side in (a.in_features, b.out_features)
        )
        self.right, self.left = torch.zeros_like(self.mix_in), torch.zeros_like(self.mix_out)
        self.handle = layer.register_forward_hook(self._forward)

    def _forward(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()
        output.register_hook(lambda dy: self._add(_positions(x), _positions(dy)))

    def _add(self, x: Tensor, dy: Tensor) -> None:
        """x [batch, positions, in], dy [batch, positions, out]: G^T G = x^T (dy dy^T) x of each example, and G G^T likewise."""
        self.right += x.flatten(0, 1).T @ (dy @ dy.mT @ (x @ self.mix_in)).flatten(0, 1)
        self.left += dy.flatten(0, 1).T @ (x @ x.mT @ (dy @ self.mix_out)).flatten(0, 1)

    def leading(self) -> tuple[Tensor, Tensor]:
        """The leading directions, orthonormal: right ones as rows [r, in], left ones as columns [out, r]. Ends the collecting."""
        self.handle.remove()
        right, left = (
            _nystrom(mixed.double().cpu(), mix.double().cpu())[:, : self.rank].float()
            for mixed, mix in ((self.right, self.mix_in), (self.left, self.mix_out))
        )
        return right.T, left


def _positions(value: Tensor) -> Tensor:
    """[batch, ..., features] -> [batch, positions, features], float32."""
    return value.float().reshape(len(value), -1, value.shape[-1])


def _nystrom(mixed: Tensor, mix: Tensor) -> Tensor:
    """Eigenvectors of S as columns, leading first, from S Omega and Omega."""
    inner = mix.T @ mixed
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    whitened = vectors / values.clamp_min(values[-1] * 1e-12).sqrt()
    return torch.linalg.svd(mixed @ whitened, full_matrices=False).U
