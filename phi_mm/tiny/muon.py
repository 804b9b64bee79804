"""Muon in fp32: momentum whose matrices are orthogonalised before they are applied."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """(rows, columns) -> the same singular vectors with singular values near 1.

    The quintic Newton-Schulz iteration of Jordan et al. (2024), "Muon: an optimizer for hidden
    layers". In the dtype of `matrix`: torch.optim.Muon casts to bfloat16, slow on most CPUs.
    """
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


class Muon(Optimizer):
    """Muon (Jordan et al., 2024) with Nesterov momentum and decoupled weight decay, for matrices.

    A step moves a (rows, columns) matrix by lr * sqrt(max(1, rows / columns)) times an
    orthogonal matrix, so that `lr` is the step's spectral norm: it needs no retuning by width.

    Raises ValueError for a parameter that is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(
                        f"got a parameter of shape {tuple(p.shape)}, expected a matrix; "
                        "give other parameters to AdamW"
                    )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates every matrix that has a gradient. `closure` is not supported."""
        if closure is not None:
            raise ValueError("got a closure, expected None: Muon evaluates no loss itself")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(state["momentum"], group["momentum"]))
                scale = max(1.0, p.size(0) / p.size(1)) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * scale)
