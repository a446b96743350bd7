import numpy as np

from .common import silu, walks


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
