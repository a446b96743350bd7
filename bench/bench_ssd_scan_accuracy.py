"""How far ssd_scan's results lie from the float64 recurrence on a GPU, in each form and dtype, beside mamba-ssm's.

``python -m statescan.bench.bench_ssd_scan_accuracy``. Relative RMS errors; "rounding" is that of the exact result once rounded to the
dtype, the least that any kernel could have. mamba-ssm is optional.
"""

from __future__ import annotations

import argparse
from typing import Any

import statescan
import torch
from tabulate import tabulate

# batch, seqlen, nheads, headdim, ngroups, dstate
SHAPES = ((2, 1024, 8, 64, 1, 128), (4, 100, 8, 64, 1, 128), (2, 500, 4, 80, 2, 64))
DTYPES = ("float32", "float16", "bfloat16")


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    batch, seqlen, nheads, headdim, ngroups, dstate = shape
    randn = lambda *sizes: torch.randn(*sizes, device="cuda")
    return {
        "x": randn(batch, seqlen, nheads, headdim).to(dtype),
        "dt": (randn(batch, seqlen, nheads) - 4).to(dtype),
        "A": -torch.exp(torch.rand(nheads, device="cuda") * 2.7),
        "B": randn(batch, seqlen, ngroups, dstate).to(dtype),
        "C": randn(batch, seqlen, ngroups, dstate).to(dtype),
    }


def recurrence(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """y and the final state in float64, token by token; dt goes through softplus."""
    x, dt, A, B, C = (v.double() for v in (x, dt, A, B, C))
    dt = torch.nn.functional.softplus(dt)
    B, C = (v.repeat_interleave(x.shape[2] // v.shape[2], dim=2) for v in (B, C))
    state = torch.zeros(x.shape[0], *x.shape[2:], B.shape[-1], dtype=torch.float64, device=x.device)
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)
        state = decay[..., None, None] * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        y[:, t] = torch.einsum("bhpn,bhn->bhp", state, C[:, t])
    return y, state


def _mamba_ssm(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(**inputs, chunk_size=256, dt_softplus=True, return_final_states=True)


def measure(shape: tuple[int, ...], dtype: str) -> list[tuple[str, ...]]:
    inputs = _inputs(shape, getattr(torch, dtype))
    exact = recurrence(**inputs)
    error = lambda got: [f"{((g.double() - e).norm() / e.norm()).item():.2e}" for g, e in zip(got, exact)]
    name = "b{} l{} h{} p{} g{} n{}".format(*shape)
    rows = [(name, dtype, "rounding", *error([e.to(getattr(torch, dtype)) for e in exact]))]
    for mode in ("chunked", "recurrent", "quadratic"):
        options: dict[str, Any] = {"dt_softplus": True, "ssd_mode": mode}
        kernel = statescan.plan("ssd_scan", *inputs.values(), **options).kernel
        got = statescan.ssd_scan(*inputs.values(), **options, return_final_state=True)
        rows.append((name, dtype, f"statescan {mode}, {kernel}", *error(got)))
    try:
        rows.append((name, dtype, "mamba-ssm", *error(_mamba_ssm(inputs))))
    except ImportError:
        pass
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.manual_seed(0)
    rows = [row for shape in SHAPES for dtype in DTYPES for row in measure(shape, dtype)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(tabulate(rows, ("shape", "dtype", "by", "y", "final state"), tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
