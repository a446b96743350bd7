import numpy as np

from .common import dsilu, silu, walks


def causal_conv1d(x, weight, bias=None, *, activation=None, initial_state=None, cu_seqlens=None, reverse=False):
    """y[t] = act(bias + sum_k weight[k] x[t-w+1+k]). Returns y and the last w-1 inputs of every sequence, oldest first."""
    batch, seqlen, dim = x.shape
    width = weight.shape[1]
    sequences = walks(batch, seqlen, cu_seqlens, reverse)
    y = np.zeros_like(x)
    final_state = np.zeros((len(sequences), dim, width - 1))
    for s, (row, tokens) in enumerate(sequences):
        past = final_state[s] if initial_state is None else initial_state[s]
        for t in tokens:
            window = np.concatenate([past, x[row, t, :, None]], axis=1)
            out = np.sum(weight * window, axis=1)
            if bias is not None:
                out = out + bias
            y[row, t] = silu(out) if activation == "silu" else out
            past = window[:, 1:]
        final_state[s] = past
    return y, final_state


def causal_conv1d_backward(
    x, weight, dy, bias=None, *, activation=None, initial_state=None, cu_seqlens=None, reverse=False, dfinal_state=None
):
    """Backwards from the last token to the first. Returns dx, dweight, dbias and dinitial_state; None for what is absent."""
    batch, seqlen, dim = x.shape
    width = weight.shape[1]
    sequences = walks(batch, seqlen, cu_seqlens, reverse)
    dx, dweight, dbias = np.zeros_like(x), np.zeros_like(weight), np.zeros(dim)
    dinitial_state = np.zeros((len(sequences), dim, width - 1))
    for s, (row, tokens) in enumerate(sequences):
        past = np.zeros((dim, width - 1)) if initial_state is None else initial_state[s]
        inputs = np.concatenate([past, x[row, list(tokens)].T], axis=1)  # in the order of the scan
        dinputs = np.zeros_like(inputs)
        if dfinal_state is not None:
            dinputs[:, len(tokens) :] += dfinal_state[s]
        for i in reversed(range(len(tokens))):
            window = inputs[:, i : i + width]
            dout = dy[row, tokens[i]]
            if activation == "silu":
                dout = dout * dsilu(np.sum(weight * window, axis=1) + (0 if bias is None else bias))
            dbias += dout
            dweight += dout[:, None] * window
            dinputs[:, i : i + width] += dout[:, None] * weight
        dx[row, list(tokens)] = dinputs[:, width - 1 :].T
        dinitial_state[s] = dinputs[:, : width - 1]
    return dx, dweight, None if bias is None else dbias, None if initial_state is None else dinitial_state
