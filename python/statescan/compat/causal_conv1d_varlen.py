"""causal_conv1d.causal_conv1d_varlen: the convolution's states at the ends of packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["causal_conv1d_varlen_states"]


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last state_len inputs of each packed sequence, newest last; zero before the start of a shorter sequence.

    Args:
        x: [total_tokens, dim].
        cu_seqlens: [num_sequences + 1] integers: sequence i is the tokens cu_seqlens[i] to cu_seqlens[i+1].
        state_len: how many inputs a state holds.

    Returns:
        [num_sequences, dim, state_len] in the dtype of x, its memory channels last.

    Differs from causal-conv1d: differentiable.
    """
    begin, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    tokens = end - state_len + torch.arange(state_len, device=x.device)
    inside = (tokens >= begin)[..., None]
    if x.shape[0] == 0:
        return x.new_zeros(begin.shape[0], state_len, x.shape[1]).transpose(1, 2)
    return torch.where(inside, x[tokens.clamp(min=0)], 0).transpose(1, 2)
