"""The server's optimisers by name: torch's own, and those of adaptive federated optimisation (Reddi et al., arXiv 2003.00295).

The names that begin with fed are the papers': fedavg is sgd (with server.lr 1 the plain average), fedavgm is momentum, fedadagrad is
adagrad, fedyogi is yogi. They differ in one: `adam` is torch's, which corrects the bias of its moments; `fedadam` is Algorithm 2 of the
paper, which does not, and begins with v = tau^2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedllm.schema import ServerConfig


def _adam_moment(v: Tensor, square: Tensor, beta: float) -> Tensor:
    return beta * v + (1 - beta) * square


def _yogi_moment(v: Tensor, square: Tensor, beta: float) -> Tensor:
    return v - (1 - beta) * square * torch.sign(v - square)


class Adaptive(Optimizer):
    """x -= lr m / (sqrt(v) + tau), with m a moving average of the updates, v of their squares by `moment`; m starts at 0, v at tau^2.

    Algorithm 2 of arXiv 2003.00295, without bias correction. moment: (v, square, beta2) -> new v.
    """

    def __init__(self, params: list[Tensor], lr: float, betas: tuple[float, float], tau: float, moment: Callable):
        super().__init__(params, {"lr": lr, "betas": betas, "tau": tau})
        self.moment = moment

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for x in group["params"]:
                state = self.state[x]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(x), torch.full_like(x, group["tau"] ** 2)
                state["m"].lerp_(x.grad, 1 - first)
                state["v"].copy_(self.moment(state["v"], x.grad.square(), second))
                x.sub_(group["lr"] * state["m"] / (state["v"].sqrt() + group["tau"]))


Make = Callable[[list[Tensor], ServerConfig], Optimizer]


def _sgd(params: list[Tensor], c: ServerConfig) -> Optimizer:
    return torch.optim.SGD(params, c.lr)


def _momentum(params: list[Tensor], c: ServerConfig) -> Optimizer:
    return torch.optim.SGD(params, c.lr, momentum=c.momentum)


def _adam(params: list[Tensor], c: ServerConfig) -> Optimizer:
    return torch.optim.Adam(params, c.lr, tuple(c.betas), eps=c.tau)


def _adagrad(params: list[Tensor], c: ServerConfig) -> Optimizer:
    return torch.optim.Adagrad(params, c.lr, initial_accumulator_value=c.tau**2, eps=c.tau)


def _yogi(params: list[Tensor], c: ServerConfig) -> Optimizer:
    return Adaptive(params, c.lr, tuple(c.betas), c.tau, _yogi_moment)


def _fedadam(params: list[Tensor], c: ServerConfig) -> Optimizer:
    return Adaptive(params, c.lr, tuple(c.betas), c.tau, _adam_moment)


OPTIMIZERS: dict[str, Make] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "adam": _adam,
    "adagrad": _adagrad,
    "yogi": _yogi,
    "fedavg": _sgd,
    "fedavgm": _momentum,
    "fedadam": _fedadam,
    "fedadagrad": _adagrad,
    "fedyogi": _yogi,
}
