"""Host time of the decode ops: a call with every argument and its outputs given, on tensors so small that the kernel's own
work is a small part. On a GPU this is what a call costs Python, the launch included, beside torch.add with its output given; a
CUDA graph pays none of it."""

from __future__ import annotations

import functools
import sys
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import statescan

Make = Callable[..., Any]


def _calls(zeros: Make, index: Any) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """(op, number of tensors, call) with `zeros` making the tensors."""
    h, p, n, d, w = 1, 32, 32, 96, 4  # for the kernel that takes mamba2_update in one launch
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


def microseconds(call: Callable[[], Any], loops: int = 200, repeats: int = 500, wait: Callable[[], None] | None = None) -> float:
    """The least time of a call over many short loops, so that other work on the machine stays out of it. wait: for what a loop
    left to the device."""
    call()
    times = []
    for _ in range(repeats):
        if wait:
            wait()
        times.append(timeit.timeit(call, number=loops))
    return 1e6 * min(times) / loops


def measure() -> list[dict[str, Any]]:
    """A row for each op and framework: NumPy, and torch if the caller can import it, on a GPU if there is one."""
    rows = []

    def add(framework: str, zeros: Make, index: Any, wait: Callable[[], None] | None = None) -> None:
        for op, tensors, call in _calls(zeros, index):
            rows.append({"op": op, "arrays": framework, "tensors": tensors, "us": microseconds(call, wait=wait)})

    add("numpy", lambda *shape: np.zeros(shape, np.float32), np.zeros(1, np.int32))
    try:
        import torch
    except ImportError:
        return rows
    on_gpu = torch.cuda.is_available() and statescan.info()["cuda_devices"] > 0
    for device, wait in (("cpu", None), *[("cuda", torch.cuda.synchronize)] * on_gpu):
        arrays = "torch" if device == "cpu" else "torch on the GPU"
        zeros, index = functools.partial(torch.zeros, device=device), torch.zeros(1, dtype=torch.int32, device=device)
        add(arrays, zeros, index, wait)
        with torch.no_grad():
            add(f"{arrays}, no_grad", zeros, index, wait)
            a, b, out = zeros(4), zeros(4), zeros(4)
            us = microseconds(lambda: torch.add(a, b, out=out), wait=wait)
            rows.append({"op": "torch.add", "arrays": f"{arrays}, no_grad", "tensors": 3, "us": us})
    return rows


def main() -> int:
    """Print the table."""
    from tabulate import tabulate

    rows = measure()
    print(f"statescan {statescan.__version__}, Python {sys.version.split()[0]}, numpy {np.__version__}", end="")
    print(f", torch {sys.modules['torch'].__version__}" if "torch" in sys.modules else "")
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    return 0
