"""Per-unit gradients in one backward pass: clients that take one step at the same model share large batches, and hooks keep them apart.

For a linear layer y = x W^T + b the gradient of one example's loss is the sum over its positions of dy x^T. A forward hook keeps x, a hook
on y receives dy, and the product is added to the row of the example's unit. (Goodfellow 2015, arXiv 1510.01799.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dr_encoder.layout import AdapterLayout


class UnitGradients:
    """Hooks on every trainable linear layer that sum gradients by privacy unit.

    Loss must be a sum of per-example terms, and no trainable layer may mix examples of a batch.
    Raises ValueError for a trainable parameter outside a linear layer.
    """

    def __init__(self, model: nn.Module, layout: AdapterLayout):
        self.layout = layout
        self._places = {factor.name: factor for factor in layout.factors}
        self._rows: Tensor | None = None
        self._sums: Tensor | None = None
        self._handles = []
        covered = set()
        for name, module in model.named_modules():
            own = {f"{name}.{key}" for key, value in module.named_parameters(recurse=False) if value.requires_grad}
            if not own:
                continue
            if not isinstance(module, nn.Linear):
                kind = type(module).__name__
                raise ValueError(f"Expected trainable parameters in linear layers only, found {min(own)} in a {kind}")
            covered |= own
            self._handles.append(module.register_forward_hook(self._forward_hook(name)))
        missing = set(self._places) - covered
        if missing:
            raise ValueError(f"Expected every factor in a linear layer, {min(missing)} is in none")

    def begin(self, units: int) -> None:
        """Start collecting into zeroed rows [units, n], float32."""
        self._sums = torch.zeros(units, self.layout.size)

    def batch(self, rows: Tensor) -> None:
        """Say which unit each example of the next batch belongs to, int64 [batch]."""
        self._rows = rows

    def end(self) -> Tensor:
        """The collected sums [units, n]; collecting stops."""
        sums, self._sums, self._rows = self._sums, None, None
        return sums

    def _forward_hook(self, name: str):
        def hook(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self._sums is None or not output.requires_grad:
                return
            x = inputs[0].detach()
            output.register_hook(lambda dy: self._add(name, module, x, dy))

        return hook

    def _add(self, name: str, module: nn.Linear, x: Tensor, dy: Tensor) -> None:
        if x.dim() == 2:
            x, dy = x[:, None], dy[:, None]
        x, dy = x.float(), dy.float()
        self._add_to(f"{name}.weight", lambda: torch.bmm(dy.transpose(1, 2), x))
        if module.bias is not None:
            self._add_to(f"{name}.bias", lambda: dy.sum(1))

    def _add_to(self, name: str, gradients) -> None:
        factor = self._places.get(name)
        if factor is not None:
            part = self._sums[:, factor.offset : factor.stop]
            part.index_add_(0, self._rows, gradients().flatten(1))
