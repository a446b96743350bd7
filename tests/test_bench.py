"""The benchmark command: it checks before it times, and says what it measured on what."""

import argparse
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import statescan
from statescan import bench
from statescan.__main__ import main as statescan_main
from statescan.bench import cli, harness


def run(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.main(parser.parse_args(arguments))


def benchmark_of(op):
    return importlib.import_module(f"statescan.bench.bench_{op}").BENCHMARK


def test_quick_run_writes_json(tmp_path, capsys):
    path = tmp_path / "rows.json"
    before = statescan.num_threads()
    code = statescan_main(
        ["bench", "--op", "causal_conv1d", "--device", "cpu", "--quick", "--threads", "1", "--json", str(path)]
    )
    assert code == 0
    assert statescan.num_threads() == before
    found = json.loads(path.read_text())
    assert {"versions", "isa", "platform", "commit", "date", "variables"} <= found["environment"].keys()
    (machine,) = found["machines"]
    assert machine["device"] == "cpu" and machine["name"].endswith(", 1 thread")
    assert machine["copy_gbps"] > 0 and machine["matmul_gflops"]["float32"] > 0
    assert len(found["rows"]) == 2
    for row in found["rows"]:
        assert row["op"] == "causal_conv1d" and row["status"] == "ok" and row["implementation"] == "statescan"
        assert row["kernel"] == statescan.cpu_isa()
        assert 0 <= row["error"] <= 1e-5
        assert 0 < row["best_us"] <= row["median_us"]
        assert {"case", "sizes", "dtype", "device", "spread_us", "repeats", "bytes", "flops", "gbps", "gflops"} <= row.keys()
        assert row["share_of_floor"] == pytest.approx(row["floor_us"] / row["median_us"])
    assert "causal_conv1d" in capsys.readouterr().out


@pytest.mark.parametrize("op", cli.OPS)
def test_every_op_passes_its_check(op):
    device = harness.Cpu()
    benchmark = benchmark_of(op)
    assert benchmark.op == op
    for case in benchmark.cases:
        if case.quick:
            arrays = harness.prepare(benchmark, case, "float32", device)
            assert harness.verify(benchmark, case, "float32", device, arrays) < 1e-5


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    right = statescan.gated_rms_norm
    monkeypatch.setattr(statescan, "gated_rms_norm", lambda *a, **k: right(*a, **k) * np.float32(1.001))
    assert run("--op", "gated_rms_norm", "--device", "cpu", "--quick") == 1
    assert "wrong: y is off by 0.001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("package", "option", "install"),
    [("matplotlib", ("--plot", "times.png"), "pip install 'statescan[plot]'"), ("torch", ("--peers",), "pip install torch")],
)
def test_what_is_missing_is_named(monkeypatch, capsys, tmp_path, package, option, install):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert run("--op", "gated_rms_norm", "--device", "cpu", "--quick", *option) == 2
    message = capsys.readouterr().err
    assert f"{option[0]} needs {package}" in message and install in message
    assert not list(tmp_path.iterdir())


def test_plot_draws_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "times.png"
    assert run("--op", "gated_rms_norm", "--device", "cpu", "--quick", "--plot", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_cuda_is_said(capsys):
    if statescan.info()["cuda_devices"]:
        pytest.skip("this machine has CUDA")
    assert run("--device", "cuda", "--quick") == 2
    assert "--device cuda: off" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["ssd_scan", "selective_scan"])
def test_plain_torch_peers_agree(op):
    pytest.importorskip("torch")
    from statescan.bench import peers

    machine = harness.Machine(harness.Cpu())
    benchmark = benchmark_of(op)
    (case,) = [case for case in benchmark.cases if case.quick]
    arrays = harness.prepare(benchmark, case, "float32", machine.device)
    found = peers.peers_of(op, "cpu")
    assert found
    for peer in found:
        assert peers.disagreement(peer, benchmark, case, "float32", machine, arrays) < 1e-5, peer.name


def test_host_time_covers_the_decode_ops(capsys):
    from statescan.bench import host_time

    def zeros(*shape):
        return np.zeros(shape, np.float32)

    ops = {op: call for op, _, call in host_time._calls(zeros, np.zeros(1, np.int32))}
    assert set(ops) == {"selective_state_update", "causal_conv1d_update", "mamba2_update"}
    for call in ops.values():
        assert 0 < host_time.microseconds(call, loops=2, repeats=2) < 1e5


def test_torch_overhead_covers_the_differentiable_ops():
    pytest.importorskip("torch")
    from statescan._plan import BACKWARD_OPS
    from statescan.bench import torch_overhead

    rows = torch_overhead.measure("cpu", rounds=1, loops=1, repeats=1)
    assert {f"{row['op']}_backward" for row in rows} == set(BACKWARD_OPS)


@pytest.mark.parametrize(
    "op,sizes",
    (("ssd_scan", ("nheads=2", "headdim=8", "dstate=4")), ("selective_scan", ("dim=6", "dstate=3"))),
    ids=("ssd_scan", "selective_scan"),
)
def test_training_step_beside_autograd(op, sizes):
    """Every implementation in a process of its own; the command fails where gradients disagree."""
    pytest.importorskip("torch")
    command = [sys.executable, "-m", f"statescan.bench.bench_{op}_training", "--seqlen=70", "--seconds=0", "--threads=1"]
    done = subprocess.run([*command, *(f"--{size}" for size in sizes)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[2].startswith("| statescan") and len(rows) > 3


@pytest.fixture
def mamba_ssm():
    """mamba-ssm's names, served by compat: its arithmetic is ours, the calls are the benchmark's."""
    pytest.importorskip("torch")
    from statescan import compat

    compat.install()
    yield
    compat.uninstall()


def test_training_step_beside_mamba_ssm(mamba_ssm, tmp_path, capsys):
    from statescan.bench import bench_training_step

    file = tmp_path / "steps.json"
    options = ["--model=tiny", "--batch=2", "--seqlen=100", "--steps=2", "--device=cpu", f"--json={file}"]
    assert bench_training_step.main(options) == 0
    printed = capsys.readouterr().out
    assert "| tiny    | statescan" in printed and "| tiny    | mamba-ssm" in printed
    ours, peer = json.loads(file.read_text())["runs"]
    assert ours["losses"] == pytest.approx(peer["losses"], rel=1e-5)
    assert ours["losses"][-1] < ours["losses"][0]


def test_mamba_ssm_block_with_states(mamba_ssm):
    """Put together from mamba-ssm's parts it is our op: results, states, and gradients through both."""
    import torch
    from statescan.bench import mamba_ssm_block
    from statescan.torch import mamba2_scan

    torch.manual_seed(0)
    nheads, headdim, ngroups, dstate, width = 4, 8, 2, 6, 4
    d_inner, conv_dim = nheads * headdim, nheads * headdim + 2 * ngroups * dstate
    shapes = {
        "zxbcdt": (2, 50, d_inner + conv_dim + nheads), "conv_weight": (conv_dim, width), "conv_bias": (conv_dim,),
        "dt_bias": (nheads,), "A": (nheads,), "D": (nheads,), "norm_weight": (d_inner,),
        "initial_conv_state": (2, conv_dim, width - 1), "initial_state": (2, nheads, headdim, dstate),
    }  # fmt: skip
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors["A"] = -tensors["A"].exp()
    found = []
    for block in (mamba2_scan, mamba_ssm_block.mamba2_scan):
        a = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        results = block(**a, ngroups=ngroups, eps=1e-5, norm_before_gate=False, return_final_states=True)
        sum((result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum() for result in results).backward()
        found.append((*results, *(tensor.grad for tensor in a.values())))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_accuracy_of_a_block_beside_mamba_ssm(mamba_ssm, capsys):
    """The CPU, which rounds nothing on the way, is one rounding off."""
    import torch
    from statescan.bench import bench_mamba2_scan_accuracy as bench

    for kind in bench.KINDS:
        found = dict(bench.measure(kind, torch.bfloat16, 30, "cpu"))
        assert list(found) == ["statescan", "mamba-ssm"]
        for errors in found.values():
            assert errors.keys() >= {*bench.ROUNDED, "dA", "dconv_weight", "dnorm_weight"}
            for name, error in errors.items():
                assert 0.95 < error < 1.05 if name in bench.ROUNDED else error < 1e-5, name
    assert bench.main(["--device=cpu", "--draws=1", "--seqlen=5"]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(f"| {kind} ") == 4 for kind in bench.KINDS) and "In roundings" in printed


def test_our_convolution_in_mamba_ssm_s_fused_op():
    torch = pytest.importorskip("torch")
    from statescan.bench import mamba_ssm_block
    from statescan.torch import causal_conv1d

    torch.manual_seed(0)
    x, dy = torch.randn(2, 2, 5, 30).unbind()  # channels first
    weight, bias = torch.randn(5, 4, requires_grad=True), torch.randn(5, requires_grad=True)
    x.requires_grad_()
    y = causal_conv1d(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    torch.testing.assert_close(mamba_ssm_block._convolve(x, weight, bias, None, None, None, True), y)
    got = mamba_ssm_block._convolve_backward(x, weight, bias, dy, None, None, None, None, False, True)
    for one, other in zip(got, torch.autograd.grad(y, (x, weight, bias), dy), strict=True):
        torch.testing.assert_close(one, other)
