"""The two ops of a Mamba-2 model in plain torch, differentiable by autograd: the arguments of statescan.torch's, as the demo's
training uses them. Dense in the sequence: a matrix of decays over all pairs of tokens."""

import torch
import torch.nn.functional as F


def gated_rms_norm(x, z=None, weight=None, *, group_size=None, eps=1e-5, norm_before_gate=False):
    assert not norm_before_gate
    y = x if z is None else x * F.silu(z)
    groups = y.unflatten(-1, (-1, group_size or y.shape[-1]))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    return y if weight is None else y * weight


def mamba2_scan(
    zxbcdt,
    conv_weight,
    conv_bias,
    dt_bias,
    A,
    *,
    D,
    norm_weight,
    ngroups,
    norm_group_size,
    eps,
    norm_before_gate,
    dt_limit,
    initial_conv_state,
    initial_state,
    return_final_states,
    cu_seqlens,
    chunk_size,
):
    assert cu_seqlens is None and dt_limit is None and return_final_states
    length, (nheads,), (conv_dim, width) = zxbcdt.shape[1], A.shape, conv_weight.shape
    headdim, dstate = initial_state.shape[2:]
    z, xBC, dt = zxbcdt.split((nheads * headdim, conv_dim, nheads), -1)

    padded = torch.cat([initial_conv_state.transpose(1, 2), xBC], 1)
    xBC = F.silu(conv_bias + sum(padded[:, k : k + length] * conv_weight[:, k] for k in range(width)))
    x, B, C = xBC.split((nheads * headdim, ngroups * dstate, ngroups * dstate), -1)
    x = x.unflatten(-1, (nheads, headdim))
    B, C = (v.unflatten(-1, (ngroups, dstate)).repeat_interleave(nheads // ngroups, 2) for v in (B, C))

    dt = F.softplus(dt + dt_bias)
    prefix = (dt * A).cumsum(1)  # [b,l,h]
    decay = prefix[:, :, None] - prefix[:, None]  # [b,t,s,h]
    later = torch.ones(length, length, dtype=torch.bool).tril()[None, :, :, None]
    decay = decay.masked_fill(~later, -torch.inf).exp()
    scores = torch.einsum("bthn,bshn->btsh", C, B) * decay * dt[:, None]
    y = torch.einsum("btsh,bshp->bthp", scores, x) + D[:, None] * x
    y = y + torch.einsum("bthn,bhpn,bth->bthp", C, initial_state, prefix.exp())
    to_end = (prefix[:, -1:] - prefix).exp() * dt
    state = torch.einsum("bshn,bshp,bsh->bhpn", B, x, to_end) + prefix[:, -1].exp()[..., None, None] * initial_state
    y = gated_rms_norm(y.flatten(2), z, norm_weight, group_size=norm_group_size, eps=eps, norm_before_gate=norm_before_gate)
    return y, padded[:, length:].transpose(1, 2), state
