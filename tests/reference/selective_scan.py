import numpy as np

from .common import discretise, dsilu, sigmoid, silu, softplus, walks


def selective_scan(
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
    """h = exp(dt A) h + dt B x;  y = C.h (2 Re C.h with a complex A) + D x, times silu(z). Returns y and the last h."""
    batch, seqlen, dim = x.shape
    dstate = A.shape[1]
    dt = discretise(dt, dt_bias, dt_softplus, dt_limit)

    def at(projection, row, t):
        """B or C of a token, for every channel: a group serves consecutive channels."""
        if projection.ndim == 2:
            return projection
        return np.repeat(projection[row, t], dim // projection.shape[2], axis=0)

    sequences = walks(batch, seqlen, cu_seqlens, reverse)
    y = np.zeros_like(x)
    final_state = np.zeros((len(sequences), dim, dstate), A.dtype)
    for s, (row, tokens) in enumerate(sequences):
        state = final_state[s] if initial_state is None else initial_state[s]
        for t in tokens:
            step = dt[row, t, :, None]
            state = np.exp(step * A) * state + step * at(B, row, t) * x[row, t, :, None]
            out = np.sum(at(C, row, t) * state, axis=1)
            y[row, t] = 2 * out.real if np.iscomplexobj(A) else out
            if D is not None:
                y[row, t] += D * x[row, t]
            if z is not None:
                y[row, t] *= silu(z[row, t])
        final_state[s] = state
    return y, final_state


def selective_scan_backward(
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
    """Backwards from the last token to the first, every state of the forward kept. A complex gradient is dL/dRe + i dL/dIm.

    Returns dx, ddt, dA, dB, dC, dD, dz, ddt_bias and dinitial_state; None for what is absent.
    """
    batch, seqlen, dim = x.shape
    raw, step = dt if dt_bias is None else dt + dt_bias, discretise(dt, dt_bias, dt_softplus, dt_limit)
    slope = sigmoid(raw) if dt_softplus else np.ones_like(raw)
    if dt_limit is not None:
        limited = softplus(raw) if dt_softplus else raw
        slope = np.where((limited < dt_limit[0]) | (limited > dt_limit[1]), 0.0, slope)

    def at(projection, row, t):
        if projection.ndim == 2:
            return projection
        return np.repeat(projection[row, t], dim // projection.shape[2], axis=0)

    def add(gradient, row, t, of_channels):
        """Adds the gradients of every channel's B or C to those of the groups that they share."""
        if gradient.ndim == 2:
            gradient += of_channels
        else:
            groups, dstate = gradient.shape[2:]
            gradient[row, t] += of_channels.reshape(groups, dim // groups, dstate).sum(axis=1)

    twice = 2.0 if np.iscomplexobj(A) else 1.0
    real = lambda v: v.real if np.iscomplexobj(v) else v
    sequences = walks(batch, seqlen, cu_seqlens, reverse)
    dx, ddt, dz = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    dA, dB, dC, dD = np.zeros_like(A), np.zeros_like(B), np.zeros_like(C), np.zeros(dim)
    dinitial_state = np.zeros((len(sequences), *A.shape), A.dtype)
    for s, (row, tokens) in enumerate(sequences):
        states = [np.zeros(A.shape, A.dtype) if initial_state is None else initial_state[s]]
        for t in tokens:
            h = step[row, t, :, None]
            states.append(np.exp(h * A) * states[-1] + h * at(B, row, t) * x[row, t, :, None])
        adjoint = dinitial_state[s] if dfinal_state is None else dfinal_state[s]
        for i in reversed(range(len(tokens))):
            t, before, state = tokens[i], states[i], states[i + 1]
            gradient = dy[row, t]
            if z is not None:
                y = twice * real(np.sum(at(C, row, t) * state, axis=1)) + (0 if D is None else D * x[row, t])
                dz[row, t] = gradient * y * dsilu(z[row, t])
                gradient = gradient * silu(z[row, t])
            if D is not None:
                dD += gradient * x[row, t]
                dx[row, t] += D * gradient
            add(dC, row, t, twice * gradient[:, None] * np.conj(state))
            adjoint = adjoint + twice * gradient[:, None] * np.conj(at(C, row, t))
            h = step[row, t]
            add(dB, row, t, (h * x[row, t])[:, None] * adjoint)
            dupdate = real(np.sum(np.conj(at(B, row, t)) * adjoint, axis=1))  # of dt x
            decay = np.exp(h[:, None] * A)
            dlog_decay = adjoint * np.conj(decay * before)  # of dt A
            dA += h[:, None] * dlog_decay
            dx[row, t] += h * dupdate
            ddt[row, t] = slope[row, t] * (x[row, t] * dupdate + real(np.sum(np.conj(A) * dlog_decay, axis=1)))
            adjoint = np.conj(decay) * adjoint
        dinitial_state[s] = adjoint
    ddt_bias = np.sum(ddt, axis=(0, 1))
    gradients = ((D, dD), (z, dz), (dt_bias, ddt_bias), (initial_state, dinitial_state))
    return dx, ddt, dA, dB, dC, *(None if given is None else gradient for given, gradient in gradients)
