"""Offsets past 2^31 and 2^32 elements, axes past 2^16: in sparse memory, so that it costs none."""

import mmap

import cases
import numpy as np
import pytest
import statescan
from scan_contract import cumulative
from support import Cpu, assert_same_bits
from test_frameworks import every_scan, every_update

CPU = Cpu()
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's value: Python names it from 3.13 on


def far_apart(a, axis, stride):
    """A copy of `a` whose neighbours along `axis` lie `stride` elements apart, in memory that is mapped but not used."""
    inner = a.itemsize * a.size
    size = (a.shape[axis] - 1) * stride * a.itemsize + inner
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except OSError as refusal:
        pytest.skip(f"{size} bytes of sparse memory: {refusal}")
    order = [axis, *(i for i in range(a.ndim) if i != axis)]
    strides, step = [0] * a.ndim, a.itemsize
    for i in reversed(order[1:]):
        strides[i], step = step, step * a.shape[i]
    strides[axis] = stride * a.itemsize
    view = np.ndarray(a.shape, a.dtype, memory, 0, strides)
    view[...] = a
    return view


@every_scan
@pytest.mark.parametrize("stride", (2**31 - 1, 2**31, 2**32))
def test_batches_far_apart(rng, op, stride):
    """known_bugs 1, 2 and 5: a stride of exactly 2^32 becomes 0 in 32 bits."""
    inputs = op.inputs(rng, "bfloat16", seqlen=9)
    plain = op.run(CPU, inputs, **op.options)
    far = {name: far_apart(value, 0, stride) if op.has_rows(name, value) else value for name, value in inputs.items()}
    out = {name: far_apart(np.zeros_like(value), 0, stride) for name, value in plain.items()}
    got = op.run(CPU, far, out, **op.options)
    for name in got:
        assert_same_bits(got[name], plain[name], name)


@every_scan
def test_tokens_far_apart(rng, op):
    """known_bugs 3: packed tokens whose rows reach past 2^32 elements."""
    lengths = [3, 0, 6]
    inputs = op.inputs(rng, "bfloat16", batch=1, seqlen=9, sequences=3)
    options = dict(cu_seqlens=cumulative(lengths), **op.options)
    plain = op.run(CPU, inputs, **options)
    far = {name: far_apart(value, 1, 2**30 + 1) if op.has_tokens(name, value) else value for name, value in inputs.items()}
    out = {name: far_apart(np.zeros_like(value), 0 if name in op.carried else 1, 2**30 + 1) for name, value in plain.items()}
    got = op.run(CPU, far, out, **options)
    for name in got:
        assert_same_bits(got[name], plain[name], name)


@pytest.mark.parametrize("stride", (2**30 + 7, 2**32))
def test_channels_far_apart(rng, stride):
    """known_bugs 3: a channel-major convolution."""
    inputs = cases.causal_conv1d(rng, dim=5)
    plain = cases.CAUSAL_CONV1D.run(CPU, inputs)
    out = {"y": far_apart(np.zeros_like(plain["y"]), 2, stride)}
    got = cases.CAUSAL_CONV1D.run(CPU, {**inputs, "x": far_apart(inputs["x"], 2, stride)}, out)
    assert_same_bits(got["y"], plain["y"], "y")


@every_update
def test_slots_far_apart(rng, op):
    """known_bugs 6: slot index times slot stride past 2^32."""
    inputs = op.inputs(rng, batch=3, slots=5)
    table = np.array([4, -1, 1])
    plain = op.run(CPU, inputs, state_indices=table, **op.options)
    states = {name: far_apart(inputs[name], 0, 2**31 + 3) for name in op.states}
    y = getattr(statescan, op.name)(**{**inputs, **states}, state_indices=table, **op.options)
    assert_same_bits(y, plain["y"], "y")
    for name in states:
        assert_same_bits(states[name], plain[name], name)


def test_norm_rows_far_apart(rng):
    x, z = cases.normal(rng, "float32", 2, 3, 24)
    plain = statescan.gated_rms_norm(x, z)
    out = far_apart(np.zeros_like(x), 0, 2**32)
    statescan.gated_rms_norm(far_apart(x, 0, 2**32), far_apart(z, 0, 2**31), out=out)
    assert_same_bits(out, plain, "y")


# ---- long axes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dim", (65535, 65536, 80000))
def test_many_channels(device, rng, dim):
    """known_bugs 7."""
    cases.CAUSAL_CONV1D.check(device, cases.causal_conv1d(rng, batch=1, seqlen=4, dim=dim), activation="silu")
    cases.SELECTIVE_SCAN.check(
        device, cases.selective_scan(rng, batch=1, seqlen=3, dim=dim, ngroups=1, dstate=2), dt_softplus=True
    )


@pytest.mark.parametrize("batch", (10922, 10923))
def test_many_rows_and_heads(device, rng, batch):
    """known_bugs 8: batch times heads about 2^16."""
    cases.SSD_SCAN.check(
        device, cases.ssd_scan(rng, batch=batch, seqlen=2, nheads=6, headdim=1, ngroups=1, dstate=2), dt_softplus=True
    )
    cases.STATE_SCAN.check(device, cases.state_scan(rng, batch=batch, seqlen=1, nheads=6, headdim=1, dstate=2))


def test_many_heads(device, rng):
    cases.SSD_SCAN.check(
        device, cases.ssd_scan(rng, batch=1, seqlen=3, nheads=65537, headdim=1, ngroups=1, dstate=2), dt_softplus=True
    )


@pytest.mark.parametrize("name", ("causal_conv1d", "ssd_scan", "selective_scan"))
def test_many_sequences(device, rng, name):
    """known_bugs 8: more packed sequences than a grid axis holds."""
    lengths = np.resize([1, 0, 2], 66000)
    op, sizes = {
        "causal_conv1d": (cases.CAUSAL_CONV1D, dict(dim=3)),
        "ssd_scan": (cases.SSD_SCAN, dict(nheads=1, ngroups=1, headdim=1, dstate=2)),
        "selective_scan": (cases.SELECTIVE_SCAN, dict(dim=2, ngroups=1, dstate=2)),
    }[name]
    inputs = op.inputs(rng, batch=1, seqlen=int(lengths.sum()), sequences=len(lengths), **sizes)
    op.check(device, inputs, cu_seqlens=cumulative(lengths), **op.options)
