"""Muon: momentum whose step, for each matrix, is replaced by the nearest orthogonal one.

The update is that of torch.optim.Muon with adjust_lr_fn="match_rms_adamw". That goes matrix by matrix, with 25 small launches
each: in the demo nearly half of a step's time on the host. Here matrices of one shape go together.

K. Jordan et al., 2024 (kellerjordan.github.io/posts/muon), with the step scaled to the size of AdamW's: Liu et al., 2025,
arXiv:2502.16982.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd polynomial that brings singular values near 1
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """[..., rows, columns] with all singular values near 1, in bfloat16."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices alone; all must have a gradient."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix."""
        for group in self.param_groups:
            alike: defaultdict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                alike[parameter.shape].append(parameter)
            for shape, parameters in alike.items():
                gradients = [parameter.grad for parameter in parameters]
                momenta = [self._momentum(parameter) for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
                steps = orthogonalised(torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM)))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                size = 0.2 * math.sqrt(max(shape))  # of AdamW's steps, as a root mean square
                torch._foreach_add_(parameters, steps.to(parameters[0].dtype).unbind(), alpha=-size * group["lr"])

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]
