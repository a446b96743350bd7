"""How far y of mamba2_scan and the gradients of its backward lie from those of the float64 recurrence, beside mamba-ssm's fused block.

``python -m statescan.bench.bench_mamba2_scan_accuracy``. What has zxbcdt's dtype is given in roundings: its relative RMS error over
that of the exact one once rounded to the dtype, the least that any kernel could have. The gradients of the float32 parameters are
given as relative RMS errors. Each cell is the median of some draws of the inputs and, in brackets, their largest. mamba-ssm is
optional, and takes our convolution where causal-conv1d is not installed (mamba_ssm_block.py).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import statescan
import torch
from tabulate import tabulate

from . import mamba_ssm_block
from .bench_ssd_scan_accuracy import recurrence

BATCH, SEQLEN, NHEADS, HEADDIM, DSTATE, WIDTH = 2, 512, 4, 64, 128, 4
INNER = NHEADS * HEADDIM
CONV_DIM = INNER + 2 * DSTATE
EPS = 1e-5
# what dt_bias is, and whether D is one or missing
KINDS = {
    "dt about 0.02, D one": (-4.0, True),
    "the same without D": (-4.0, False),
    "dt about 0.13, D one": (-2.0, True),
    "dt about 3e-4, D one": (-8.0, True),
}
PARTS = {"dz": INNER, "dx": INNER, "dB": DSTATE, "dC": DSTATE, "ddt": NHEADS}  # of the gradient of zxbcdt, with their widths
ROUNDED = ("y", *PARTS)
PARAMETERS = ("conv_weight", "conv_bias", "dt_bias", "A", "D", "norm_weight")

Tensors = dict[str, torch.Tensor]


def _inputs(kind: str, dtype: torch.dtype, seqlen: int, device: str) -> tuple[Tensors, torch.Tensor]:
    """The block's arguments by name, and dy; drawn on the CPU, so that a seed gives the same on every machine."""
    bias, has_D = KINDS[kind]
    randn = lambda *sizes: torch.randn(*sizes).to(device)
    inputs = {
        "zxbcdt": randn(BATCH, seqlen, INNER + CONV_DIM + NHEADS).to(dtype),
        "conv_weight": randn(CONV_DIM, WIDTH) / 2,
        "conv_bias": randn(CONV_DIM) / 10,
        "dt_bias": torch.full((NHEADS,), bias, device=device),
        "A": -1 - 15 * torch.rand(NHEADS).to(device),
        "norm_weight": randn(INNER),
    }
    if has_D:
        inputs["D"] = torch.ones(NHEADS, device=device)
    return inputs, randn(BATCH, seqlen, INNER).to(dtype)


def _block(v: Tensors) -> torch.Tensor:
    """y of the block by its formulas, in float64 and token by token."""
    z, xBC, dt = v["zxbcdt"].split((INNER, CONV_DIM, NHEADS), dim=2)
    taps = torch.nn.functional.pad(xBC, (0, 0, WIDTH - 1, 0)).unfold(1, WIDTH, 1)
    xBC = torch.nn.functional.silu((taps * v["conv_weight"]).sum(3) + v["conv_bias"])
    x, B, C = xBC.split((INNER, DSTATE, DSTATE), dim=2)
    x = x.unflatten(2, (NHEADS, HEADDIM))
    y, _ = recurrence(x, dt + v["dt_bias"], v["A"], B[:, :, None], C[:, :, None])
    if "D" in v:
        y = y + v["D"][:, None] * x
    gated = y.flatten(2) * torch.nn.functional.silu(z)
    return gated * torch.rsqrt(gated.square().mean(2, keepdim=True) + EPS) * v["norm_weight"]


def _results(y: torch.Tensor, gradients: Tensors) -> Tensors:
    parts = gradients.pop("dzxbcdt").split(tuple(PARTS.values()), dim=2)
    return {"y": y.detach(), **dict(zip(PARTS, parts, strict=True)), **gradients}


def exact_results(inputs: Tensors, dy: torch.Tensor) -> Tensors:
    """y and, by automatic differentiation, the gradients."""
    v = {name: value.double().requires_grad_() for name, value in inputs.items()}
    y = _block(v)
    return _results(y, {f"d{n}": g for n, g in zip(v, torch.autograd.grad(y, list(v.values()), dy.double()))})


def _ours(inputs: Tensors, dy: torch.Tensor) -> Tensors:
    *given, D, norm_weight = (inputs.get(name) for name in ("zxbcdt", *PARAMETERS))
    y = statescan.mamba2_scan(*given, D=D, norm_weight=norm_weight, eps=EPS)
    gradients = statescan.mamba2_scan_backward(*given, dy, D=D, norm_weight=norm_weight, eps=EPS)
    return _results(y, {f"d{name}": g for name, g in zip(("zxbcdt", *PARAMETERS), gradients)})


def _mamba_ssm(inputs: Tensors, dy: torch.Tensor) -> Tensors:
    """Its fused op always has D: zero for none."""
    v = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    y = mamba_ssm_block.mamba2_scan(**{"D": torch.zeros_like(v["A"])} | v, ngroups=1, eps=EPS, norm_before_gate=False)
    return _results(y, {f"d{n}": g for n, g in zip(v, torch.autograd.grad(y, list(v.values()), dy))})


def measure(kind: str, dtype: torch.dtype, seqlen: int, device: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Who, and how far each of its results is off, on one draw of the inputs."""
    inputs, dy = _inputs(kind, dtype, seqlen, device)
    exact = exact_results(inputs, dy)
    for by, block in (("statescan", _ours), ("mamba-ssm", _mamba_ssm)):
        if by == "mamba-ssm" and not mamba_ssm_block.installed():
            return
        got = block(inputs, dy)
        unit = lambda name, right: (right.to(dtype) - right).norm() if name in ROUNDED else right.norm()
        yield by, {name: ((got[name] - right).norm() / unit(name, right)).item() for name, right in exact.items()}


def _table(found: dict[tuple[str, str], list[dict[str, float]]], names: tuple[str, ...], form: str) -> str:
    rows = []
    for (kind, by), draws in found.items():
        each = [[draw[name] for draw in draws if name in draw] for name in names]
        rows.append((kind, by, *(f"{statistics.median(v):{form}} ({max(v):{form}})" if v else "" for v in each)))
    return tabulate(rows, ("inputs", "by", *names), tablefmt="github", disable_numparse=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m statescan.bench.bench_mamba2_scan_accuracy", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default %(default)s")
    parser.add_argument("--draws", type=int, default=5, help="of the inputs; default %(default)s")
    parser.add_argument("--seqlen", type=int, default=SEQLEN, help="default %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(arguments)

    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for kind in KINDS:
        for draw in range(args.draws):
            torch.manual_seed(draw)
            for by, errors in measure(kind, getattr(torch, args.dtype), args.seqlen, args.device):
                found.setdefault((kind, by), []).append(errors)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    convolution = f", its convolution {mamba_ssm_block.convolution()}'s" if mamba_ssm_block.installed() else ""
    print(f"{device}, torch {torch.__version__}{convolution}")
    print(f"{args.dtype}, b{BATCH} l{args.seqlen} h{NHEADS} p{HEADDIM} g1 n{DSTATE}, median (largest) of {args.draws} draws\n")
    print(f"In roundings\n\n{_table(found, ROUNDED, '.2f')}\n")
    print(f"Relative\n\n{_table(found, tuple(f'd{name}' for name in PARAMETERS), '.1e')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
