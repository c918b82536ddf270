"""Per-unit gradients in one backward pass: clients that take one step at the same model share large batches, and each unit has a row.

For a linear layer y = x W^T + b the gradient of one example's loss is the sum over its positions of dy x^T (Goodfellow 2015, arXiv
1510.01799). While gradients are collected, the backward pass of every trainable linear layer adds that product to the row of the
example's unit instead of summing it over the batch: one product takes the place of another, so a private step costs what a plain one does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dr_encoder.layout import AdapterLayout

Add = Callable[[Tensor, Tensor], None]  # (x [batch, ..., in], dy [batch, ..., out])


class UnitGradients:
    """Takes over the trainable linear layers of a model, to sum gradients by privacy unit.

    The loss must be a sum of per-example terms, no layer may mix examples, and trainable layers see the batch in their first dimension.
    A recomputed forward pass (gradient checkpointing of either kind) adds nothing.
    Raises ValueError for a trainable parameter outside a plain linear layer.
    """

    def __init__(self, model: nn.Module, layout: AdapterLayout):
        self.layout = layout
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._places = {id(self._parameters[factor.name]): slice(factor.offset, factor.stop) for factor in layout.factors}
        self.device = next(iter(self._parameters.values())).device  # where the rows are held
        self._rows: Tensor | slice | None = None
        self._sums: Tensor | None = None
        # Parameters enter detached: that backward comes by them, without a gradient, would wake what others hang on them (ZeRO 2 does).
        self._needs_gradient = torch.zeros((), requires_grad=True)
        covered = set()
        for name, module in model.named_modules():
            own = {f"{name}.{key}": value for key, value in module.named_parameters(recurse=False) if value.requires_grad}
            if not own:
                continue
            if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
                kind = type(module).__name__
                raise ValueError(f"Expected trainable parameters in linear layers only, found {min(own)} in a {kind}")
            covered |= {id(value) for value in own.values()}
            module.forward = partial(self._forward, module)
        missing = set(self._places) - covered
        if missing:
            name = min(name for name, value in self._parameters.items() if id(value) in missing)
            raise ValueError(f"Expected every factor in a linear layer, {name} is in none")

    def begin(self, units: int) -> None:
        """Start collecting into zeroed rows [units, n], float32."""
        for value in self._parameters.values():
            value.grad = None
        # numpy's zeros are pages not yet there: they come as the backward pass lets go of activations, and do not add to the peak.
        self._sums = torch.from_numpy(np.zeros((units, self.layout.size), np.float32)).to(self.device)

    def batch(self, rows: Tensor) -> None:
        """Say which unit each example of the next batch belongs to, int64 [batch]; its backward pass comes before the next batch."""
        first = int(rows[0]) if len(rows) else 0
        consecutive = slice(first, first + len(rows))
        self._rows = consecutive if torch.equal(rows, torch.arange(first, consecutive.stop)) else rows.to(self.device)

    def end(self) -> Tensor:
        """The collected sums [units, n]; collecting stops.

        Raises RuntimeError where a parameter was also used outside its layer: that part of its gradient is in no row.
        """
        sums, self._sums, self._rows = self._sums, None, None
        for name, value in self._parameters.items():
            if value.grad is not None:
                raise RuntimeError(f"{name} is used outside its linear layer; expected per-unit gradients to be whole")
        return sums

    def _forward(self, module: nn.Linear, x: Tensor) -> Tensor:
        if self._sums is None or not torch.is_grad_enabled():
            return F.linear(x, module.weight, module.bias)
        bias = None if module.bias is None else module.bias.detach()
        return _Linear.apply(x, module.weight.detach(), bias, self._needs_gradient, partial(self._add, module))

    def _add(self, module: nn.Linear, x: Tensor, dy: Tensor) -> None:
        """Add each example's product to the row of its unit."""
        rows = len(self._rows) if isinstance(self._rows, Tensor) else self._rows.stop - self._rows.start
        if len(x) != rows:
            raise RuntimeError(f"Expected the batch of {rows} examples in the first dimension of a trainable layer, got {list(x.shape)}")
        x, dy = (value.float().unsqueeze(1).flatten(1, -2) for value in (x, dy))
        self._add_to(module.weight, lambda: _products(dy, x))
        self._add_to(module.bias, lambda: dy.sum(1))

    def _add_to(self, parameter: Tensor | None, gradients: Callable[[], Tensor]) -> None:
        place = self._places.get(id(parameter))
        if place is None:
            return
        part = self._sums[:, place].view(-1, *parameter.shape)
        if isinstance(self._rows, slice):  # units of one example
            part[self._rows] += gradients()
        else:
            part.index_add_(0, self._rows, gradients())


def _products(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x of each example: [batch, t, out], [batch, t, in] -> [batch, out, in]. The narrow side comes first: up to 7 times as fast."""
    if dy.shape[-1] <= x.shape[-1]:
        return torch.bmm(dy.transpose(1, 2), x)
    return torch.bmm(x.transpose(1, 2), dy).transpose(1, 2)


class _Linear(torch.autograd.Function):
    """A linear layer whose parameters get no gradient: `add` is told what it is made of."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, needs_gradient: Tensor, add: Add) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.add = add
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.add(x, dy)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        narrow = weight.shape[1] < weight.shape[0]  # as in `_products`
        dx = (weight.T @ dy.flatten(0, -2).T).T.reshape(x.shape) if narrow else dy @ weight
        return dx, None, None, None, None
