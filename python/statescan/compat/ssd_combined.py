"""mamba_ssm.ops.triton.ssd_combined: the Mamba-2 scan and block."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import torch as ops
from ._arguments import activation_of, as_input, as_parameter, as_weight
from ._packing import packing_of

__all__ = ["mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"]


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-2 scan, by :func:`statescan.ssd_scan`.

    Args:
        x, z: [batch, seqlen, nheads, headdim]; dt: [batch, seqlen, nheads]; A, dt_bias: [nheads].
        B, C: [batch, seqlen, ngroups, dstate]; D: [nheads] or [nheads, headdim].
        chunk_size: how mamba-ssm cuts the sequence. The result does not depend on it, and statescan picks its own.
        initial_states: [batch, nheads, headdim, dstate], before the first sequence of each row.
        seq_idx: [batch, seqlen] integers: each change within a row starts a new sequence, from a state of zeros.
        cu_seqlens: [num_sequences + 1] integers for a batch of one: where its sequences start and end.
        return_final_states: also return the state after the last token of each row.
        return_varlen_states: also return the state after each sequence of cu_seqlens.

    Returns:
        out, shaped and typed as x; then final_states [batch, nheads, headdim, dstate] and varlen_states
        [num_sequences, nheads, headdim, dstate], in float32, if asked for.

    Differs from mamba-ssm: cu_seqlens separates the sequences by itself, with or without seq_idx; an empty sequence has a
    state of zeros; varlen_states has a gradient; the initial state serves the first sequence whatever its index is.
    """
    batch, seqlen = x.shape[:2]
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("mamba_chunk_scan_combined: return_varlen_states needs cu_seqlens")
    B, C, z = as_input(B, x), as_input(C, x), as_input(z, x)
    options = dict(
        D=as_parameter(D, x), dt_bias=as_parameter(dt_bias, x), dt_softplus=bool(dt_softplus), dt_limit=tuple(dt_limit)
    )
    A = as_parameter(A, x)
    wants_states = return_final_states or return_varlen_states
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"mamba_chunk_scan_combined: cu_seqlens needs a batch of one; x has a batch of {batch}")
        return _packed_by_cu_seqlens(
            x, dt, A, B, C, z, initial_states, cu_seqlens, options, return_final_states, return_varlen_states
        )
    packing = packing_of(seq_idx, "mamba_chunk_scan_combined", batch, seqlen)
    if packing is None:
        return ops.ssd_scan(x, dt, A, B, C, z=z, initial_state=initial_states, return_final_state=return_final_states, **options)
    result = ops.ssd_scan(
        *(packing.pack(t) if t.dim() > 1 else t for t in (x, dt, A, B, C)), z=packing.pack(z),
        initial_state=packing.initial(initial_states), return_final_state=wants_states, cu_seqlens=packing.cu_seqlens, **options,
    )  # fmt: skip
    if not return_final_states:
        return result.view(x.shape)
    return result[0].view(x.shape), packing.final(result[1])


def _packed_by_cu_seqlens(
    x, dt, A, B, C, z, initial_states, cu_seqlens, options, return_final_states, return_varlen_states
) -> Tensor | tuple[Tensor, ...]:
    nonempty = cu_seqlens[1:] > cu_seqlens[:-1]
    initial = None
    if initial_states is not None:  # it comes before the first sequence that has a token
        first = nonempty.int().argmax()[None]
        zeros = initial_states.new_zeros(cu_seqlens.shape[0] - 1, *initial_states.shape[1:])
        initial = zeros.index_copy(0, first, initial_states)
    if not return_final_states and not return_varlen_states:
        return ops.ssd_scan(x, dt, A, B, C, z=z, initial_state=initial, cu_seqlens=cu_seqlens, **options)
    out, states = ops.ssd_scan(
        x, dt, A, B, C, z=z, initial_state=initial, cu_seqlens=cu_seqlens, return_final_state=True, **options
    )
    last = (nonempty * torch.arange(1, nonempty.shape[0] + 1, device=nonempty.device)).argmax()[None]
    final = (states.index_select(0, last),) if return_final_states else ()
    return (out, *final, states) if return_varlen_states else (out, *final)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 block after in_proj, by :func:`statescan.mamba2_scan`: split, convolution, scan, gate, norm, out_proj.

    Args:
        zxbcdt: [batch, seqlen, 2 d_mlp + 2 dim + 2 ngroups dstate + nheads], dim = nheads headdim. A positive d_mlp is the
            part of a gated MLP beside the block: ``silu(a) b`` of the two halves comes before y in the output.
        conv1d_weight: [dim + 2 ngroups dstate, width]; conv1d_bias: [dim + 2 ngroups dstate].
        dt_bias, A: [nheads]; D: [nheads] with headdim, or [nheads, headdim].
        chunk_size: as in mamba_chunk_scan_combined.
        initial_states, seq_idx: as there; the convolution too is cut at each change of seq_idx. A negative index is padding:
            y is zero there, and so is the final state of a row that ends in it.
        activation: "silu", "swish" or None, after the convolution.
        rmsnorm_weight: [dim]; None gates by silu(z) without a norm. A norm works on each group of dim / ngroups channels.
        outproj_weight: [d_out, d_mlp + dim]; outproj_bias: [d_out].

    Returns:
        [batch, seqlen, d_mlp + dim], or [batch, seqlen, d_out] with outproj_weight; with return_final_states also
        [batch, nheads, headdim, dstate] in float32.
    """
    name = "mamba_split_conv1d_scan_combined"
    activation = activation_of(name, activation)
    if D.dim() == 1 and headdim is None:
        raise ValueError(f"{name}: headdim is needed with a D of shape {tuple(D.shape)}")
    if outproj_bias is not None and outproj_weight is None:
        raise ValueError(f"{name}: outproj_bias needs outproj_weight")
    nheads, headdim = D.shape[0], headdim if D.dim() == 1 else D.shape[1]
    batch, seqlen, width = zxbcdt.shape
    dim, conv_dim = nheads * headdim, conv1d_weight.shape[0]
    d_mlp = (width - dim - conv_dim - nheads) // 2
    if d_mlp < 0 or width != 2 * d_mlp + dim + conv_dim + nheads:
        raise ValueError(
            f"{name}: zxbcdt has {width} channels; expected dim + conv_dim + nheads = {dim} + {conv_dim} + {nheads}, and twice "
            "the width of an MLP beside the block if there is one"
        )
    block = zxbcdt[..., 2 * d_mlp :]
    packing = packing_of(seq_idx, name, batch, seqlen)
    fused = activation is not None  # mamba2_scan always has its SiLU
    y, states = (_fused if fused else partial(_composed, activation=activation))(
        block if packing is None else packing.pack(block),
        as_weight(conv1d_weight, zxbcdt),
        conv1d_bias,
        as_parameter(dt_bias, zxbcdt),
        as_parameter(A, zxbcdt),
        as_parameter(D, zxbcdt),
        as_weight(rmsnorm_weight, zxbcdt),
        headdim=headdim,
        ngroups=ngroups,
        eps=1e-6 if rmsnorm_weight is None else rmsnorm_eps,  # callers without a norm pass None
        norm_before_gate=norm_before_gate,
        dt_limit=tuple(dt_limit),
        initial_state=initial_states if packing is None else packing.initial(initial_states),
        cu_seqlens=None if packing is None else packing.cu_seqlens,
        return_final_state=return_final_states,
    )
    y = y.reshape(batch, seqlen, dim)
    states = states if packing is None or states is None else packing.final(states)
    if packing is not None and packing.padding is not None:  # zero out of the convolution, zero after it
        y = y.masked_fill(packing.padding[..., None], 0)
        states = states if states is None else states.masked_fill(packing.padding[:, -1, None, None, None], 0)
    if d_mlp > 0:
        gate, up = zxbcdt[..., : 2 * d_mlp].chunk(2, dim=-1)
        y = torch.cat([F.silu(gate) * up, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, states) if return_final_states else y


def _fused(
    block, conv_weight, conv_bias, dt_bias, A, D, norm_weight, *, headdim, return_final_state, **options
) -> tuple[Tensor, Tensor | None]:
    conv_bias = None if conv_bias is None else conv_bias.to(conv_weight.dtype)
    result = ops.mamba2_scan(
        block, conv_weight, conv_bias, dt_bias, A, D=D, norm_weight=norm_weight, return_final_states=return_final_state,
        **options,
    )  # fmt: skip
    return (result[0], result[2]) if return_final_state else (result, None)


def _composed(
    block, conv_weight, conv_bias, dt_bias, A, D, norm_weight, *, activation, headdim, ngroups, eps, norm_before_gate, dt_limit,
    initial_state, cu_seqlens, return_final_state,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What mamba2_scan does, from the ops that it fuses."""
    nheads, conv_dim = A.shape[0], conv_weight.shape[0]
    dim = nheads * headdim
    z, xBC, dt = block.split([dim, conv_dim, nheads], dim=-1)
    conv_bias = None if conv_bias is None else conv_bias.to(conv_weight.dtype)
    xBC = ops.causal_conv1d(xBC, conv_weight, conv_bias, activation=activation, cu_seqlens=cu_seqlens)
    x, B, C = xBC.split([dim, (conv_dim - dim) // 2, (conv_dim - dim) // 2], dim=-1)
    result = ops.ssd_scan(
        x.unflatten(-1, (nheads, headdim)), dt, A, B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1)), D=D,
        z=z.unflatten(-1, (nheads, headdim)) if norm_weight is None else None, dt_bias=dt_bias, dt_softplus=True,
        dt_limit=dt_limit, initial_state=initial_state, cu_seqlens=cu_seqlens, return_final_state=return_final_state,
    )  # fmt: skip
    y, states = result if return_final_state else (result, None)
    y = y.flatten(2)
    if norm_weight is not None:
        options = dict(group_size=dim // ngroups, eps=eps, norm_before_gate=norm_before_gate)
        y = ops.gated_rms_norm(y, z, norm_weight, **options)
    return y, states
