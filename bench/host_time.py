"""Host time of the decode ops: a call with every argument and its outputs given, on tensors so small that the kernel's own
work is a small part. On a GPU this is what a call costs Python; a CUDA graph pays none of it."""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import statescan

Make = Callable[..., Any]


def _calls(zeros: Make, index: Any) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """(op, number of tensors, call) with `zeros` making the tensors."""
    h, p, n, d, w = 2, 4, 8, 24, 4
    state, x, dt, A, B, C = zeros(1, h, p, n), zeros(1, h, p), zeros(1, h), zeros(h), zeros(1, 1, n), zeros(1, 1, n)
    D, z, bias, y = zeros(h), zeros(1, h, p), zeros(h), zeros(1, h, p)
    yield "selective_state_update", 12, lambda: statescan.selective_state_update(
        state, x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True, state_indices=index, out_state_indices=index, out=y
    )
    tokens, window, weight, conv_bias, out = zeros(1, d), zeros(1, d, w - 1), zeros(d, w), zeros(d), zeros(1, d)
    yield "causal_conv1d_update", 6, lambda: statescan.causal_conv1d_update(
        tokens, window, weight, conv_bias, activation="silu", state_indices=index, out=out
    )
    zxbcdt, inner, norm = zeros(1, h * p + d + h), zeros(1, h * p), zeros(h * p)
    yield "mamba2_update", 11, lambda: statescan.mamba2_update(
        zxbcdt, window, state, weight, conv_bias, bias, A, D=D, norm_weight=norm, state_indices=index, out=inner
    )


def microseconds(call: Callable[[], Any], loops: int = 200, repeats: int = 500) -> float:
    """The least time of a call over many short loops, so that other work on the machine stays out of it."""
    call()
    return 1e6 * min(timeit.repeat(call, number=loops, repeat=repeats)) / loops


def measure() -> list[dict[str, Any]]:
    """A row for each op and framework: NumPy, and torch if the caller can import it."""
    rows = []

    def add(framework: str, zeros: Make, index: Any) -> None:
        for op, tensors, call in _calls(zeros, index):
            rows.append({"op": op, "arrays": framework, "tensors": tensors, "us": microseconds(call)})

    add("numpy", lambda *shape: np.zeros(shape, np.float32), np.zeros(1, np.int32))
    try:
        import torch
    except ImportError:
        return rows
    add("torch", lambda *shape: torch.zeros(shape), torch.zeros(1, dtype=torch.int32))
    with torch.no_grad():
        add("torch, no_grad", lambda *shape: torch.zeros(shape), torch.zeros(1, dtype=torch.int32))
    return rows


def main() -> int:
    """Print the table."""
    from tabulate import tabulate

    rows = measure()
    print(f"statescan {statescan.__version__}, Python {sys.version.split()[0]}, numpy {np.__version__}", end="")
    print(f", torch {sys.modules['torch'].__version__}" if "torch" in sys.modules else "")
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    return 0
