import numpy as np

from .common import discretise, discretise_backward, dsilu, silu, walks


def ssd_scan(
    x,
    dt,
    A,
    B,
    C,
    *,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=None,
    initial_state=None,
    cu_seqlens=None,
    reverse=False,
):
    """h = exp(dt A) h + dt B x;  y = C.h + D x, times silu(z). Returns y and the last h of every sequence."""
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    dt = discretise(dt, dt_bias, dt_softplus, dt_limit)
    B, C = (np.repeat(v, nheads // ngroups, axis=2) for v in (B, C))  # a group serves consecutive heads
    sequences = walks(batch, seqlen, cu_seqlens, reverse)
    y = np.zeros_like(x)
    final_state = np.zeros((len(sequences), nheads, headdim, dstate))
    for s, (row, tokens) in enumerate(sequences):
        state = final_state[s] if initial_state is None else initial_state[s]
        for t in tokens:
            decay = np.exp(dt[row, t] * A)
            step = dt[row, t, :, None] * x[row, t]
            state = decay[:, None, None] * state + step[:, :, None] * B[row, t, :, None, :]
            y[row, t] = np.einsum("hpn,hn->hp", state, C[row, t])
            if D is not None:
                y[row, t] += (D if D.ndim == 2 else D[:, None]) * x[row, t]
            if z is not None:
                y[row, t] *= silu(z[row, t])
        final_state[s] = state
    return y, final_state


def ssd_scan_backward(
    x,
    dt,
    A,
    B,
    C,
    dy,
    *,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=None,
    initial_state=None,
    cu_seqlens=None,
    reverse=False,
    dfinal_state=None,
):
    """The adjoint of each step of ssd_scan, last step first, G being the adjoint of h.

    Returns dx, ddt, dA, dB, dC, dD, dz, ddt_bias and dinitial_state; None for what is absent.
    """
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    step = discretise(dt, dt_bias, dt_softplus, dt_limit)
    B, C = (np.repeat(v, nheads // ngroups, axis=2) for v in (B, C))
    channel_D = None if D is None else np.broadcast_to(D if D.ndim == 2 else D[:, None], (nheads, headdim))
    dx, ddt, dB, dC = (np.zeros(v.shape) for v in (x, dt, B, C))
    dA, dD, dz = np.zeros(nheads), np.zeros((nheads, headdim)), np.zeros(x.shape)
    sequences = walks(batch, seqlen, cu_seqlens, reverse)
    dinitial_state = np.zeros((len(sequences), nheads, headdim, dstate))
    for s, (row, tokens) in enumerate(sequences):
        states = [dinitial_state[s] if initial_state is None else initial_state[s]]
        for t in tokens:
            added = (step[row, t, :, None] * x[row, t])[:, :, None] * B[row, t, :, None, :]
            states.append(np.exp(step[row, t] * A)[:, None, None] * states[-1] + added)
        G = dinitial_state[s] if dfinal_state is None else dfinal_state[s]
        for t in reversed(tokens):
            state, before = states.pop(), states[-1]
            g = dy[row, t]
            if z is not None:
                y = np.einsum("hpn,hn->hp", state, C[row, t])
                if D is not None:
                    y = y + channel_D * x[row, t]
                dz[row, t] = g * y * dsilu(z[row, t])
                g = g * silu(z[row, t])
            if D is not None:
                dD += g * x[row, t]
                dx[row, t] = channel_D * g
            G = G + g[:, :, None] * C[row, t, :, None, :]
            dC[row, t] = np.einsum("hpn,hp->hn", state, g)
            dB[row, t] = step[row, t, :, None] * np.einsum("hpn,hp->hn", G, x[row, t])
            through_B = np.einsum("hpn,hn->hp", G, B[row, t])
            dx[row, t] += step[row, t, :, None] * through_B
            decay = np.exp(step[row, t] * A)
            dlog_decay = decay * np.einsum("hpn,hpn->h", G, before)
            dstep = np.sum(through_B * x[row, t], axis=1) + A * dlog_decay
            ddt[row, t] = discretise_backward(dt[row, t], dstep, dt_bias, dt_softplus, dt_limit)
            dA += step[row, t] * dlog_decay
            G = decay[:, None, None] * G
        dinitial_state[s] = G
    dB, dC = (v.reshape(batch, seqlen, ngroups, nheads // ngroups, dstate).sum(3) for v in (dB, dC))
    if D is not None and D.ndim == 1:
        dD = dD.sum(1)
    every = (dx, ddt, dA, dB, dC, dD, dz, ddt.sum((0, 1)), dinitial_state)
    of = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(None if value is None else gradient for value, gradient in zip(of, every))
