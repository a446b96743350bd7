"""mamba_ssm.ops.triton.layernorm_gated: RMSNorm with a gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import torch as ops
from ._arguments import as_input, as_weight

__all__ = ["RMSNorm", "layernorm_fn", "rmsnorm_fn"]


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMSNorm and gate, by :func:`statescan.gated_rms_norm`.

    ``(rms(x) weight + bias) silu(z)``, or ``rms(x silu(z)) weight + bias`` without norm_before_gate.

    Args:
        x: [..., dim]; z: as x, or None for no gate; weight, bias: [dim].
        group_size: channels that are normalised together; None for all.

    Returns:
        shaped and typed as x.
    """
    options = dict(group_size=group_size, eps=eps, norm_before_gate=norm_before_gate)
    weight, z = as_weight(weight, x), as_input(z, x)
    if bias is None:
        return ops.gated_rms_norm(x, z, weight, **options)
    if z is not None and norm_before_gate:
        normed = ops.gated_rms_norm(x, None, weight, **options)
        return ((normed.float() + bias.float()) * F.silu(z.float())).to(x.dtype)
    return (ops.gated_rms_norm(x, z, weight, **options).float() + bias.float()).to(x.dtype)


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """rmsnorm_fn under its other name; a norm that also subtracts the mean raises NotImplementedError."""
    if not is_rms_norm:
        raise NotImplementedError("layernorm_fn: is_rms_norm=False, a norm that subtracts the mean, is not served")
    return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)


class RMSNorm(torch.nn.Module):
    """The module around rmsnorm_fn, which mamba-ssm's blocks import as RMSNormGated."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)
