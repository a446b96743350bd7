import dataclasses

import cases
import numpy as np
import pytest
import statescan
from gradient_contract import GradientContract
from positions_contract import PositionsContract
from scan_contract import ScanContract, cumulative
from support import DTYPES, NARROW, Cpu, assert_accurate, assert_same_bits, exact, laid_out, poison

OP = cases.SSD_SCAN


class TestSsdScan(ScanContract):
    op = OP
    optional = ("D", "z", "dt_bias", "initial_state")


class TestPositions(PositionsContract):
    op = OP


class TestPositionsInTiles(PositionsContract):
    """Sizes that the fused CUDA kernel takes."""

    op = OP
    sizes = dict(dtype="bfloat16", headdim=8, dstate=16)


# ---- ssd_mode ----------------------------------------------------------------------------------------------------------
def in_mode(mode):
    return dataclasses.replace(OP, options={**OP.options, "ssd_mode": mode})


class TestRecurrent(TestSsdScan):
    op = in_mode("recurrent")


class TestQuadratic(TestSsdScan):
    op = in_mode("quadratic")


class TestRecurrentPositions(PositionsContract):
    op = in_mode("recurrent")


class TestQuadraticPositions(PositionsContract):
    op = in_mode("quadratic")


def test_the_library_picks_the_chunked_form_on_the_cpu(rng):
    inputs = cases.ssd_scan(rng)
    picked, chunked = OP.run(Cpu(), inputs), in_mode("chunked").run(Cpu(), inputs, ssd_mode="chunked")
    for name in picked:
        assert_same_bits(picked[name], chunked[name], name)


@pytest.mark.parametrize("mode", ("recurrent", "quadratic"))
@pytest.mark.parametrize(
    "row",
    (
        dict(nheads=1, ngroups=1, headdim=1, dstate=1),
        dict(nheads=12, ngroups=4, headdim=3, dstate=17),
        dict(headdim=64, dstate=128, seqlen=131, nheads=4, ngroups=2),
        dict(headdim=128, nheads=2, ngroups=1),
        dict(seqlen=29, nheads=80, ngroups=1, headdim=2, batch=1),
        dict(nheads=0, ngroups=1),
        dict(headdim=0),
        dict(dstate=0),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_modes_and_sizes(device, rng, row, mode, dtype):
    OP.check(device, cases.ssd_scan(rng, dtype, **row), dt_softplus=True, ssd_mode=mode)


@pytest.mark.parametrize("mode", ("recurrent", "quadratic"))
def test_modes_keep_long_memories_and_large_rates(device, rng, mode):
    inputs = cases.ssd_scan(rng, seqlen=500, omit=("dt_bias",))
    inputs["dt"][:] = 1e-3
    OP.check(device, inputs, ssd_mode=mode)
    inputs["A"] *= np.float32(1e5)
    OP.check(device, inputs, ssd_mode=mode)


def test_unknown_mode(rng):
    text = 'ssd_scan: ssd_mode must be None, "chunked", "recurrent" or "quadratic", got \'linear\''
    with pytest.raises(ValueError, match=text):
        statescan.ssd_scan(**cases.ssd_scan(rng), ssd_mode="linear")


@pytest.mark.parametrize(
    "row",
    (
        dict(nheads=1, ngroups=1),
        dict(nheads=3, ngroups=1),
        dict(nheads=3, ngroups=3),
        dict(nheads=8, ngroups=2),
        dict(nheads=12, ngroups=4, headdim=3),
        dict(headdim=1),
        dict(headdim=32),
        dict(headdim=40),
        dict(headdim=64),
        dict(headdim=80),
        dict(headdim=96),
        dict(headdim=128, nheads=2, ngroups=1),
        dict(dstate=1),
        dict(dstate=8),
        dict(dstate=12),
        dict(dstate=16),
        dict(dstate=64),
        dict(dstate=96),
        dict(dstate=128),
        dict(dstate=256),
        dict(dstate=512, headdim=3),
        dict(headdim=64, dstate=128, seqlen=263, nheads=4, ngroups=2),
        dict(headdim=17, dstate=33, seqlen=101),
        dict(nheads=0, ngroups=1),
        dict(headdim=0),
        dict(dstate=0),
        dict(seqlen=29, nheads=80, ngroups=1, headdim=2, batch=1),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_sizes(device, rng, row, dtype):
    OP.check(device, cases.ssd_scan(rng, dtype, **row), dt_softplus=True)


@pytest.mark.parametrize("dt_dtype", ("float32", *NARROW))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_dtypes_of_dt(device, rng, dtype, dt_dtype):
    OP.check(device, cases.ssd_scan(rng, dtype, dt_dtype=dt_dtype), dt_softplus=True)


@pytest.mark.parametrize("state_dtype", ("float32", *NARROW))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_dtypes_of_states(device, rng, dtype, state_dtype):
    inputs = cases.ssd_scan(rng, dtype, state_dtype=state_dtype)
    final_state = poison(inputs["initial_state"].shape, inputs["initial_state"].dtype)
    OP.check(device, inputs, {"final_state": final_state}, dt_softplus=True)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_slices_of_one_projection(device, rng, dtype):
    """x, z, B, C and dt as strided slices of one wide in_proj output, as models pass them."""
    inputs = cases.ssd_scan(rng, dtype)
    names = ("z", "x", "B", "C", "dt")
    flat = {name: inputs[name].reshape(2, 67, -1) for name in names}
    projection = np.concatenate(list(flat.values()), axis=2)
    first, views = 0, {}
    for name in names:
        width = flat[name].shape[2]
        views[name] = projection[:, :, first : first + width].reshape(inputs[name].shape)
        assert np.shares_memory(views[name], projection)
        first += width
    got = OP.check(device, {**inputs, **views}, dt_softplus=True)
    plain = OP.run(device, inputs, dt_softplus=True)
    for name in got:
        assert_same_bits(got[name], plain[name], name)


@pytest.mark.parametrize(
    "options",
    (
        dict(),
        dict(dt_softplus=True),
        dict(dt_limit=(0.0, 0.1)),
        dict(dt_softplus=True, dt_limit=(0.05, 0.2)),
        dict(dt_softplus=True, dt_limit=(0.0, float("inf"))),
        dict(dt_softplus=True, dt_limit=(0.3, 0.3)),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_steps(device, rng, options, dtype):
    inputs = cases.ssd_scan(rng, dtype)
    if "dt_softplus" not in options:
        inputs["dt"], inputs["dt_bias"] = np.abs(inputs["dt"]) / 8, np.abs(inputs["dt_bias"]) / 8
    OP.check(device, inputs, **options)


def test_D_of_every_shape(device, rng):
    for D in (rng.standard_normal(6), rng.standard_normal((6, 5))):
        inputs = {**cases.ssd_scan(rng), "D": D.astype(np.float32)}
        OP.check(device, inputs, dt_softplus=True)
        OP.check(device, {**inputs, "D": laid_out(inputs["D"], "gapped")}, dt_softplus=True)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("chunk_size", (1, 2, 16, 40, 50, 64, 96, 128, 200, 256, 300, 1024))
def test_result_does_not_depend_on_chunk_size(device, rng, chunk_size, dtype):
    inputs = cases.ssd_scan(rng, dtype, seqlen=200)
    OP.check(device, inputs, dt_softplus=True, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", (40, 64, 96))
@pytest.mark.parametrize("around", (-1, 0, 1))
def test_lengths_around_chunks(device, rng, chunk_size, around):
    for chunks in (1, 2, 3):
        OP.check(device, cases.ssd_scan(rng, seqlen=chunks * chunk_size + around), dt_softplus=True, chunk_size=chunk_size)


@pytest.mark.parametrize("lengths,chunk_size", (([500, 700, 900], 128), ([256, 300, 400], 128), ([130, 200, 300], 64)))
def test_packed_starts_off_the_chunks(device, rng, lengths, chunk_size):
    """known_bugs 17."""
    inputs = cases.ssd_scan(rng, batch=1, seqlen=sum(lengths), sequences=3, nheads=2, ngroups=1)
    OP.check(device, inputs, cu_seqlens=cumulative(lengths), chunk_size=chunk_size, dt_softplus=True)


@pytest.mark.parametrize("k", (1, 63, 64, 65, 100, 127, 128, 129, 199))
def test_split_around_chunks(device, rng, k):
    inputs = cases.ssd_scan(rng, seqlen=200, batch=1)
    whole = OP.expected(inputs, dt_softplus=True)
    head = OP.run(device, OP.tokens(inputs, slice(0, k)), dt_softplus=True)
    tail = OP.run(device, {**OP.tokens(inputs, slice(k, None)), "initial_state": head["final_state"]}, dt_softplus=True)
    assert_accurate(np.concatenate([head["y"], tail["y"]], axis=1), whole["y"], "y")
    assert_accurate(tail["final_state"], whole["final_state"], "final_state")


def test_final_state_only_when_asked_for(device, rng):
    inputs = {name: device.put(value) for name, value in cases.ssd_scan(rng).items()}
    y = device.call(statescan.ssd_scan, **inputs)
    both = device.call(statescan.ssd_scan, **inputs, return_final_state=True)
    assert not isinstance(y, tuple) and isinstance(both, tuple) and len(both) == 2
    assert_same_bits(device.get(y), device.get(both[0]), "y")
    given = device.put(poison((2, 6, 5, 7), np.float32))
    y, final_state = device.call(statescan.ssd_scan, **inputs, final_state_out=given)
    assert final_state is given
    assert_same_bits(device.get(final_state), device.get(both[1]), "final_state")


# ---- numerics ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("dt", (0.0, 1e-8, 1e-4, 1.0, 19.9, 20.1, 50.0, 1e4))
def test_extreme_steps(device, rng, dt, dtype):
    inputs = cases.ssd_scan(rng, dtype, dt_dtype="float32", seqlen=130)
    inputs["dt"] = (dt * rng.uniform(0.9, 1.1, inputs["dt"].shape)).astype(np.float32)
    inputs["dt_bias"][:] = 0
    OP.check(device, inputs)
    OP.check(device, inputs, dt_softplus=True)


def test_steps_of_every_size_in_one_sequence(device, rng):
    """Steps from 1e-8 to 1e4: a small decay beside a huge one must not drown in a prefix sum."""
    inputs = cases.ssd_scan(rng, seqlen=130, omit=("dt_bias",))
    inputs["dt"] = np.exp(rng.uniform(np.log(1e-8), np.log(1e4), inputs["dt"].shape)).astype(np.float32)
    OP.check(device, inputs)


@pytest.mark.parametrize("v", (-80.0, -40.0, -20.0, -17.0, -16.0, -10.0))
def test_softplus_of_very_negative_steps(device, rng, v):
    """softplus(v) is exp(v) there, never 0 too early; without D or a state nothing else is in y."""
    inputs = cases.ssd_scan(rng, omit=("D", "dt_bias", "initial_state"))
    inputs["dt"] = (v * rng.uniform(0.99, 1.01, inputs["dt"].shape)).astype(np.float32)
    got = OP.check(device, inputs, dt_softplus=True)
    assert np.any(got["y"])


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("A", (-1e-6, -1.0, -1e2, -1e3, -1e5))
def test_large_rates(device, rng, A, dtype):
    """known_bugs 27 and 28: no Inf or NaN, and no digits lost in the prefix sums."""
    inputs = cases.ssd_scan(rng, dtype, seqlen=257)
    inputs["A"] = (A * rng.uniform(0.5, 1, 6)).astype(np.float32)
    OP.check(device, inputs, dt_softplus=True)


def test_large_rates_with_small_steps_between(device, rng):
    """Prefix sums reach 1e9 while single decays matter: their difference must keep its digits."""
    inputs = cases.ssd_scan(rng, seqlen=200, omit=("dt_bias",))
    inputs["A"][:] = -1e5
    inputs["dt"] = np.where(rng.random(inputs["dt"].shape) < 0.1, 1e2, 1e-5).astype(np.float32)
    inputs["dt"] *= rng.uniform(0.5, 1.5, inputs["dt"].shape).astype(np.float32)
    OP.check(device, inputs)


def test_large_rates_with_small_steps_between_in_float64(rng):
    inputs = cases.ssd_scan(rng, "float64", seqlen=240, omit=("dt_bias",))
    inputs["A"][:] = -7e4
    inputs["dt"] = np.exp(rng.uniform(np.log(1e-7), np.log(5e3), inputs["dt"].shape))
    OP.check(Cpu(), inputs)


@pytest.mark.parametrize("A", (0.0, 0.02, 0.5))
def test_rates_that_do_not_decay(device, rng, A):
    inputs = cases.ssd_scan(rng, seqlen=130)
    inputs["A"][:] = A
    inputs["A"][1] = -1
    OP.check(device, inputs, dt_softplus=True, dt_limit=(0.0, 1.0))


def test_bad_head_stays_alone(device, rng):
    clean = cases.ssd_scan(rng)
    expected = OP.run(device, clean, dt_softplus=True)
    for name in ("x", "dt", "z"):
        spoiled = {**clean, name: clean[name].copy()}
        spoiled[name][0, 20, 4] = np.nan
        got = OP.run(device, spoiled, dt_softplus=True)
        others = [0, 1, 2, 3, 5]
        assert_same_bits(got["y"][:, :, others], expected["y"][:, :, others], f"y beside a bad {name}")
        assert_same_bits(got["final_state"][:, others], expected["final_state"][:, others], f"final_state beside a bad {name}")
        assert_same_bits(got["y"][0, :20], expected["y"][0, :20], f"y before a bad {name}")


def test_float64_of_every_option(rng):
    for options in (
        dict(),
        dict(dt_softplus=True, dt_limit=(0.01, 0.3)),
        dict(dt_softplus=True, reverse=True),
        dict(dt_softplus=True, chunk_size=40),
    ):
        inputs = cases.ssd_scan(rng, "float64", seqlen=131, headdim=16, dstate=24)
        inputs["dt"] = np.abs(inputs["dt"]) / 10
        OP.check(Cpu(), inputs, **options)


# ---- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change,error,text",
    (
        (
            dict(B=np.zeros((2, 67, 4, 7), np.float32)),
            ValueError,
            "ssd_scan: ngroups=4 (from B, shape (2, 67, 4, 7)) must divide nheads=6",
        ),
        (
            dict(B=np.zeros((2, 67, 0, 7), np.float32)),
            ValueError,
            "ssd_scan: ngroups=0 (from B, shape (2, 67, 0, 7)) must divide nheads=6",
        ),
        (
            dict(C=np.zeros((2, 67, 2, 7), np.float32)),
            ValueError,
            "ssd_scan: C has shape (2, 67, 2, 7); expected (batch=2, seqlen=67, ngroups=3, dstate=7)",
        ),
        (
            dict(dt=np.zeros((2, 66, 6), np.float32)),
            ValueError,
            "ssd_scan: dt has shape (2, 66, 6); expected (batch=2, seqlen=67, nheads=6)",
        ),
        (dict(A=np.zeros(5, np.float32)), ValueError, "ssd_scan: A has shape (5,); expected (nheads=6)"),
        (dict(D=np.zeros((6, 4), np.float32)), ValueError, "ssd_scan: D has shape (6, 4); expected (nheads=6, headdim=5)"),
        (
            dict(x=np.zeros((2, 67, 30), np.float32)),
            ValueError,
            "ssd_scan: x has shape (2, 67, 30); expected (batch, seqlen, nheads, headdim)",
        ),
        (dict(initial_state=np.zeros((3, 6, 5, 7), np.float32)), ValueError, "expected (batch=2, nheads=6, headdim=5, dstate=7)"),
        (dict(B=np.zeros((2, 67, 3, 7), np.float16)), TypeError, "ssd_scan: B is float16; expected float32"),
        (dict(A=np.zeros(6, np.float64)), TypeError, "ssd_scan: A is float64; expected float32"),
        (
            dict(x=np.zeros((2, 67, 6, 5), np.int32)),
            TypeError,
            "ssd_scan: x is int32; expected float32, float64, float16 or bfloat16",
        ),
        (dict(dt_limit=(0.5, 0.1)), ValueError, "ssd_scan: dt_limit=(0.5, 0.1) must be ordered (low, high)"),
        (dict(dt_limit=(0.5,)), ValueError, "ssd_scan: dt_limit must be a pair (low, high) or None"),
        (dict(chunk_size=-1), ValueError, "ssd_scan: chunk_size=-1 must be positive"),
    ),
    ids=lambda v: None if not isinstance(v, dict) else "-".join(v),
)
def test_errors(device, rng, change, error, text):
    with pytest.raises(error) as raised:
        OP.run(device, {**cases.ssd_scan(rng), **change})
    assert text in str(raised.value)


# ---- backward ----------------------------------------------------------------------------------------------------------
BACKWARD = cases.SSD_SCAN_BACKWARD


class TestBackward(GradientContract):
    op = BACKWARD
    optional = ("D", "z", "dt_bias", "initial_state")

    def torch_forward(self, x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_state=None, dt_softplus=False, reverse=False):
        import torch
        import torch.nn.functional as F

        batch, seqlen, nheads, headdim = x.shape
        B, C = (v.repeat_interleave(nheads // v.shape[2], dim=2) for v in (B, C))
        dt = dt if dt_bias is None else dt + dt_bias
        dt = F.softplus(dt, threshold=50) if dt_softplus else dt
        state = x.new_zeros(batch, nheads, headdim, B.shape[3]) if initial_state is None else initial_state
        y = [None] * seqlen
        for t in reversed(range(seqlen)) if reverse else range(seqlen):
            added = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            state = torch.exp(dt[:, t] * A)[..., None, None] * state + added
            y[t] = torch.einsum("bhpn,bhn->bhp", state, C[:, t])
            if D is not None:
                y[t] = y[t] + D[:, None] * x[:, t]
        y = torch.stack(y, 1)
        return y if z is None else y * F.silu(z), state


def check_backward(device, rng, dtype="float32", omit=(), **row):
    return BACKWARD.check(device, BACKWARD.inputs(rng, dtype, omit=omit, **row), dt_softplus=True)


@pytest.mark.parametrize(
    "row",
    (
        dict(nheads=1, ngroups=1),
        dict(nheads=3, ngroups=1),
        dict(nheads=3, ngroups=3),
        dict(nheads=8, ngroups=2),
        dict(nheads=12, ngroups=4, headdim=3),
        dict(headdim=1),
        dict(headdim=40),
        dict(headdim=80),
        dict(headdim=128, nheads=2, ngroups=1),  # headdim in two blocks and more
        dict(headdim=72, nheads=5, ngroups=1),
        dict(dstate=1),
        dict(dstate=12),
        dict(dstate=96),
        dict(dstate=256, nheads=3, seqlen=31),
        dict(headdim=64, dstate=128, seqlen=201, nheads=4, ngroups=2, batch=1),
        dict(headdim=17, dstate=33, seqlen=101),
        dict(nheads=0, ngroups=1),
        dict(headdim=0),
        dict(dstate=0),
        dict(seqlen=29, nheads=80, ngroups=1, headdim=2, batch=1),  # several blocks of heads in a group
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_backward_sizes(device, rng, row, dtype):
    check_backward(device, rng, dtype, **row)


@pytest.mark.parametrize("dt_dtype", ("float32", *NARROW))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_backward_dtypes_of_dt(device, rng, dtype, dt_dtype):
    check_backward(device, rng, dtype, dt_dtype=dt_dtype)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("state_dtype", ("float32", *NARROW))
def test_backward_dtypes_of_states(device, rng, dtype, state_dtype):
    check_backward(device, rng, dtype, state_dtype=state_dtype)


def test_backward_of_slices_of_one_projection(device, rng):
    """The inputs as models pass them, and dy as a split of a wider gradient (known_bugs 33)."""
    inputs = BACKWARD.inputs(rng)
    flat = {name: inputs[name].reshape(2, 67, -1) for name in ("z", "x", "B", "C", "dt", "dy")}
    projection, first, views = np.concatenate(list(flat.values()), axis=2), 0, {}
    for name, value in flat.items():
        views[name] = projection[:, :, first : first + value.shape[2]].reshape(inputs[name].shape)
        assert np.shares_memory(views[name], projection)
        first += value.shape[2]
    got = BACKWARD.run(device, {**inputs, **views}, dt_softplus=True)
    plain = BACKWARD.run(device, inputs, dt_softplus=True)
    for name in got:
        assert_same_bits(got[name], plain[name], name)


@pytest.mark.parametrize(
    "options",
    (
        dict(),
        dict(dt_softplus=True),
        dict(dt_limit=(0.0, 0.1)),
        dict(dt_softplus=True, dt_limit=(0.05, 0.2)),
        dict(dt_softplus=True, dt_limit=(0.0, float("inf"))),
        dict(dt_softplus=True, dt_limit=(0.3, 0.3)),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_backward_steps(device, rng, options, dtype):
    inputs = BACKWARD.inputs(rng, dtype)
    if "dt_softplus" not in options:
        inputs["dt"], inputs["dt_bias"] = np.abs(inputs["dt"]) / 8, np.abs(inputs["dt_bias"]) / 8
    got = BACKWARD.check(device, inputs, **options)
    if "dt_limit" in options:
        raw = exact(inputs["dt"]) + inputs["dt_bias"]
        step = np.logaddexp(0, raw) if "dt_softplus" in options else raw
        low, high = options["dt_limit"]
        assert not np.any(got["ddt"][(step < low * 0.999) | (step > high * 1.001)]), "no gradient where the limit holds dt"


def test_backward_of_D_of_every_shape(device, rng):
    for D in (rng.standard_normal(6), rng.standard_normal((6, 5))):
        inputs = {**BACKWARD.inputs(rng), "D": D.astype(np.float32)}
        BACKWARD.check(device, inputs, dt_softplus=True)
        BACKWARD.check(device, {**inputs, "D": laid_out(inputs["D"], "gapped")}, dt_softplus=True)
    wide = {**BACKWARD.inputs(rng, headdim=72, nheads=2, ngroups=1), "D": rng.standard_normal((2, 72)).astype(np.float32)}
    BACKWARD.check(device, wide, dt_softplus=True)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("chunk_size", (1, 40, 64, 65, 96, 128, 200, 1024))
def test_backward_does_not_depend_on_chunk_size(device, rng, chunk_size, dtype):
    inputs = BACKWARD.inputs(rng, dtype, seqlen=200, nheads=3, ngroups=1)
    BACKWARD.check(device, inputs, dt_softplus=True, chunk_size=chunk_size)


@pytest.mark.parametrize("around", (-1, 0, 1))
def test_backward_lengths_around_chunks(device, rng, around):
    for chunk_size in (64, 96):
        for chunks in (1, 2, 3):
            inputs = BACKWARD.inputs(rng, seqlen=chunks * chunk_size + around, nheads=3, ngroups=1)
            BACKWARD.check(device, inputs, dt_softplus=True, chunk_size=chunk_size)


def test_backward_packed_starts_off_the_chunks(device, rng):
    """known_bugs 17."""
    lengths = [130, 200, 300]
    inputs = BACKWARD.inputs(rng, batch=1, seqlen=630, sequences=3, nheads=2, ngroups=1)
    BACKWARD.check(device, inputs, cu_seqlens=cumulative(lengths), dt_softplus=True)


def test_backward_without_anything_optional_in_every_dtype(device, rng):
    omit = ("D", "z", "dt_bias", "initial_state", "dfinal_state")
    for dtype in ("float32", *NARROW):
        check_backward(device, rng, dtype, omit=omit, seqlen=130)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("dt", (0.0, 1e-8, 1e-4, 1.0, 19.9, 20.1, 50.0, 1e4))
def test_backward_extreme_steps(device, rng, dt, dtype):
    inputs = BACKWARD.inputs(rng, dtype, dt_dtype="float32", seqlen=130)
    inputs["dt"] = (dt * rng.uniform(0.9, 1.1, inputs["dt"].shape)).astype(np.float32)
    inputs["dt_bias"][:] = 0
    BACKWARD.check(device, inputs)
    BACKWARD.check(device, inputs, dt_softplus=True)


def test_backward_steps_of_every_size_in_one_sequence(device, rng):
    """ddtA of a step beside steps that forget everything: it must not be the small difference of large sums."""
    inputs = BACKWARD.inputs(rng, seqlen=130, omit=("dt_bias",))
    inputs["dt"] = np.exp(rng.uniform(np.log(1e-8), np.log(1e4), inputs["dt"].shape)).astype(np.float32)
    BACKWARD.check(device, inputs)


@pytest.mark.parametrize("v", (-80.0, -40.0, -20.0, -16.0))
def test_backward_softplus_of_very_negative_steps(device, rng, v):
    inputs = BACKWARD.inputs(rng, omit=("D", "dt_bias", "initial_state", "dfinal_state"))
    inputs["dt"] = (v * rng.uniform(0.99, 1.01, inputs["dt"].shape)).astype(np.float32)
    got = BACKWARD.check(device, inputs, dt_softplus=True)
    assert np.all(got["ddt"])


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("A", (-1e-6, -1.0, -1e2, -1e3, -1e5))
def test_backward_large_rates(device, rng, A, dtype):
    inputs = BACKWARD.inputs(rng, dtype, seqlen=257)
    inputs["A"] = (A * rng.uniform(0.5, 1, 6)).astype(np.float32)
    BACKWARD.check(device, inputs, dt_softplus=True)


@pytest.mark.parametrize("dtype", ("float32", "float64"))
def test_backward_large_rates_with_small_steps_between(rng, dtype):
    """Prefix sums reach 1e9 while single decays matter, and A multiplies whatever error ddtA has."""
    inputs = BACKWARD.inputs(rng, dtype, seqlen=200, omit=("dt_bias",))
    inputs["A"][:] = -1e5
    inputs["dt"] = np.where(rng.random(inputs["dt"].shape) < 0.1, 1e2, 1e-5).astype(dtype)
    inputs["dt"] *= rng.uniform(0.5, 1.5, inputs["dt"].shape).astype(dtype)
    BACKWARD.check(Cpu(), inputs)


@pytest.mark.parametrize("A", (0.0, 0.02, 0.5))
def test_backward_rates_that_do_not_decay(device, rng, A):
    inputs = BACKWARD.inputs(rng, seqlen=130)
    inputs["A"][:] = A
    inputs["A"][1] = -1
    BACKWARD.check(device, inputs, dt_softplus=True, dt_limit=(0.0, 1.0))


def test_backward_of_a_long_memory(device, rng):
    """Steps so small that nothing is forgotten, over many chunks."""
    inputs = BACKWARD.inputs(rng, batch=1, seqlen=1500, nheads=2, ngroups=1, omit=("dt_bias",))
    inputs["dt"] = rng.uniform(1e-4, 2e-4, inputs["dt"].shape).astype(np.float32)
    BACKWARD.check(device, inputs)


def test_backward_bad_head_stays_alone(device, rng):
    clean = BACKWARD.inputs(rng)
    expected = BACKWARD.run(device, clean, dt_softplus=True)
    others = [0, 1, 2, 3, 5]
    for name in ("x", "dt", "z", "dy"):
        spoiled = {**clean, name: clean[name].copy()}
        spoiled[name][0, 20, 4] = np.nan
        got = BACKWARD.run(device, spoiled, dt_softplus=True)
        for gradient in ("dx", "ddt", "dz"):
            assert_same_bits(got[gradient][:, :, others], expected[gradient][:, :, others], f"{gradient} beside a bad {name}")
        for gradient in ("dA", "dD", "ddt_bias"):
            assert_same_bits(got[gradient][others], expected[gradient][others], f"{gradient} beside a bad {name}")
        assert_same_bits(got["dB"][:, :, :2], expected["dB"][:, :, :2], f"dB of another group beside a bad {name}")


def test_backward_of_a_bad_dy_reaches_the_past_alone(device, rng):
    inputs = BACKWARD.inputs(rng, batch=1, seqlen=130)
    expected = BACKWARD.run(device, inputs, dt_softplus=True)
    for k in (0, 70, 128):
        spoiled = {**inputs, "dy": inputs["dy"].copy()}
        spoiled["dy"][:, k] = np.nan
        got = BACKWARD.run(device, spoiled, dt_softplus=True)
        for name in ("dx", "ddt", "dB", "dC", "dz"):
            assert_same_bits(got[name][:, k + 1 :], expected[name][:, k + 1 :], f"{name} after token {k}")


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_backward_takes_no_more_than_its_states(device, rng, dtype):
    """No array of [seqlen, dim, dstate]: the scratch memory is that of a state every 64 tokens and little else. A dx in float32
    holds all of these states until it is written."""
    if device.name != "cpu":
        pytest.skip("the CPU's plan")
    inputs = BACKWARD.inputs(rng, dtype, batch=1, seqlen=4096, nheads=8, ngroups=1, headdim=64, dstate=64)
    plan = statescan.plan("ssd_scan_backward", **inputs)
    states = 4096 // 64 * inputs["initial_state"].nbytes if dtype == "bfloat16" else 0
    assert plan.workspace_bytes < states + 4 * inputs["B"].size * 4 + 2**20 * statescan.num_threads()


# ---- kept states -------------------------------------------------------------------------------------------------------
STRETCHES = {
    "one": lambda stretch: dict(seqlen=stretch),
    "two": lambda stretch: dict(seqlen=stretch + 1, nheads=16),
    "long": lambda stretch: dict(seqlen=3 * stretch - 9, batch=1),
    "tiles": lambda stretch: dict(seqlen=2 * stretch + 70, headdim=64, dstate=128, batch=1),
    "blocks": lambda stretch: dict(seqlen=2 * stretch + 70, headdim=72, nheads=10, ngroups=1, batch=1),
    "packed": lambda stretch: dict(lengths=[0, 300, 512, 0, 513, 7]),
    "one after another": lambda stretch: dict(lengths=[stretch] * 3, unused=40),
    "empty": lambda stretch: dict(seqlen=0),
}
every_stretch = pytest.mark.parametrize("sizes", STRETCHES)


def stretched(device, rng, dtype, sizes, make=BACKWARD.inputs):
    """Inputs, and the options that go with them. States are large enough for their rounding errors to average out in sums."""
    sizes = {"nheads": 8, "ngroups": 2, "headdim": 16, "dstate": 24, **STRETCHES[sizes](cases.STRETCH[device.name])}
    lengths, unused = sizes.pop("lengths", None), sizes.pop("unused", 0)
    if lengths is None:
        return make(rng, dtype, **sizes), {}
    inputs = make(rng, dtype, batch=1, seqlen=sum(lengths) + unused, sequences=len(lengths), **sizes)
    return inputs, {"cu_seqlens": cumulative(lengths)}


def positions_of_stretches(device, inputs, cu_seqlens=None):
    """For each sequence the positions where its stretches begin, -1 behind them, and the rows in chunk_states of those."""
    stretch, seqlen = cases.STRETCH[device.name], inputs["x"].shape[1]
    cu = [0, seqlen] if cu_seqlens is None else [int(end) for end in cu_seqlens]
    spans = list(zip(cu[:-1], cu[1:])) * (len(inputs["x"]) if cu_seqlens is None else 1)
    count = -(-seqlen // stretch)
    positions = np.array([[k * stretch if k * stretch < last - first else -1 for k in range(count)] for first, last in spans])
    rows = [
        (0, first // stretch + s + k) if cu_seqlens is not None else (s, k)
        for s, (first, _) in enumerate(spans)
        for k in range(count)
        if positions[s, k] >= 0
    ]
    return positions.reshape(len(spans), count), rows


def kept_states(device, inputs, **options):
    """chunk_states, and y beside them."""
    inputs = {name: value for name, value in inputs.items() if name not in ("dy", "dfinal_state")}
    given = {name: device.put(value) for name, value in (inputs | options).items()}
    y, states = device.call(statescan.ssd_scan, **given, dt_softplus=True, save_states=True)
    return device.get(states), device.get(y)


@every_stretch
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("mode", (None, "recurrent", "quadratic"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_kept_states(device, rng, sizes, reverse, mode, dtype):
    inputs, options = stretched(device, rng, dtype, sizes, OP.inputs)
    options |= {"reverse": reverse, "ssd_mode": mode}
    positions, rows = positions_of_stretches(device, inputs, options.get("cu_seqlens"))
    states, y = kept_states(device, inputs, **options)
    batch, seqlen, *heads = inputs["x"].shape
    count = seqlen // cases.STRETCH[device.name] + len(positions) if "cu_seqlens" in options else positions.shape[1]
    assert states.shape == (batch, count, *heads, inputs["B"].shape[3])
    assert dtype == states.dtype.name
    expected = PositionsContract()
    expected.op = OP
    expected = expected.expected(inputs, positions, options.get("cu_seqlens"), reverse)[positions >= 0]
    got = np.array([states[row] for row in rows], states.dtype).reshape(expected.shape)
    assert_accurate(got, expected, "states", "bfloat16" if device.name == "cuda" else None)
    given = {name: device.put(value) for name, value in (inputs | options).items()}
    alone, beside = (statescan.plan("ssd_scan", **given, save_states=saves).kernel for saves in (False, True))
    if alone == beside:  # not every kernel keeps them
        assert_same_bits(y, OP.run(device, inputs, dt_softplus=True, **options)["y"], "y beside the states")


@every_stretch
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_backward_from_kept_states(device, rng, sizes, reverse, dtype):
    inputs, options = stretched(device, rng, dtype, sizes)
    options |= {"reverse": reverse}
    states, _ = kept_states(device, inputs, **options)
    BACKWARD.check(device, inputs, dt_softplus=True, chunk_states=states, **options)


@pytest.mark.parametrize("chunk_size", (1, 64, 96, 128, 200, 256, 1024))
def test_backward_from_kept_states_in_chunks_of_any_size(device, rng, chunk_size):
    inputs, _ = stretched(device, rng, "float32", "long")
    states, _ = kept_states(device, inputs, chunk_size=chunk_size)
    BACKWARD.check(device, inputs, dt_softplus=True, chunk_states=states, chunk_size=chunk_size)


def test_backward_takes_kept_states_as_they_are(device, rng):
    """It makes no others: where they hold something else, so do the gradients of what reads them, and only these."""
    inputs, _ = stretched(device, rng, "float32", "two")
    states, _ = kept_states(device, inputs)
    right = BACKWARD.run(device, inputs, dt_softplus=True, chunk_states=states)
    states[:, 1] = 0
    wrong = BACKWARD.run(device, inputs, dt_softplus=True, chunk_states=states)
    stretch = cases.STRETCH[device.name]
    assert np.any(wrong["dC"][:, stretch:] != right["dC"][:, stretch:])
    for name in ("dC", "dz"):
        assert_same_bits(wrong[name][:, :stretch], right[name][:, :stretch], f"{name} of the first stretch")
    for name in ("dx", "dB", "dinitial_state"):
        assert_same_bits(wrong[name], right[name], name)


def test_kept_states_come_last_and_where_they_are_wanted(device, rng):
    inputs, packing = stretched(device, rng, "bfloat16", "packed", OP.inputs)
    _, rows = positions_of_stretches(device, inputs, **packing)
    inputs = {name: device.put(value) for name, value in (inputs | packing).items()}
    positions = device.put(np.zeros((6, 1), np.int32))
    options = dict(return_final_state=True, state_positions=positions, dt_softplus=True)
    *others, plain = device.call(statescan.ssd_scan, **inputs, **options, save_states=True)
    assert len(others) == 3
    plain = device.get(plain)
    out = device.put(laid_out(poison(plain.shape, np.float32), "gapped"))
    *_, given = device.call(statescan.ssd_scan, **inputs, **options, chunk_states_out=out)
    assert given is out
    given = device.get(given)
    for row in np.ndindex(plain.shape[:2]):
        if row in rows:
            assert_same_bits(given[row].astype(plain.dtype), plain[row], f"states of row {row}")
        else:
            assert np.all(np.isnan(given[row])), f"row {row}, on which no stretch falls, was written"


def test_kept_states_keep_the_backward_small(rng):
    inputs = BACKWARD.inputs(rng, "bfloat16", batch=1, seqlen=4096, nheads=8, ngroups=1, headdim=64, dstate=64)
    states, _ = kept_states(Cpu(), inputs)
    without, given = (statescan.plan("ssd_scan_backward", **inputs, chunk_states=kept) for kept in (None, states))
    of_a_stretch, of_all = (count * inputs["initial_state"][0, 0].nbytes for count in (cases.STRETCH["cpu"] // 64, 4096 // 64))
    assert given.workspace_bytes <= without.workspace_bytes - (of_all - of_a_stretch)


def test_errors_of_kept_states(device, rng):
    inputs, _ = stretched(device, rng, "float16", "two")
    states, _ = kept_states(device, inputs)
    for wrong, error, text in (
        (states[:, :1], ValueError, "chunk_states has shape (2, 1, 16, 16, 24); expected (batch=2, nstretches=2, "),
        (states.astype(DTYPES["bfloat16"]), TypeError, "chunk_states is bfloat16; expected float32 or float16"),
    ):
        with pytest.raises(error) as raised:
            BACKWARD.run(device, inputs, chunk_states=wrong)
        assert f"ssd_scan_backward: {text}" in str(raised.value)
        forward = {name: value for name, value in inputs.items() if name not in ("dy", "dfinal_state")}
        with pytest.raises(error) as raised:
            OP.run(device, forward | {"chunk_states_out": wrong})
        assert f"ssd_scan: {text}" in str(raised.value)
