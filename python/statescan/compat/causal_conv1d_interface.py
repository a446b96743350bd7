"""causal_conv1d.causal_conv1d_interface: the causal convolution and its decode step, channels first."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import torch as ops
from ..torch._op import wants_gradient
from ._arguments import activation_of, as_weight
from ._packing import packing_of

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution, by :func:`statescan.causal_conv1d`.

    Args:
        x: [batch, dim, seqlen], any strides.
        weight: [dim, width], width from 2 to 8 (causal-conv1d: to 4).
        bias: [dim].
        seq_idx: [batch, seqlen] integers: each change within a row starts a new sequence, a negative index is padding, whose
            output is zero.
        initial_states: [batch, dim, width - 1], the inputs before each row. With seq_idx, which causal-conv1d refuses, they
            come before the first sequence of each row.
        return_final_states: also return the last width - 1 inputs of each row (with seq_idx: of its last sequence), in any
            layout of x.
        final_states_out: [batch, dim, width - 1], an array to write them to.
        activation: None, "silu" or "swish".

    Returns:
        out [batch, dim, seqlen], or (out, final_states). The memory of out is channels last.

    Differs from causal-conv1d: the gradient reaches the final states' inputs whether or not final_states_out is given.
    """
    activation = activation_of("causal_conv1d_fn", activation)
    batch, _, seqlen = x.shape
    weight = as_weight(weight, x)
    bias = None if bias is None else bias.to(weight.dtype)
    packing = packing_of(seq_idx, "causal_conv1d_fn", batch, seqlen)
    inputs = x.transpose(1, 2)
    if packing is None:
        result = ops.causal_conv1d(
            inputs, weight, bias, activation=activation, initial_state=initial_states, return_final_state=return_final_states
        )
        out, final = result if return_final_states else (result, None)
    else:
        result = ops.causal_conv1d(
            packing.pack(inputs), weight, bias, activation=activation, initial_state=packing.initial(initial_states),
            return_final_state=return_final_states, cu_seqlens=packing.cu_seqlens,
        )  # fmt: skip
        out, final = result if return_final_states else (result, None)
        out = out.reshape(batch, seqlen, -1)
        if packing.padding is not None:
            out = out.masked_fill(packing.padding[..., None], 0)
        final = None if final is None else packing.final(final)
    out = out.transpose(1, 2)
    if not return_final_states:
        return out
    if final_states_out is None:
        return out, final
    with torch.no_grad():
        final_states_out.copy_(final)
    return out, final if final.requires_grad else final_states_out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """One or a few steps of the convolution, by :func:`statescan.causal_conv1d_update`; conv_state is updated in place.

    Args:
        x: [batch, dim] or [batch, dim, seqlen], the new inputs.
        conv_state: [batch, dim, state_len] with state_len >= width - 1, the latest inputs, newest last.
        weight: [dim, width]; bias: [dim]; activation: None, "silu" or "swish".
        cache_seqlens: [batch] integers: conv_state is a circular buffer, and the inputs go to the columns from
            cache_seqlens % state_len on.
        conv_state_indices: [batch] integers, the row of conv_state that each row of x uses; a negative index is padding,
            whose output is zero.

    Returns:
        out, shaped as x.

    Differs from causal-conv1d: where an input requires a gradient it gets one, through this step (the state counts as a
    constant). On a GPU, indices together with cache_seqlens or a longer state make the host wait.
    """
    activation = activation_of("causal_conv1d_update", activation)
    width, state_len = weight.shape[1], conv_state.shape[2]
    if state_len < width - 1:
        raise ValueError(f"causal_conv1d_update: conv_state holds {state_len} inputs; expected width - 1 = {width - 1} or more")
    if x.dim() == 2:
        tokens = x[:, None]
    else:
        tokens = x.transpose(1, 2)
    weight = as_weight(weight, x)
    bias = None if bias is None else bias.to(weight.dtype)
    differentiable = wants_gradient(x, weight, bias)
    if conv_state_indices is None:
        out = _step(tokens, conv_state, weight, bias, activation, cache_seqlens, differentiable)
    elif state_len == width - 1 and cache_seqlens is None and not differentiable:
        indices = conv_state_indices.clamp(min=-1)
        out = ops.causal_conv1d_update(tokens, conv_state, weight, bias, activation=activation, state_indices=indices)
    else:
        rows = (conv_state_indices >= 0).nonzero().flatten()
        slots = conv_state_indices[rows].long()
        states = conv_state[slots]
        positions = None if cache_seqlens is None else cache_seqlens[rows]
        out = _step(tokens[rows], states, weight, bias, activation, positions, differentiable)
        out = torch.zeros_like(tokens).index_copy(0, rows, out)
        conv_state[slots] = states
    return out[:, 0] if x.dim() == 2 else out.transpose(1, 2)


def _step(
    tokens: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    differentiable: bool,
) -> Tensor:
    """The update of every row of conv_state [batch, dim, state_len] by tokens [batch, seqlen, dim]."""
    seqlen, state_len, before = tokens.shape[1], conv_state.shape[2], weight.shape[1] - 1
    if cache_seqlens is not None:
        window = conv_state.gather(2, _columns(cache_seqlens, -before, 0, conv_state))
        out = _convolve(tokens, window, weight, bias, activation, differentiable)
        start = max(seqlen - state_len, 0)  # a token that a later one overwrites is not written
        latest = tokens.detach()[:, start:].transpose(1, 2).to(conv_state.dtype)
        conv_state.scatter_(2, _columns(cache_seqlens, start, seqlen, conv_state), latest)
        return out
    older = state_len - before  # columns that the convolution does not reach
    if older > 0:
        kept = conv_state
        if seqlen + older > state_len:
            kept = torch.cat([conv_state, tokens.detach().transpose(1, 2).to(conv_state.dtype)], dim=2)
        shifted = kept[:, :, seqlen : seqlen + older].clone()
    out = _convolve(tokens, conv_state[:, :, older:], weight, bias, activation, differentiable)
    if older > 0:
        conv_state[:, :, :older] = shifted
    return out


def _columns(cache_seqlens: Tensor, begin: int, end: int, conv_state: Tensor) -> Tensor:
    """Where the tokens begin..end, counted from the next one, lie in a circular conv_state; [batch, dim, end - begin]."""
    _, dim, state_len = conv_state.shape
    ahead = torch.arange(begin, end, device=conv_state.device)
    return ((cache_seqlens.long()[:, None] + ahead) % state_len)[:, None].expand(-1, dim, -1)


def _convolve(
    tokens: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, differentiable: bool
) -> Tensor:
    """The convolution of tokens after window [batch, dim, width - 1], which becomes the latest inputs."""
    if not differentiable:
        return ops.causal_conv1d_update(tokens, window, weight, bias, activation=activation)
    out, latest = ops.causal_conv1d(
        tokens, weight, bias, activation=activation, initial_state=window.detach().clone(), return_final_state=True
    )
    window.copy_(latest.detach())
    return out
