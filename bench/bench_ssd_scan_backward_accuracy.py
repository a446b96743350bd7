"""How far each gradient of ssd_scan lies from that of the float64 recurrence on a GPU, and whether repeated calls agree in every bit.

``python -m statescan.bench.bench_ssd_scan_backward_accuracy``; ``--gated`` is with z. Relative RMS errors; "rounding" is that of the
exact gradient once rounded to its dtype, the least that any kernel could have. mamba-ssm is optional.
"""

from __future__ import annotations

import argparse

import statescan
import torch
from tabulate import tabulate

from .bench_ssd_scan_accuracy import recurrence

# batch, seqlen, nheads, headdim, ngroups, dstate
SHAPES = ((2, 1024, 8, 64, 1, 128), (1, 1000, 24, 64, 3, 128), (70, 130, 4, 64, 2, 128), (2, 500, 5, 80, 1, 64))
DTYPES = ("float32", "float16", "bfloat16")
GRADIENTS = ("dx", "ddt", "dA", "dB", "dC", "dD", "dz", "ddt_bias", "dinitial_state")
SHOWN = ("dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias")


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, gated: bool) -> dict[str, torch.Tensor]:
    batch, seqlen, nheads, headdim, ngroups, dstate = shape
    randn = lambda *sizes: torch.randn(*sizes, device="cuda")
    return {
        "x": randn(batch, seqlen, nheads, headdim).to(dtype),
        "dt": (randn(batch, seqlen, nheads) / 2).to(dtype),
        "A": -torch.exp(torch.rand(nheads, device="cuda") * 2.7),
        "B": randn(batch, seqlen, ngroups, dstate).to(dtype),
        "C": randn(batch, seqlen, ngroups, dstate).to(dtype),
        "D": randn(nheads),
        "dt_bias": randn(nheads) / 2 - 4,
        "dy": randn(batch, seqlen, nheads, headdim).to(dtype),
    } | ({"z": randn(batch, seqlen, nheads, headdim).to(dtype)} if gated else {})


def exact_gradients(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By automatic differentiation of the recurrence, token by token in float64."""
    v = {name: value.double().requires_grad_() for name, value in inputs.items() if name != "dy"}
    y, _ = recurrence(v["x"], v["dt"] + v["dt_bias"], v["A"], v["B"], v["C"])
    y = y + v["D"][:, None] * v["x"]
    if "z" in v:
        y = y * torch.nn.functional.silu(v["z"])
    return {f"d{name}": g for name, g in zip(v, torch.autograd.grad(y, list(v.values()), inputs["dy"].double()))}


def _scan(inputs: dict[str, torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    given = tuple(inputs[name] for name in ("x", "dt", "A", "B", "C", "dy"))
    return given, {"D": inputs["D"], "z": inputs.get("z"), "dt_bias": inputs["dt_bias"], "dt_softplus": True}


def _mamba_ssm(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from mamba_ssm.ops.triton import ssd_combined

    (*given, dy), options = _scan(inputs)
    gated, ungated = ssd_combined._mamba_chunk_scan_combined_fwd(*given, 256, **options)[:2]
    out = gated if options["z"] is None else ungated
    return dict(zip(GRADIENTS, ssd_combined._mamba_chunk_scan_combined_bwd(dy, *given, out, 256, **options)))


def measure(shape: tuple[int, ...], dtype: str, gated: bool) -> list[tuple[str, ...]]:
    inputs = _inputs(shape, getattr(torch, dtype), gated)
    exact = exact_gradients(inputs)
    shown = (*SHOWN, "dz") if gated else SHOWN
    error = lambda got: [f"{((got[n].double() - exact[n]).norm() / exact[n].norm()).item():.2e}" for n in shown]
    name = "b{} l{} h{} p{} g{} n{}".format(*shape)
    rounded = {n: exact[n].to(inputs[n[1:]].dtype) for n in shown}
    given, options = _scan(inputs)
    kernel = statescan.plan("ssd_scan_backward", *given, **options).kernel
    first, *others = (dict(zip(GRADIENTS, statescan.ssd_scan_backward(*given, **options))) for _ in range(4))
    same = all(torch.equal(first[n], other[n]) for other in others for n in shown)
    rows = [
        (name, dtype, "rounding", *error(rounded), ""),
        (name, dtype, f"statescan, {kernel}", *error(first), "same" if same else "DIFFERENT"),
    ]
    try:
        rows.append((name, dtype, "mamba-ssm", *error(_mamba_ssm(inputs)), ""))
    except ImportError:
        pass
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gated", action="store_true", help="with z")
    gated = parser.parse_args().gated
    torch.manual_seed(0)
    rows = [row for shape in SHAPES for dtype in DTYPES for row in measure(shape, dtype, gated)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    columns = ("shape", "dtype", "by", *SHOWN, *(("dz",) if gated else ()), "bits of four calls")
    print(tabulate(rows, columns, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
