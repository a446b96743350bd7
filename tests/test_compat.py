"""statescan.compat: the peers' functions against the formulae that they document, and what install() does to imports."""

import importlib.metadata
import inspect
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import support

torch = pytest.importorskip("torch")

import statescan.compat
from reference import compat as reference
from statescan.compat import _finder, _packing
from statescan.compat.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update
from statescan.compat.causal_conv1d_varlen import causal_conv1d_varlen_states
from statescan.compat.layernorm_gated import RMSNorm, layernorm_fn, rmsnorm_fn
from statescan.compat.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from statescan.compat.selective_state_update import selective_state_update
from statescan.compat.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

EXACT = {torch.complex64: torch.complex128}


# ---- comparing ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def make(device):
    """make(2, 3): a float32 tensor of that shape, normally distributed; make(2, 3, low=.., high=..): uniformly."""
    generator = torch.Generator().manual_seed(20240531)

    def tensor(*shape, low=None, high=None, dtype=torch.float32):
        if low is not None:
            values = torch.rand(shape, generator=generator, dtype=torch.float64).mul(high - low).add(low)
        else:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(device.name, dtype)

    return tensor


def exact(value):
    if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
        return value.detach().to(EXACT.get(value.dtype, torch.float64))
    return value


def close(got, expected, name="out"):
    """By the accuracy gate of float32, or of the narrower dtype of `got`."""
    dtype = str(got.dtype).removeprefix("torch.")
    got, expected = (v.detach().resolve_conj().cpu().numpy() for v in (exact(got), expected))
    assert got.shape == expected.shape and np.isfinite(got).all(), name
    error, limit = support.relative_error(got, expected), support.gate(expected, dtype)
    assert error <= limit, f"{name}: relative error {error:.3g} above {limit:.3g}"


def call(function, *args, **kwargs):
    """A test of what has no CUDA kernel is skipped."""
    try:
        return function(*args, **kwargs)
    except NotImplementedError as missing:
        if "CUDA" not in str(missing):
            raise
        pytest.skip(str(missing))


def check(function, oracle, arguments, gradients=True, **options):
    """Outputs of a function and gradients of its floating-point arguments, against the oracle's.

    options go to the function alone, for what the formula does not depend on.
    """
    leaves = {}
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            leaves[key] = value.detach().clone(memory_format=torch.preserve_format).requires_grad_(gradients)
    device = next(iter(leaves.values())).device
    arguments, options = (
        {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in a.items()} for a in (arguments, options)
    )
    got = call(function, **{**arguments, **leaves}, **options)
    got = got if isinstance(got, tuple) else (got,)
    twins = {key: exact(value).requires_grad_(gradients) for key, value in leaves.items()}
    expected = oracle(**{**arguments, **twins})
    expected = expected if isinstance(expected, tuple) else (expected,)
    for index, (ours, theirs) in enumerate(zip(got, expected)):
        close(ours, theirs, f"output {index}")
    if not gradients:
        return
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=y.dtype).to(device) for y in got]
    ours = call(torch.autograd.grad, got, list(leaves.values()), cotangents, allow_unused=True)
    theirs = torch.autograd.grad(expected[: len(got)], list(twins.values()), [exact(c) for c in cotangents], allow_unused=True)
    for key, mine, exact_gradient in zip(leaves, ours, theirs):
        assert (mine is None) == (exact_gradient is None), key
        if mine is not None:
            assert mine.dtype == leaves[key].dtype
            close(mine, exact_gradient, f"gradient of {key}")


@pytest.fixture(params=[False, True], ids=["forward", "backward"])
def gradients(request):
    return request.param


def seq_idx_of(*rows):
    """[[3, 2], [1, 4]]: rows of sequences of these lengths."""
    return torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in rows], dtype=torch.int32)


# ---- causal_conv1d -----------------------------------------------------------------------------------------------------
CONV = {
    "base": {},
    "no bias": dict(bias=None),
    "swish": dict(activation="swish"),
    "width 2": dict(width=2),
    "shorter than the window": dict(seqlen=2, states=True),
    "one token": dict(seqlen=1, states=True),
    "states": dict(states=True),
    "channels last": dict(channels_last=True, states=True),
    "sequences": dict(seq_idx=seq_idx_of([5, 8], [2, 11])),
    "sequences of one row": dict(seq_idx=seq_idx_of([1] * 6 + [4, 3]), batch=1),
    "sequences and states": dict(seq_idx=seq_idx_of([5, 8], [12, 1]), states=True),
    "padding": dict(seq_idx=torch.cat([seq_idx_of([4, 5], [8, 1]), torch.full((2, 4), -1)], dim=1)),
}


@pytest.mark.parametrize("case", CONV)
def test_causal_conv1d_fn(case, make, gradients):
    given = dict(CONV[case])
    batch, dim, seqlen, width = given.pop("batch", 2), 5, given.pop("seqlen", 13), given.pop("width", 4)
    x = make(batch, seqlen, dim).transpose(1, 2) if given.pop("channels_last", False) else make(batch, dim, seqlen)
    arguments = dict(x=x, weight=make(dim, width), bias=make(dim), activation="silu")
    options = {}
    if given.pop("states", False):
        arguments["initial_states"] = make(batch, dim, width - 1)
        options["return_final_states"] = True
    check(causal_conv1d_fn, reference.conv, {**arguments, **given}, gradients, **options)


def test_causal_conv1d_fn_writes_final_states_out(make):
    x, weight = make(2, 5, 7), make(5, 3)
    out = x.new_full((2, 5, 2), torch.nan)
    _, final = call(causal_conv1d_fn, x, weight, return_final_states=True, final_states_out=out)
    assert final is out and torch.equal(out, x[:, :, -2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_causal_conv1d_fn_in_narrow_dtypes(make, dtype, weight_dtype):
    arguments = dict(x=make(2, 5, 9, dtype=dtype), weight=make(5, 4, dtype=weight_dtype), bias=make(5, dtype=weight_dtype))
    check(causal_conv1d_fn, reference.conv, {**arguments, "activation": "silu"}, gradients=False)


def test_causal_conv1d_fn_refuses_what_it_does_not_serve(make):
    with pytest.raises(NotImplementedError, match="causal_conv1d_fn: activation='gelu'; expected None, 'silu' or 'swish'"):
        causal_conv1d_fn(make(1, 2, 3), make(2, 4), activation="gelu")
    with pytest.raises(ValueError, match=r"seq_idx has shape \(1, 2\); expected \(batch, seqlen\) = \(1, 3\)"):
        causal_conv1d_fn(make(1, 2, 3), make(2, 4), seq_idx=torch.zeros(1, 2, dtype=torch.int32))


def conv_update(x, conv_state, weight, bias, cache_seqlens=None, conv_state_indices=None):
    """The reference: one token at a time, each row's past as a list. Returns the output and the new states."""
    tokens = x[..., None] if x.dim() == 2 else x
    out, after = torch.zeros_like(tokens), conv_state.clone()
    batch, _, seqlen = tokens.shape
    before, state_len = weight.shape[1] - 1, conv_state.shape[2]
    for row in range(batch):
        slot = row if conv_state_indices is None else int(conv_state_indices[row])
        if slot < 0:
            continue
        start = 0 if cache_seqlens is None else int(cache_seqlens[row])
        turned = torch.roll(after[slot], -(start % state_len), dims=1)  # oldest first
        past = turned[:, state_len - before :]
        out[row] = reference.conv(tokens[row : row + 1], weight, bias, None, past[None], "silu")[0][0]
        latest = torch.cat([turned, tokens[row]], dim=1)[:, -state_len:]
        after[slot] = latest if cache_seqlens is None else torch.roll(latest, (start + seqlen) % state_len, dims=1)
    return (out[..., 0] if x.dim() == 2 else out), after


@pytest.mark.parametrize("indices", [None, [3, -1, 0], [2, 1, 4]], ids=["rows", "padded", "slots"])
@pytest.mark.parametrize("circular", [False, True], ids=["shifted", "circular"])
@pytest.mark.parametrize("state_len", [3, 4, 7])
@pytest.mark.parametrize("seqlen", [None, 1, 2, 5, 9])
def test_causal_conv1d_update(make, device, indices, circular, state_len, seqlen):
    batch, dim = 3, 6
    x = make(batch, dim) if seqlen is None else make(batch, seqlen, dim).transpose(1, 2)
    state = make(batch if indices is None else 5, dim, state_len)
    weight, bias = make(dim, 4), make(dim)
    options = {}
    if indices is not None:
        options["conv_state_indices"] = torch.tensor(indices, dtype=torch.int32, device=device.name)
    if circular:
        options["cache_seqlens"] = torch.tensor([0, 11, 5], dtype=torch.int32, device=device.name)
    expected, after = conv_update(exact(x), exact(state), exact(weight), exact(bias), **options)
    out = call(causal_conv1d_update, x, state, weight, bias, "silu", **options)
    close(out, expected)
    close(state, after, "conv_state")


def test_causal_conv1d_update_with_gradients(make, gradients):
    x, state, weight, bias = make(3, 6), make(5, 6, 4), make(6, 4), make(6)
    slots = torch.tensor([4, -1, 2], device=x.device)

    def oracle(x, weight, bias):
        return conv_update(x, exact(state), weight, bias, None, slots)[0]

    def step(x, weight, bias):
        return causal_conv1d_update(x, state.clone(), weight, bias, "silu", None, slots)

    check(step, oracle, dict(x=x, weight=weight, bias=bias), gradients)


def test_causal_conv1d_update_refuses_a_short_state(make):
    with pytest.raises(ValueError, match="conv_state holds 2 inputs; expected width - 1 = 3 or more"):
        causal_conv1d_update(make(1, 2), make(1, 2, 2), make(2, 4))


def test_causal_conv1d_varlen_states(make):
    x, bounds = make(20, 5), [0, 0, 7, 9, 9, 20]
    for state_len in (1, 3, 8):
        states = causal_conv1d_varlen_states(x, torch.tensor(bounds, dtype=torch.int32, device=x.device), state_len)
        assert states.shape == (5, 5, state_len)
        for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
            expected = x.new_zeros(state_len, 5)
            inside = x[max(begin, end - state_len) : end]
            expected[state_len - len(inside) :] = inside
            assert torch.equal(states[i].T, expected)
    empty = causal_conv1d_varlen_states(x[:0], torch.zeros(3, dtype=torch.int32, device=x.device), 3)
    assert torch.equal(empty, x.new_zeros(2, 5, 3))


# ---- the Mamba-1 scan --------------------------------------------------------------------------------------------------
SELECTIVE = {
    "base": {},
    "no options": dict(D=None, z=None, delta_bias=None, delta_softplus=False),
    "two groups": dict(B=(2, 2, 4, 11), C=(2, 2, 4, 11)),
    "three axes": dict(B=(2, 4, 11), C=(2, 4, 11)),
    "same for all tokens": dict(B=(6, 4), C=(6, 4)),
    "one of them": dict(B=(6, 4)),
    "one token": dict(seqlen=1),
    "channels last": dict(channels_last=True),
}


def selective_arguments(make, seqlen=11, channels_last=False, **given):
    batch, dim, dstate = 2, 6, 4

    def sequence(low=None, high=None):
        if channels_last:
            return make(batch, seqlen, dim, low=low, high=high).transpose(1, 2)
        return make(batch, dim, seqlen, low=low, high=high)

    arguments = dict(
        u=sequence(), delta=sequence(-3, 1), A=-make(dim, dstate, low=0.5, high=4), B=make(batch, 1, dstate, seqlen),
        C=make(batch, 1, dstate, seqlen), D=make(dim), z=sequence(), delta_bias=make(dim, low=-1, high=0), delta_softplus=True,
    )  # fmt: skip
    for key, value in given.items():
        arguments[key] = make(*value) if isinstance(value, tuple) else value
    if not arguments["delta_softplus"]:
        arguments["delta"] = sequence(0.01, 0.5)
    return arguments


@pytest.mark.parametrize("last", [False, True], ids=["", "last state"])
@pytest.mark.parametrize("case", SELECTIVE)
def test_selective_scan_fn(case, last, make, gradients):
    options = dict(return_last_state=True) if last else {}
    check(selective_scan_fn, reference.selective_scan, selective_arguments(make, **SELECTIVE[case]), gradients, **options)


@pytest.mark.parametrize("shape", [(2, 4, 22), (2, 3, 4, 22), (6, 4)], ids=["three axes", "groups", "same for all tokens"])
def test_selective_scan_fn_with_a_complex_A(shape, make, gradients):
    arguments = selective_arguments(make)
    arguments["A"] = torch.complex(arguments["A"], make(6, 4))
    varying = len(shape) > 2
    for name in ("B", "C"):
        arguments[name] = make(*shape) if varying else torch.complex(make(*shape), make(*shape))
    check(selective_scan_fn, reference.selective_scan, arguments, gradients, return_last_state=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_selective_scan_fn_in_narrow_dtypes(make, dtype):
    arguments = selective_arguments(make)
    for name in ("u", "delta", "B", "C", "z", "D"):
        arguments[name] = arguments[name].to(dtype)
    check(selective_scan_fn, reference.selective_scan, arguments, gradients=False, return_last_state=True)


INNER = {
    "base": {},
    "no biases": dict(conv1d_bias=None, out_proj_bias=None, delta_bias=None, D=None),
    "projection biases": dict(B_proj_bias=(4,), C_proj_bias=(4,)),
    "norms": dict(b_rms_weight=(4,), c_rms_weight=(4,), dt_rms_weight=(6,), b_c_dt_rms_eps=1e-3),
    "given B": dict(B=(6, 4)),
    "given C": dict(C=(2, 1, 4, 9)),
    "complex": dict(complex=True),
}


@pytest.mark.parametrize("case", INNER)
def test_mamba_inner_fn(case, make, gradients):
    given = dict(INNER[case])
    batch, dim, seqlen, dstate, rank = 2, 6, 9, 4, 3
    width = rank + dstate * (4 if "complex" in given else 2)
    arguments = dict(
        xz=make(batch, 2 * dim, seqlen), conv1d_weight=make(dim, 1, 4), conv1d_bias=make(dim),
        x_proj_weight=make(width, dim), delta_proj_weight=make(dim, rank), out_proj_weight=make(5, dim),
        out_proj_bias=make(5), A=-make(dim, dstate, low=0.5, high=4), D=make(dim), delta_bias=make(dim, low=-3, high=-1),
    )  # fmt: skip
    if given.pop("complex", False):
        arguments["A"] = torch.complex(arguments["A"], make(dim, dstate))
    for key, value in given.items():
        arguments[key] = make(*value) if isinstance(value, tuple) else value
    check(mamba_inner_fn, reference.mamba_inner, arguments, gradients, checkpoint_lvl=0)


# ---- the Mamba-2 scan --------------------------------------------------------------------------------------------------
def chunk_arguments(make, batch=2, seqlen=13, **given):
    nheads, headdim, ngroups, dstate = 4, 3, 2, 5
    arguments = dict(
        x=make(batch, seqlen, nheads, headdim), dt=make(batch, seqlen, nheads, low=-3, high=1),
        A=-make(nheads, low=0.5, high=4), B=make(batch, seqlen, ngroups, dstate), C=make(batch, seqlen, ngroups, dstate),
        D=make(nheads), z=make(batch, seqlen, nheads, headdim), dt_bias=make(nheads, low=-1, high=0), dt_softplus=True,
    )  # fmt: skip
    for key, value in given.items():
        arguments[key] = make(*value) if isinstance(value, tuple) and key != "dt_limit" else value
    return arguments


CHUNK = {
    "base": {},
    "no options": dict(D=None, z=None, dt_bias=None, dt_softplus=False),
    "D of each channel": dict(D=(4, 3)),
    "limit": dict(dt_limit=(0.1, 0.6)),
    "initial state": dict(initial_states=(2, 4, 3, 5)),
    "sequences": dict(seq_idx=seq_idx_of([5, 8], [2, 11])),
    "sequences and initial state": dict(seq_idx=seq_idx_of([4, 4, 5], [12, 1]), initial_states=(2, 4, 3, 5)),
    "sequences of one row": dict(batch=1, seq_idx=seq_idx_of([1, 1, 11]), initial_states=(1, 4, 3, 5)),
}


@pytest.mark.parametrize("final", [False, True], ids=["", "final states"])
@pytest.mark.parametrize("case", CHUNK)
def test_mamba_chunk_scan_combined(case, final, make, gradients):
    arguments = chunk_arguments(make, **CHUNK[case])
    options = dict(return_final_states=True) if final else {}
    check(mamba_chunk_scan_combined, reference.chunk_scan, arguments, gradients, chunk_size=4, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mamba_chunk_scan_combined_in_narrow_dtypes(make, dtype):
    arguments = chunk_arguments(make, initial_states=(2, 4, 3, 5))
    for name in ("x", "dt", "B", "C", "z", "D", "dt_bias"):
        arguments[name] = arguments[name].to(dtype)
    check(mamba_chunk_scan_combined, reference.chunk_scan, arguments, False, chunk_size=256, return_final_states=True)


@pytest.mark.parametrize("with_seq_idx", [False, True], ids=["", "seq_idx"])
def test_varlen_states(with_seq_idx, make, gradients):
    lengths = [4, 0, 6, 3]
    bounds = torch.tensor([0, 4, 4, 10, 13], dtype=torch.int32)
    arguments = chunk_arguments(make, batch=1, initial_states=(1, 4, 3, 5))

    def oracle(initial_states, **arguments):
        outs, states = [], []
        for begin, end in zip(bounds, bounds[1:]):
            of_sequence = {
                key: value[:, begin:end] if key in ("x", "dt", "B", "C", "z") else value for key, value in arguments.items()
            }
            out, state = reference.chunk_scan(**of_sequence, initial_states=initial_states if begin == 0 else None)
            outs.append(out)
            states.append(state)
        return torch.cat(outs, 1), states[-1], torch.cat(states)

    check(
        mamba_chunk_scan_combined, oracle, arguments, gradients, chunk_size=8, cu_seqlens=bounds, return_final_states=True,
        return_varlen_states=True, seq_idx=seq_idx_of(lengths) if with_seq_idx else None,
    )  # fmt: skip
    inputs = {key: value for key, value in arguments.items() if key != "initial_states"}
    bounds = bounds.to(inputs["x"].device)
    with torch.no_grad():
        out, states = mamba_chunk_scan_combined(**inputs, chunk_size=8, cu_seqlens=bounds, return_varlen_states=True)
        assert states.shape[0] == len(lengths) and not states[1].any()
        assert torch.equal(out, mamba_chunk_scan_combined(**inputs, chunk_size=8, cu_seqlens=bounds))


def test_mamba_chunk_scan_combined_refuses(make):
    arguments = chunk_arguments(make)
    with pytest.raises(ValueError, match="return_varlen_states needs cu_seqlens"):
        mamba_chunk_scan_combined(**arguments, chunk_size=4, return_varlen_states=True)
    with pytest.raises(ValueError, match="cu_seqlens needs a batch of one; x has a batch of 2"):
        mamba_chunk_scan_combined(**arguments, chunk_size=4, cu_seqlens=torch.tensor([0, 13]))


def test_seq_idx_is_read_once(make):
    seq_idx = seq_idx_of([5, 8], [2, 11])
    packing = _packing.packing_of(seq_idx, "op", 2, 13)
    assert packing.cu_seqlens.tolist() == [0, 5, 13, 15, 26]
    assert packing.first.tolist() == [0, 2] and packing.last.tolist() == [1, 3]
    assert _packing.packing_of(seq_idx, "op", 2, 13) is packing
    seq_idx[0] = 0
    assert _packing.packing_of(seq_idx, "op", 2, 13).cu_seqlens.tolist() == [0, 13, 15, 26]
    view = packing.pack(make(2, 13, 6)[..., 2:5])
    assert view.shape == (1, 26, 3) and view.stride() == (156, 6, 1)  # a slice of channels is no copy


BLOCK = {
    "base": {},
    "norm before gate": dict(norm_before_gate=True),
    "no norm": dict(rmsnorm_weight=None, rmsnorm_eps=None),
    "no activation": dict(activation=None),
    "no activation, no norm": dict(activation=None, rmsnorm_weight=None),
    "no out_proj": dict(outproj_weight=None, outproj_bias=None),
    "no bias": dict(conv1d_bias=None, outproj_bias=None),
    "D of each channel": dict(D=(4, 3), headdim=None),
    "gated MLP beside it": dict(d_mlp=2),
    "limit": dict(dt_limit=(0.1, 0.6)),
    "initial state": dict(initial_states=(2, 4, 3, 5)),
    "sequences": dict(seq_idx=seq_idx_of([5, 6], [1, 10]), initial_states=(2, 4, 3, 5)),
    "padding": dict(seq_idx=torch.cat([seq_idx_of([4, 5], [8, 1]), torch.full((2, 2), -1)], dim=1), d_mlp=2),
}


@pytest.mark.parametrize("final", [False, True], ids=["", "final states"])
@pytest.mark.parametrize("case", BLOCK)
def test_mamba_split_conv1d_scan_combined(case, final, make, gradients):
    given = dict(BLOCK[case])
    batch, seqlen, nheads, headdim, ngroups, dstate = 2, 11, 4, 3, 2, 5
    dim, conv_dim, d_mlp = nheads * headdim, nheads * headdim + 2 * ngroups * dstate, given.pop("d_mlp", 0)
    arguments = dict(
        zxbcdt=make(batch, seqlen, 2 * d_mlp + dim + conv_dim + nheads), conv1d_weight=make(conv_dim, 4),
        conv1d_bias=make(conv_dim), dt_bias=make(nheads, low=-3, high=-1), A=-make(nheads, low=0.5, high=4), D=make(nheads),
        rmsnorm_weight=make(dim), outproj_weight=make(7, d_mlp + dim), outproj_bias=make(7), headdim=headdim,
        ngroups=ngroups, norm_before_gate=False, activation="silu",
    )  # fmt: skip
    for key, value in given.items():
        arguments[key] = make(*value) if isinstance(value, tuple) and key != "dt_limit" else value
    options = dict(return_final_states=True) if final else {}
    check(mamba_split_conv1d_scan_combined, reference.split_conv1d_scan, arguments, gradients, chunk_size=8, **options)


def test_mamba_split_conv1d_scan_combined_refuses(make):
    arguments = dict(
        zxbcdt=make(1, 2, 23), conv1d_weight=make(12, 4), conv1d_bias=None, dt_bias=make(2), A=-make(2).abs(), D=make(2),
        chunk_size=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"headdim is needed with a D of shape \(2,\)"):
        mamba_split_conv1d_scan_combined(**arguments)
    with pytest.raises(ValueError, match=r"zxbcdt has 23 channels; expected dim \+ conv_dim \+ nheads = 8 \+ 12 \+ 2"):
        mamba_split_conv1d_scan_combined(**arguments, headdim=4)
    with pytest.raises(ValueError, match="outproj_bias needs outproj_weight"):
        mamba_split_conv1d_scan_combined(**arguments, headdim=4, outproj_bias=make(3))


# ---- the decode step ---------------------------------------------------------------------------------------------------
def state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
    """The reference. Returns the output and the new states."""
    one_head = lambda v, axis, ndim: v if v is None or v.dim() == ndim else v.unsqueeze(axis)
    after = state.clone()
    states = after if state.dim() == 4 else after[:, None]
    shape, nheads = x.shape, states.shape[1]
    x, dt, z, B, C = (one_head(v, 1, 3) for v in (x, dt, z, B, C))
    A, D, dt_bias = one_head(A, 0, 3), one_head(D, 0, 2), one_head(dt_bias, 0, 2)
    B, C = (v.repeat_interleave(nheads // v.shape[1], dim=1)[:, None] for v in (B, C))
    out = torch.zeros_like(x)
    for row in range(shape[0]):
        slot = row if state_batch_indices is None else int(state_batch_indices[row])
        if slot >= 0:
            take = lambda v: None if v is None else v[row : row + 1, None]
            y, last = reference.scan(
                take(x), take(dt), A, B[row : row + 1], C[row : row + 1], D, take(z), dt_bias, dt_softplus,
                initial=states[slot : slot + 1].clone(),
            )  # fmt: skip
            out[row] = y[0, 0]
            states[slot] = last[0]
    return out.view(shape), after


def update_arguments(make, kind, slots=3):
    batch, nheads, dim, dstate = 3, 4, 5, 6
    if kind == "Mamba-1":
        return dict(
            state=make(slots, dim, dstate), x=make(batch, dim), dt=make(batch, dim, low=-3, high=1),
            A=-make(dim, dstate, low=0.5, high=4), B=make(batch, dstate), C=make(batch, dstate), D=make(dim), z=make(batch, dim),
            dt_bias=make(dim), dt_softplus=True,
        )  # fmt: skip
    arguments = dict(
        state=make(slots, nheads, dim, dstate), x=make(batch, nheads, dim), dt=make(batch, nheads, dim, low=-3, high=1),
        A=-make(nheads, dim, dstate, low=0.5, high=4), B=make(batch, 2, dstate), C=make(batch, 2, dstate), D=make(nheads, dim),
        z=make(batch, nheads, dim), dt_bias=make(nheads, dim), dt_softplus=True,
    )  # fmt: skip
    if kind != "each channel":
        arguments.update(
            dt=make(batch, nheads, low=-3, high=1)[..., None].expand(-1, -1, dim),
            A=-make(nheads, low=0.5, high=4)[:, None, None].expand(-1, dim, dstate),
            dt_bias=make(nheads)[:, None].expand(-1, dim),
        )
    if kind == "Mamba-2, D of each head":
        arguments["D"] = make(nheads)[:, None].expand(-1, dim)
    return arguments


KINDS = ["Mamba-1", "Mamba-2", "Mamba-2, D of each head", "each channel"]


@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("dt_bias",), ("dt_softplus", "dt_bias", "D", "z")])
@pytest.mark.parametrize("indices", [None, [4, -1, 0], [1, 3, 2]], ids=["rows", "padded", "slots"])
@pytest.mark.parametrize("kind", KINDS)
def test_selective_state_update(kind, indices, without, make, device):
    arguments = update_arguments(make, kind, slots=3 if indices is None else 5)
    arguments = {key: value for key, value in arguments.items() if key not in without}
    if "dt_softplus" in without:
        arguments["dt"] = make(*arguments["dt"].shape, low=0.01, high=0.5)
    if indices is not None:
        arguments["state_batch_indices"] = torch.tensor(indices, dtype=torch.int32, device=device.name)
    expected, after = state_update(**{key: exact(value) for key, value in arguments.items()})
    close(call(selective_state_update, **arguments), expected)
    close(arguments["state"], after, "state")


@pytest.mark.parametrize("kind", KINDS)
def test_selective_state_update_with_gradients(kind, make, gradients):
    arguments = update_arguments(make, kind, slots=5)
    state = arguments.pop("state")
    slots = torch.tensor([4, -1, 0], device=state.device)

    def step(**arguments):
        return selective_state_update(state.clone(), **arguments, state_batch_indices=slots)

    def oracle(**arguments):
        return state_update(exact(state), **arguments, state_batch_indices=slots)[0]

    check(step, oracle, arguments, gradients)


def test_selective_state_update_of_a_strided_cache(make):
    arguments = update_arguments(make, "each channel")
    cache = make(3, 5, 4, 6)
    arguments["state"] = cache.transpose(1, 2)  # heads and channels cannot be one axis of a view
    expected, after = state_update(**{key: exact(value) for key, value in arguments.items()})
    close(call(selective_state_update, **arguments), expected)
    close(cache.transpose(1, 2), after, "state")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_selective_state_update_in_bfloat16(state_dtype, make):
    arguments = update_arguments(make, "Mamba-2")
    for name in ("x", "dt", "B", "C", "z", "D", "dt_bias"):
        arguments[name] = arguments[name].to(torch.bfloat16)
    arguments["state"] = arguments["state"].to(state_dtype)
    expected, after = state_update(**{key: exact(value) for key, value in arguments.items()})
    close(call(selective_state_update, **arguments), expected)
    close(arguments["state"], after, "state")


# ---- the norm ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("gate", [False, True], ids=["", "gate"])
def test_rmsnorm_fn(gate, bias, norm_before_gate, group_size, make, gradients):
    arguments = dict(
        x=make(2, 7, 12), weight=make(12), bias=make(12) if bias else None, z=make(2, 7, 12) if gate else None, eps=1e-4,
        group_size=group_size, norm_before_gate=norm_before_gate,
    )  # fmt: skip
    check(rmsnorm_fn, reference.rms_norm, arguments, gradients)


def test_rmsnorm_module(make, device):
    module = RMSNorm(12, eps=1e-3, group_size=6, norm_before_gate=False, device=device.name, dtype=torch.bfloat16)
    assert list(module.state_dict()) == ["weight"] and module.weight.dtype == torch.bfloat16 and module.bias is None
    x, z = make(3, 12), make(3, 12)
    with torch.no_grad():
        module.weight.copy_(make(12))
        expected = reference.rms_norm(exact(x), exact(module.weight), None, exact(z), 1e-3, 6, False)
        close(module(x, z), expected)
        module.reset_parameters()
    assert (module.weight == 1).all()


def test_layernorm_fn(make):
    x, weight = make(3, 12), make(12)
    assert torch.equal(layernorm_fn(x, weight, None, is_rms_norm=True), rmsnorm_fn(x, weight, None))
    with pytest.raises(NotImplementedError, match="layernorm_fn: is_rms_norm=False"):
        layernorm_fn(x, weight, None)


# ---- install() ---------------------------------------------------------------------------------------------------------
# The arguments of mamba-ssm 2.3 and causal-conv1d 1.6, in their order; callers pass them by position and by name.
SIGNATURES = {
    causal_conv1d_fn: "x weight bias seq_idx initial_states return_final_states final_states_out activation",
    causal_conv1d_update: "x conv_state weight bias activation cache_seqlens conv_state_indices",
    causal_conv1d_varlen_states: "x cu_seqlens state_len",
    selective_scan_fn: "u delta A B C D z delta_bias delta_softplus return_last_state",
    mamba_inner_fn: "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B C D "
    "delta_bias B_proj_bias C_proj_bias delta_softplus checkpoint_lvl b_rms_weight c_rms_weight dt_rms_weight b_c_dt_rms_eps",
    mamba_chunk_scan_combined: "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus dt_limit "
    "return_final_states return_varlen_states",
    mamba_split_conv1d_scan_combined: "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states seq_idx dt_limit "
    "return_final_states activation rmsnorm_weight rmsnorm_eps outproj_weight outproj_bias headdim ngroups norm_before_gate",
    selective_state_update: "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
    rmsnorm_fn: "x weight bias z eps group_size norm_before_gate",
    layernorm_fn: "x weight bias z eps group_size norm_before_gate is_rms_norm",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signatures(function):
    parameters = inspect.signature(function).parameters.values()
    assert " ".join(p.name for p in parameters) == SIGNATURES[function]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def run(code, *path):
    """Python code in a process of its own, with the folders of `path` in front."""
    setup = f"import sys\nsys.path[:0] = {[str(p) for p in path]!r}\n"
    command = [sys.executable, "-c", setup + textwrap.dedent(code)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


needs_absence = pytest.mark.skipif(
    any(map(statescan.compat._is_installed, _finder.VERSIONS)), reason="mamba-ssm or causal-conv1d is installed"
)


@needs_absence
def test_install_serves_the_imports():
    run(
        """
        import importlib.metadata, importlib.util
        import statescan.compat
        assert "torch" not in sys.modules
        assert importlib.util.find_spec("mamba_ssm") is None
        assert statescan.compat.install() == ("mamba_ssm", "causal_conv1d") == statescan.compat.install()
        assert importlib.util.find_spec("mamba_ssm") and importlib.util.find_spec("causal_conv1d")
        assert importlib.metadata.version("mamba_ssm") == importlib.metadata.version("mamba-ssm") == "2.3.2"
        assert importlib.metadata.version("causal_conv1d") == "1.6.1"
        assert importlib.metadata.packages_distributions()["causal_conv1d"] == ["causal-conv1d"]
        assert "torch" not in sys.modules

        import mamba_ssm, causal_conv1d
        assert mamba_ssm.__version__ == "2.3.2" and causal_conv1d.__version__ == "1.6.1"
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
        from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn as the_same
        from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
        from mamba_ssm import mamba_inner_fn, selective_scan_fn
        from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated, rmsnorm_fn
        assert causal_conv1d_fn is the_same
        assert mamba_ssm.ops.selective_scan_interface.selective_scan_fn is selective_scan_fn
        assert mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined.__module__ == "statescan.compat.ssd_combined"
        assert mamba_ssm.ops.triton.selective_state_update.selective_state_update
        try:
            from mamba_ssm.modules.mamba2 import Mamba2
        except ModuleNotFoundError as missing:
            assert missing.name == "mamba_ssm.modules"
        else:
            raise AssertionError("mamba_ssm.modules is not served")

        statescan.compat.uninstall()
        assert importlib.util.find_spec("mamba_ssm") is None and "mamba_ssm.ops" not in sys.modules
        """
    )


@pytest.fixture
def real_package(tmp_path):
    """A folder in which mamba_ssm is installed."""
    package = tmp_path / "mamba_ssm"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '9.9'\n")
    (package / "ops" / "__init__.py").write_text("")
    metadata = tmp_path / "mamba_ssm-9.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mamba-ssm\nVersion: 9.9\n")
    return tmp_path


@needs_absence
def test_install_leaves_a_real_package_alone(real_package):
    run(
        """
        import importlib.metadata
        import statescan.compat
        assert statescan.compat.install() == ("causal_conv1d",)
        import mamba_ssm, causal_conv1d
        assert mamba_ssm.__version__ == importlib.metadata.version("mamba_ssm") == "9.9"
        try:
            import mamba_ssm.ops.selective_scan_interface
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError("a served module in a real package")
        """,
        real_package,
    )


@needs_absence
def test_force_shadows_a_real_package_until_uninstall(real_package):
    run(
        """
        import importlib.metadata
        import statescan.compat
        import mamba_ssm as real
        import mamba_ssm.ops
        assert statescan.compat.install(force=True) == ("mamba_ssm", "causal_conv1d")
        import mamba_ssm
        assert mamba_ssm is not real and mamba_ssm.__version__ == importlib.metadata.version("mamba_ssm") == "2.3.2"
        import mamba_ssm.ops.selective_scan_interface
        statescan.compat.uninstall()
        import mamba_ssm
        assert mamba_ssm is real and importlib.metadata.version("mamba_ssm") == "9.9"
        assert "mamba_ssm.ops.selective_scan_interface" not in sys.modules and sys.modules["mamba_ssm.ops"] is real.ops
        """,
        real_package,
    )


@needs_absence
def test_a_folder_of_that_name_is_no_installation(tmp_path):
    (tmp_path / "causal_conv1d").mkdir()
    run(
        """
        import statescan.compat
        assert statescan.compat.install() == ("mamba_ssm", "causal_conv1d")
        from causal_conv1d import causal_conv1d_fn
        """,
        tmp_path,
    )


def test_metadata_of_served_packages():
    for package in _finder.VERSIONS:
        distribution = _finder.Distribution(package)
        assert distribution.metadata["Name"] == package.replace("_", "-") and distribution.files is None
    assert importlib.metadata.version("statescan")
