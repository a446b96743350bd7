"""RMSNorm, with a gate and without."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..torch import gated_rms_norm


class RMSNormGated(nn.Module):
    """``rms(x silu(z)) weight``, or ``rms(x) weight silu(z)`` with norm_before_gate; without z RMSNorm alone.

    Args:
        hidden_size: channels.
        eps: added to the mean of squares.
        group_size: channels that are normalised together; None for all.
        norm_before_gate: which of the two comes first.
        device, dtype: of the weight.

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467); Dao & Gu 2024 (arXiv:2405.21060), section 7, for the gate.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x and z [..., hidden_size] -> the same shape and dtype (autocast's under autocast)."""
        return gated_rms_norm(x, z, self.weight, group_size=self.group_size, eps=self.eps, norm_before_gate=self.norm_before_gate)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, group_size={self.group_size}, norm_before_gate={self.norm_before_gate}"


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight`` over the last axis.

    Args:
        hidden_size: channels.
        eps: added to the mean of squares.
        device, dtype: of the weight.

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467).
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same shape and dtype (autocast's under autocast)."""
        return gated_rms_norm(x, None, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
