"""selective_scan on a GPU, forward and backward, beside two floors: its bytes, and its exponentials.

``python -m statescan.bench.bench_selective_scan_cuda [--json FILE] [--seconds S]``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import statescan
import torch
from tabulate import tabulate

from . import harness

# batch, seqlen, dim, dstate, layout of x, dt, z and y
SHAPES = (
    (8, 2048, 5120, 16, "channels last"),
    (8, 2048, 5120, 16, "channels first"),
    (1, 16384, 5120, 16, "channels last"),
    (1, 2048, 5120, 16, "channels last"),
    (1, 2048, 1536, 16, "channels last"),
)
FLOOR_BANDWIDTH = 3.0e12  # what a large copy reaches on an H100
EXPONENTIALS = 132 * 16 * 1.755e9  # a second: 16 a clock of each multiprocessor's special-function unit


def _inputs(batch: int, seqlen: int, dim: int, dstate: int, layout: str, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda")

    def channels() -> torch.Tensor:
        if layout == "channels first":
            return normal(batch, dim, seqlen).to(dtype).transpose(1, 2)
        return normal(batch, seqlen, dim).to(dtype)

    A = -torch.arange(1, dstate + 1, device="cuda", dtype=torch.float32).repeat(dim, 1)  # as Mamba-1 starts
    B, C = (normal(batch, seqlen, 1, dstate).to(dtype) for _ in range(2))
    options = {"D": normal(dim), "z": channels(), "dt_bias": normal(dim) - 4, "dt_softplus": True}
    return (channels(), channels(), A, B, C), options


def _recurrence(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any, dt_bias: Any) -> torch.Tensor:
    """y of the last row of the batch, for a few channels, in the dtype of the inputs."""
    dt = torch.nn.functional.softplus(dt[-1] + dt_bias)
    state, outputs = torch.zeros_like(A), []
    for t in range(x.shape[1]):
        state = torch.exp(dt[t, :, None] * A) * state + (dt[t] * x[-1, t])[:, None] * B[-1, t, 0]
        outputs.append((state * C[-1, t, 0]).sum(1))
    return (torch.stack(outputs) + D * x[-1]) * torch.nn.functional.silu(z[-1])


def _verify(dtype: torch.dtype, layout: str) -> None:
    """Some channels of y and of the gradients that are theirs, against autograd through the recurrence in float64."""
    inputs, options = _inputs(2, 256, 512, 16, layout, dtype)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    values = dict(zip(names, (*inputs, options["D"], options["z"], options["dt_bias"]), strict=True))
    dy = torch.randn_like(values["x"])
    y = statescan.selective_scan(*inputs, **options)
    gradients = dict(zip((*names, "initial_state"), statescan.selective_scan_backward(*inputs, dy, **options), strict=True))
    some = slice(60, 512, 97)
    # The other rows of the batch add to the gradients of parameters: only the last one has a gradient.
    dy[:-1] = 0
    of_parameters = dict(zip((*names, "initial_state"), statescan.selective_scan_backward(*inputs, dy, **options), strict=True))

    def pick(name: str, value: torch.Tensor) -> torch.Tensor:
        return value[some] if name in ("A", "D", "dt_bias") else value if name in ("B", "C") else value[..., some]

    exact = {name: pick(name, value).double().requires_grad_() for name, value in values.items()}
    exact_y = _recurrence(**exact)
    exact_y.backward(dy[-1, :, some].double())

    def close(got: torch.Tensor, value: torch.Tensor, name: str) -> None:
        error = ((got.double() - value).norm() / value.norm()).item()
        gate = harness.GATES["float32" if got.dtype == torch.float32 else str(dtype).removeprefix("torch.")]
        if not error <= gate:
            raise harness.Disagreement(f"{name} is off by {error:.2g}, more than {gate:.2g}")

    close(y[-1, :, some], exact_y.detach(), "y")
    for name in ("x", "dt", "z"):
        close(gradients[name][-1, :, some], exact[name].grad[-1], f"d{name}")
    for name in ("A", "D", "dt_bias"):
        close(of_parameters[name][some], exact[name].grad, f"d{name}")


def _calls(shape: tuple[Any, ...], dtype: torch.dtype) -> list[tuple[str, int, float, Callable[[], Callable[[], Any]]]]:
    """(direction, bytes, exponentials, a maker of calls on fresh memory)."""
    batch, seqlen, dim, dstate, layout = shape

    def forward() -> Callable[[], Any]:
        inputs, options = _inputs(*shape, dtype)
        y, final_state = torch.empty_like(inputs[0]), torch.empty(batch, dim, dstate, device="cuda")
        return lambda: statescan.selective_scan(*inputs, **options, out=y, final_state_out=final_state)

    def backward() -> Callable[[], Any]:
        inputs, options = _inputs(*shape, dtype)
        dy, kept = torch.randn_like(inputs[0]), []
        return lambda: kept.append(statescan.selective_scan_backward(*inputs, dy, **options))

    tokens = batch * seqlen * dim
    projections = 2 * batch * seqlen * dstate * dtype.itemsize
    calls = [("forward", 4 * tokens * dtype.itemsize + projections, tokens * (dstate + 4), forward)]
    if layout == "channels last":  # gradients come out so
        calls.append(("backward", 7 * tokens * dtype.itemsize + 2 * projections, tokens * (dstate + 6), backward))
    return calls


def measure(shape: tuple[Any, ...], dtype: torch.dtype, device: harness.Cuda, seconds: float) -> list[dict[str, Any]]:
    batch, seqlen, dim, dstate, layout = shape
    rows = []
    for direction, nbytes, exponentials, make_call in _calls(shape, dtype):
        torch.cuda.empty_cache()
        inputs, options = _inputs(1, 16, dim, dstate, layout, dtype)
        kernel = statescan.plan("selective_scan", *inputs, **options).kernel
        row = {"shape": f"b{batch} l{seqlen} d{dim} n{dstate}", "layout": layout, "dtype": str(dtype).removeprefix("torch."),
               "what": direction, "kernel": kernel}  # fmt: skip
        row |= harness.timed(device, make_call, nbytes, seconds)
        row |= {"bytes": nbytes, "bytes_floor_us": nbytes / FLOOR_BANDWIDTH * 1e6,
                "exponentials_floor_us": exponentials / EXPONENTIALS * 1e6}  # fmt: skip
        row["share_of_floor"] = max(row["bytes_floor_us"], row["exponentials_floor_us"]) / row["median_us"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write what was measured, and on what")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each measurement")
    args = parser.parse_args()
    device = harness.Cuda()
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for layout in ("channels last", "channels first"):
            _verify(dtype, layout)
    rows = [row for shape in SHAPES for row in measure(shape, torch.bfloat16, device, args.seconds)]
    rows += [row for row in measure(SHAPES[0], torch.float32, device, args.seconds)]
    headers = ("shape", "layout", "dtype", "what", "kernel", "us", "+-", "bytes us", "exp us", "share")
    print(f"{device.label()}, torch {torch.__version__}")
    print(tabulate([(
        r["shape"], r["layout"], r["dtype"], r["what"], r["kernel"], f"{r['median_us']:.1f}", f"{r['spread_us']:.1f}",
        f"{r['bytes_floor_us']:.1f}", f"{r['exponentials_floor_us']:.1f}", f"{r['share_of_floor']:.0%}",
    ) for r in rows], headers, tablefmt="github", disable_numparse=True))  # fmt: skip
    if args.json:
        facts = {"machine": device.label(), "torch": torch.__version__, **harness.environment(), "rows": rows}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=1)


if __name__ == "__main__":
    main()
