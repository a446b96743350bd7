"""The formulae that mamba-ssm and causal-conv1d document, in float64 torch, one token at a time, in their layouts."""

import torch
import torch.nn.functional as F


def reset_at(seq_idx, row, t):
    return seq_idx is not None and t > 0 and seq_idx[row, t] != seq_idx[row, t - 1]


def conv(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    """x [batch, dim, seqlen]. Returns the output and the last width - 1 inputs of each row."""
    batch, dim, seqlen = x.shape
    before = weight.shape[1] - 1
    rows, lasts = [], []
    for row in range(batch):
        window = x.new_zeros(dim, before) if initial_states is None else initial_states[row]
        outputs = []
        for t in range(seqlen):
            if reset_at(seq_idx, row, t):
                window = torch.zeros_like(window)
            window = torch.cat([window, x[row, :, t, None]], dim=1)
            out = (window * weight).sum(1) + (0 if bias is None else bias)
            out = F.silu(out) if activation else out
            outputs.append(torch.zeros_like(out) if seq_idx is not None and seq_idx[row, t] < 0 else out)
            window = window[:, 1:]
        rows.append(torch.stack(outputs, 1) if outputs else x[row])
        lasts.append(window)
    return torch.stack(rows), torch.stack(lasts)


def scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, softplus=False, limit=None, initial=None, seq_idx=None):
    """h = exp(dt A) h + dt B x; y = C.h + D x, times silu(z), each head and channel with an A of its own.

    x, dt, z [batch, seqlen, heads, channels]; A [heads, channels, dstate]; B, C [batch, seqlen, heads, dstate]; D, dt_bias
    [heads, channels]. Returns y and the state after the last token of each row.
    """
    if dt_bias is not None:
        dt = dt + dt_bias
    if softplus:
        dt = F.softplus(dt, threshold=1e6)
    if limit is not None:
        dt = dt.clamp(*limit)
    rows, lasts = [], []
    for row in range(x.shape[0]):
        state = A.new_zeros(A.shape) if initial is None else initial[row]
        outputs = []
        for t in range(x.shape[1]):
            if reset_at(seq_idx, row, t):
                state = torch.zeros_like(state)
            step = dt[row, t, :, :, None]
            state = torch.exp(step * A) * state + step * B[row, t, :, None] * x[row, t, :, :, None]
            y = (state * C[row, t, :, None]).sum(-1)
            y = 2 * y.real if y.is_complex() else y
            y = y if D is None else y + D * x[row, t]
            outputs.append(y if z is None else y * F.silu(z[row, t]))
        rows.append(torch.stack(outputs) if outputs else x[row])
        lasts.append(state)
    return torch.stack(rows), torch.stack(lasts)


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Channels first; B and C in any of their documented shapes."""
    dim, seqlen = u.shape[1:]

    def per_channel(B):
        if B.dim() == 2:
            return B.expand(u.shape[0], seqlen, *B.shape)
        if A.is_complex():
            B = torch.view_as_complex(B.unflatten(-1, (seqlen, 2)).contiguous())
        B = B[:, None] if B.dim() == 3 else B
        return B.repeat_interleave(dim // B.shape[1], dim=1).permute(0, 3, 1, 2)

    tokens_first = lambda v: None if v is None else v.transpose(1, 2)[..., None]
    column = lambda v: None if v is None else v[:, None]
    y, last = scan(
        tokens_first(u), tokens_first(delta), A[:, None], per_channel(B), per_channel(C), column(D), tokens_first(z),
        column(delta_bias), delta_softplus,
    )  # fmt: skip
    return y[..., 0].transpose(1, 2), last[:, :, 0]


def chunk_scan(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, dt_softplus=False,
    dt_limit=(0.0, float("inf")),
):  # fmt: skip
    nheads, headdim = x.shape[2:]
    per_head = lambda v: v.repeat_interleave(nheads // v.shape[2], dim=2)
    A = A[:, None, None].expand(-1, headdim, B.shape[-1])
    widened = lambda v: None if v is None else v if v.dim() == 2 else v[:, None]
    return scan(
        x, dt[..., None], A, per_head(B), per_head(C), widened(D), z, widened(dt_bias), dt_softplus, dt_limit, initial_states,
        seq_idx,
    )  # fmt: skip


def rms_norm(x, weight, bias=None, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    if z is not None and not norm_before_gate:
        x = x * F.silu(z)
    grouped = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = (grouped / (grouped.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight
    y = y if bias is None else y + bias
    return y * F.silu(z) if z is not None and norm_before_gate else y


def mamba_inner(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None,
    D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True, b_rms_weight=None, c_rms_weight=None,
    dt_rms_weight=None, b_c_dt_rms_eps=1e-6,
):  # fmt: skip
    x, z = xz.chunk(2, dim=1)
    x, _ = conv(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    rank, width = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    dt, from_B, from_C = (x.transpose(1, 2) @ x_proj_weight.T).split([rank, width, width], dim=-1)
    dt = dt @ delta_proj_weight.T
    normed = lambda v, weight: v if weight is None else rms_norm(v, weight, eps=b_c_dt_rms_eps)

    def interleaved(v):  # [batch, seqlen, (dstate two)] as [batch, dstate, (seqlen two)]
        return v.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(-2) if A.is_complex() else v.transpose(1, 2)

    if B is None:
        B = interleaved(normed(from_B + (0 if B_proj_bias is None else B_proj_bias), b_rms_weight))
    if C is None:
        C = interleaved(normed(from_C + (0 if C_proj_bias is None else C_proj_bias), c_rms_weight))
    dt = normed(dt, dt_rms_weight).transpose(1, 2)
    y, _ = selective_scan(x, dt, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def split_conv1d_scan(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, initial_states=None, seq_idx=None, dt_limit=(0.0, float("inf")),
    activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1,
    norm_before_gate=True,
):  # fmt: skip
    nheads, headdim = A.shape[0], headdim or D.shape[1]
    dim, conv_dim = nheads * headdim, conv1d_weight.shape[0]
    d_mlp = (zxbcdt.shape[-1] - dim - conv_dim - nheads) // 2
    gate, up, z, xBC, dt = zxbcdt.split([d_mlp, d_mlp, dim, conv_dim, nheads], dim=-1)
    xBC, _ = conv(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    x, B, C = xBC.transpose(1, 2).split([dim, (conv_dim - dim) // 2, (conv_dim - dim) // 2], dim=-1)
    heads = lambda v: v.unflatten(-1, (nheads, headdim))
    groups = lambda v: v.unflatten(-1, (ngroups, -1))
    scan_gate = heads(z) if rmsnorm_weight is None else None
    y, states = chunk_scan(heads(x), dt, A, groups(B), groups(C), D, scan_gate, dt_bias, initial_states, seq_idx, True, dt_limit)
    y = y.flatten(2)
    if rmsnorm_weight is not None:
        y = rms_norm(y, rmsnorm_weight, None, z, rmsnorm_eps, dim // ngroups, norm_before_gate)
    y = torch.cat([F.silu(gate) * up, y], dim=-1)
    return y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias), states
