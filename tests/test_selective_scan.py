import cases
import numpy as np
import pytest
import statescan
from gradient_contract import GradientContract
from positions_contract import PositionsContract
from scan_contract import ScanContract
from support import NARROW, Cpu, assert_same_bits, poison

OP = cases.SELECTIVE_SCAN


class TestSelectiveScan(ScanContract):
    op = OP
    optional = ("D", "z", "dt_bias", "initial_state")


class TestComplex(TestSelectiveScan):
    sizes = dict(complex_A=True)


class TestTimeInvariant(TestSelectiveScan):
    sizes = dict(varying_B=False, varying_C=False)


class TestPositions(PositionsContract):
    op = OP


class TestPositionsComplex(TestPositions):
    sizes = dict(complex_A=True)


class TestPositionsTimeInvariant(TestPositions):
    sizes = dict(varying_B=False, varying_C=False)


@pytest.mark.parametrize(
    "row",
    (
        dict(dim=1, ngroups=1),
        dict(dim=3, ngroups=1),
        dict(dim=3, ngroups=3),
        dict(dim=100, ngroups=1),
        dict(dim=100, ngroups=4),
        dict(dim=64, ngroups=8),
        dict(dim=257, ngroups=1, dstate=16),
        dict(dstate=1),
        dict(dstate=8),
        dict(dstate=12),
        dict(dstate=16),
        dict(dstate=64),
        dict(dstate=96),
        dict(dstate=128),
        dict(dstate=256),
        dict(dstate=512),
        dict(dim=0, ngroups=1),
        dict(dstate=0),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_sizes(device, rng, row, dtype):
    OP.check(device, cases.selective_scan(rng, dtype, **row), dt_softplus=True)


@pytest.mark.parametrize("row", (dict(dstate=1), dict(dstate=8), dict(dstate=96), dict(dim=100, ngroups=4)), ids=str)
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_complex_sizes(device, rng, row, dtype):
    OP.check(device, cases.selective_scan(rng, dtype, complex_A=True, **row), dt_softplus=True)


@pytest.mark.parametrize("complex_A", (False, True))
@pytest.mark.parametrize("varying", ((True, True), (True, False), (False, True), (False, False)))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_projections(device, rng, dtype, varying, complex_A):
    inputs = cases.selective_scan(rng, dtype, varying_B=varying[0], varying_C=varying[1], complex_A=complex_A)
    OP.check(device, inputs, dt_softplus=True)
    OP.check(device, inputs, dt_softplus=True, reverse=True)


@pytest.mark.parametrize("varying", ((True, False), (False, True), (False, False)))
def test_projections_in_float64(rng, varying):
    for complex_A in (False, True):
        inputs = cases.selective_scan(rng, "float64", varying_B=varying[0], varying_C=varying[1], complex_A=complex_A)
        OP.check(Cpu(), inputs, dt_softplus=True)


@pytest.mark.parametrize("dt_dtype", ("float32", *NARROW))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_dtypes_of_dt(device, rng, dtype, dt_dtype):
    OP.check(device, cases.selective_scan(rng, dtype, dt_dtype=dt_dtype), dt_softplus=True)


@pytest.mark.parametrize("state_dtype", ("float32", *NARROW))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_dtypes_of_states(device, rng, dtype, state_dtype):
    inputs = cases.selective_scan(rng, dtype, state_dtype=state_dtype)
    final_state = poison(inputs["initial_state"].shape, inputs["initial_state"].dtype)
    OP.check(device, inputs, {"final_state": final_state}, dt_softplus=True)


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
    inputs = cases.selective_scan(rng, dtype)
    if "dt_softplus" not in options:
        inputs["dt"], inputs["dt_bias"] = np.abs(inputs["dt"]) / 8, np.abs(inputs["dt_bias"]) / 8
    OP.check(device, inputs, **options)


def test_slices_of_one_projection(device, rng):
    """B, C and dt as slices of x_proj's output, x and z as the halves of in_proj's."""
    inputs = cases.selective_scan(rng, ngroups=1)
    xz = np.concatenate([inputs["x"], inputs["z"]], axis=2)
    dt_B_C = np.concatenate([inputs["dt"], inputs["B"][:, :, 0], inputs["C"][:, :, 0]], axis=2)
    views = dict(x=xz[:, :, :12], z=xz[:, :, 12:], dt=dt_B_C[:, :, :12], B=dt_B_C[:, :, None, 12:19], C=dt_B_C[:, :, None, 19:])
    got, plain = OP.check(device, {**inputs, **views}, dt_softplus=True), OP.run(device, inputs, dt_softplus=True)
    for name in got:
        assert_same_bits(got[name], plain[name], name)


def test_final_state_only_when_asked_for(device, rng):
    inputs = {name: device.put(value) for name, value in cases.selective_scan(rng).items()}
    y = device.call(statescan.selective_scan, **inputs)
    both = device.call(statescan.selective_scan, **inputs, return_final_state=True)
    assert not isinstance(y, tuple) and isinstance(both, tuple) and len(both) == 2
    assert_same_bits(device.get(y), device.get(both[0]), "y")
    given = device.put(poison((2, 12, 7), np.float32))
    y, final_state = device.call(statescan.selective_scan, **inputs, final_state_out=given)
    assert final_state is given
    assert_same_bits(device.get(final_state), device.get(both[1]), "final_state")


# ---- numerics ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("complex_A", (False, True))
@pytest.mark.parametrize("dt", (0.0, 1e-8, 1e-4, 1.0, 19.9, 20.1, 50.0, 1e4))
def test_extreme_steps(device, rng, dt, complex_A):
    inputs = cases.selective_scan(rng, seqlen=130, complex_A=complex_A)
    inputs["dt"] = (dt * rng.uniform(0.9, 1.1, inputs["dt"].shape)).astype(np.float32)
    inputs["dt_bias"][:] = 0
    OP.check(device, inputs)
    OP.check(device, inputs, dt_softplus=True)


def test_steps_of_every_size_in_one_sequence(device, rng):
    inputs = cases.selective_scan(rng, seqlen=130, omit=("dt_bias",))
    inputs["dt"] = np.exp(rng.uniform(np.log(1e-8), np.log(1e4), inputs["dt"].shape)).astype(np.float32)
    OP.check(device, inputs)


@pytest.mark.parametrize("complex_A", (False, True))
@pytest.mark.parametrize("dt", (1e-4, 1e-3, 1e-2))
def test_long_memories_of_a_constant_step(device, rng, dt, complex_A):
    """As in S4: the decay is the same at every token, so its rounding error would add up over the memory, to 3e-5 at 1e-3."""
    sizes = dict(seqlen=2000, complex_A=complex_A, varying_B=False, varying_C=False)
    inputs = cases.selective_scan(rng, omit=("dt_bias",), **sizes)
    inputs["dt"][:] = dt
    OP.check(device, inputs)


@pytest.mark.parametrize("v", (-80.0, -40.0, -20.0, -17.0, -16.0, -10.0))
def test_softplus_of_very_negative_steps(device, rng, v):
    inputs = cases.selective_scan(rng, omit=("D", "dt_bias", "initial_state"))
    inputs["dt"] = (v * rng.uniform(0.99, 1.01, inputs["dt"].shape)).astype(np.float32)
    got = OP.check(device, inputs, dt_softplus=True)
    assert np.any(got["y"])


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("A", (-1e-6, -1.0, -1e2, -1e3, -1e5))
def test_large_rates(device, rng, A, dtype):
    inputs = cases.selective_scan(rng, dtype, seqlen=257)
    inputs["A"] = (A * rng.uniform(0.5, 1, inputs["A"].shape)).astype(np.float32)
    OP.check(device, inputs, dt_softplus=True)


@pytest.mark.parametrize("A", (0.0, 0.02, 0.5))
def test_rates_that_do_not_decay(device, rng, A):
    inputs = cases.selective_scan(rng, seqlen=130)
    inputs["A"][:] = A
    inputs["A"][1] = -1
    OP.check(device, inputs, dt_softplus=True, dt_limit=(0.0, 1.0))


def test_fast_rotations(device, rng):
    """An imaginary part of A that turns many times a step: sin and cos need their argument reduced."""
    inputs = cases.selective_scan(rng, complex_A=True)
    inputs["A"] = (-0.5 + 1j * rng.uniform(-200, 200, inputs["A"].shape)).astype(np.complex64)
    inputs["dt"] = np.exp2(np.round(rng.uniform(-6, 1, inputs["dt"].shape))).astype(np.float32)
    del inputs["dt_bias"]  # dt stays a power of two, so that dt A is exact in float32 and the phase well defined
    OP.check(device, inputs)


def test_bad_channel_stays_alone(device, rng):
    clean = cases.selective_scan(rng)
    expected = OP.run(device, clean, dt_softplus=True)
    others = [c for c in range(12) if c != 4]
    for name in ("x", "dt", "z"):
        spoiled = {**clean, name: clean[name].copy()}
        spoiled[name][0, 20, 4] = np.nan
        got = OP.run(device, spoiled, dt_softplus=True)
        assert_same_bits(got["y"][:, :, others], expected["y"][:, :, others], f"y beside a bad {name}")
        assert_same_bits(got["final_state"][:, others], expected["final_state"][:, others], f"final_state beside a bad {name}")
        assert_same_bits(got["y"][0, :20], expected["y"][0, :20], f"y before a bad {name}")


def test_peers_gates(device, rng):
    """mamba-ssm's own (rtol, atol), which it holds against a float32 reference."""
    for dtype, rtol, atol in (("float32", 6e-4, 2e-3), ("float16", 3e-3, 5e-3), ("bfloat16", 3e-2, 5e-2)):
        inputs = cases.selective_scan(rng, dtype, seqlen=131, dim=24, dstate=8)
        got, expected = OP.run(device, inputs, dt_softplus=True), OP.expected(inputs, dt_softplus=True)
        for name in got:
            np.testing.assert_allclose(got[name].astype(np.float64), expected[name], rtol=rtol, atol=atol)


# ---- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change,error,text",
    (
        (
            dict(B=np.zeros((2, 67, 5, 7), np.float32)),
            ValueError,
            "selective_scan: ngroups=5 (from B, shape (2, 67, 5, 7)) must divide dim=12",
        ),
        (
            dict(C=np.zeros((2, 67, 4, 7), np.float32)),
            ValueError,
            "selective_scan: C has shape (2, 67, 4, 7); expected (batch=2, seqlen=67, ngroups=3, dstate=7)",
        ),
        (
            dict(B=np.zeros((67, 3, 7), np.float32)),
            ValueError,
            "selective_scan: B has shape (67, 3, 7); expected (batch, seqlen, ngroups, dstate), or (dim, dstate) when time-invariant",
        ),
        (dict(A=np.zeros((11, 7), np.float32)), ValueError, "selective_scan: A has shape (11, 7); expected (dim=12, dstate)"),
        (
            dict(dt=np.zeros((2, 67, 11), np.float32)),
            ValueError,
            "selective_scan: dt has shape (2, 67, 11); expected (batch=2, seqlen=67, dim=12)",
        ),
        (dict(A=np.zeros((12, 7), np.complex64)), TypeError, "selective_scan: B is float32; expected complex64"),
        (dict(A=np.zeros((12, 7), np.float16)), TypeError, "selective_scan: A is float16; expected float32 or complex64"),
        (dict(A=np.zeros((12, 7), np.complex128)), TypeError, "selective_scan: A is complex128; expected float32 or complex64"),
        (dict(z=np.zeros((2, 67, 12), np.float16)), TypeError, "selective_scan: z is float16; expected float32"),
        (dict(dt_limit=(0.5, 0.1)), ValueError, "selective_scan: dt_limit=(0.5, 0.1) must be ordered (low, high)"),
    ),
    ids=lambda v: None if not isinstance(v, dict) else "-".join(v),
)
def test_errors(device, rng, change, error, text):
    with pytest.raises(error) as raised:
        OP.run(device, {**cases.selective_scan(rng), **change})
    assert text in str(raised.value)


# ---- backward ----------------------------------------------------------------------------------------------------------
BACKWARD = cases.SELECTIVE_SCAN_BACKWARD


class TestBackward(GradientContract):
    op = BACKWARD
    optional = ("D", "z", "dt_bias", "initial_state")

    def torch_forward(
        self, x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_state=None, dt_softplus=False, dt_limit=None, reverse=False
    ):
        import torch

        batch, seqlen, dim = x.shape
        dt = dt if dt_bias is None else dt + dt_bias
        dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
        dt = dt if dt_limit is None else dt.clamp(*dt_limit)
        state = torch.zeros(batch, *A.shape, dtype=A.dtype) if initial_state is None else initial_state
        at = lambda v, t: v if v.ndim == 2 else v[:, t].repeat_interleave(dim // v.shape[2], dim=1)
        outputs = [None] * seqlen
        for t in reversed(range(seqlen)) if reverse else range(seqlen):
            state = torch.exp(dt[:, t, :, None] * A) * state + (dt * x)[:, t, :, None] * at(B, t)
            y = (at(C, t) * state).sum(-1)
            outputs[t] = 2 * y.real if A.is_complex() else y
        y = torch.stack(outputs, dim=1)
        y = y if D is None else y + D * x
        return y if z is None else y * torch.nn.functional.silu(z), state


class TestBackwardComplex(TestBackward):
    sizes = dict(complex_A=True)


class TestBackwardTimeInvariant(TestBackward):
    sizes = dict(varying_B=False, varying_C=False)


@pytest.mark.parametrize(
    "row",
    (
        dict(dim=1, ngroups=1),
        dict(dim=3, ngroups=3),
        dict(dim=100, ngroups=1),
        dict(dim=100, ngroups=4),
        dict(dim=257, ngroups=1, dstate=16),
        dict(dim=2600, ngroups=1, dstate=2, seqlen=5),
        dict(dstate=1),
        dict(dstate=8),
        dict(dstate=12),
        dict(dstate=17),
        dict(dstate=96),
        dict(dstate=256, seqlen=9),
        dict(dim=0, ngroups=1),
        dict(dstate=0),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_backward_sizes(device, rng, row, dtype):
    BACKWARD.check(device, BACKWARD.inputs(rng, dtype, **row), dt_softplus=True)


@pytest.mark.parametrize("row", (dict(dstate=1), dict(dstate=8), dict(dstate=33), dict(dim=100, ngroups=4)), ids=str)
@pytest.mark.parametrize("dtype", ("float32", "float64", *NARROW))
def test_backward_complex_sizes(device, rng, row, dtype):
    device = Cpu() if dtype == "float64" else device
    BACKWARD.check(device, BACKWARD.inputs(rng, dtype, complex_A=True, **row), dt_softplus=True)


@pytest.mark.parametrize("complex_A", (False, True))
@pytest.mark.parametrize("varying", ((True, False), (False, True), (False, False)))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_backward_projections(device, rng, dtype, varying, complex_A):
    inputs = BACKWARD.inputs(rng, dtype, varying_B=varying[0], varying_C=varying[1], complex_A=complex_A)
    BACKWARD.check(device, inputs, dt_softplus=True)
    BACKWARD.check(device, inputs, dt_softplus=True, reverse=True)


@pytest.mark.parametrize("dt_dtype", ("float32", *NARROW))
@pytest.mark.parametrize("state_dtype", ("float32", *NARROW))
def test_backward_dtypes_of_dt_and_states(device, rng, dt_dtype, state_dtype):
    for dtype in ("float32", "bfloat16"):
        BACKWARD.check(device, BACKWARD.inputs(rng, dtype, dt_dtype=dt_dtype, state_dtype=state_dtype), dt_softplus=True)


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
    """A limited step has no gradient of its own."""
    inputs = BACKWARD.inputs(rng, dtype)
    if "dt_softplus" not in options:
        inputs["dt"], inputs["dt_bias"] = np.abs(inputs["dt"]) / 8, np.abs(inputs["dt_bias"]) / 8
    BACKWARD.check(device, inputs, **options)


@pytest.mark.parametrize("complex_A", (False, True))
@pytest.mark.parametrize("dt", (0.0, 1e-8, 1e-4, 1.0, 19.9, 20.1, 50.0))
def test_backward_extreme_steps(device, rng, dt, complex_A):
    inputs = BACKWARD.inputs(rng, seqlen=130, complex_A=complex_A)
    inputs["dt"] = (dt * rng.uniform(0.9, 1.1, inputs["dt"].shape)).astype(np.float32)
    inputs["dt_bias"][:] = 0
    BACKWARD.check(device, inputs)
    BACKWARD.check(device, inputs, dt_softplus=True)


@pytest.mark.parametrize("complex_A", (False, True))
@pytest.mark.parametrize("dt", (1e-4, 1e-3, 1e-2))
def test_backward_long_memories_of_a_constant_step(device, rng, dt, complex_A):
    inputs = BACKWARD.inputs(rng, seqlen=1000, complex_A=complex_A, varying_B=False, varying_C=False, omit=("dt_bias",))
    inputs["dt"][:] = dt
    BACKWARD.check(device, inputs)


@pytest.mark.parametrize("v", (-80.0, -20.0, -17.0, -10.0))
def test_backward_softplus_of_very_negative_steps(device, rng, v):
    inputs = BACKWARD.inputs(rng, omit=("dt_bias", "dfinal_state"))
    inputs["dt"] = (v * rng.uniform(0.99, 1.01, inputs["dt"].shape)).astype(np.float32)
    assert np.any(BACKWARD.check(device, inputs, dt_softplus=True)["ddt"])


@pytest.mark.parametrize("A", (-1e5, -1e3, -1e2, -1e-6, 0.0, 0.02))
def test_backward_rates(device, rng, A):
    omit = ("initial_state",) if A < -1e3 else ()  # whose gradient is below the smallest float32
    inputs = BACKWARD.inputs(rng, seqlen=130, omit=omit)
    inputs["A"] = (A * rng.uniform(0.5, 1, inputs["A"].shape)).astype(np.float32)
    BACKWARD.check(device, inputs, dt_softplus=True, dt_limit=(0.0, 1.0))


def test_backward_of_many_sequences(device, rng):
    """More sequences than partial sums."""
    lengths = [int(n) for n in rng.integers(0, 9, 100)]
    inputs = BACKWARD.inputs(rng, batch=1, seqlen=sum(lengths), sequences=len(lengths))
    BACKWARD.check(device, inputs, dt_softplus=True, cu_seqlens=np.cumsum([0, *lengths]))


def test_backward_bad_channel_stays_alone(device, rng):
    clean = BACKWARD.inputs(rng)
    expected = BACKWARD.run(device, clean, dt_softplus=True)
    others = [c for c in range(12) if c != 4]
    for name in ("x", "dt", "z", "dy"):
        spoiled = {**clean, name: clean[name].copy()}
        spoiled[name][0, 20, 4] = np.nan
        got = BACKWARD.run(device, spoiled, dt_softplus=True)
        for gradient in ("dx", "ddt", "dz"):
            assert_same_bits(got[gradient][:, :, others], expected[gradient][:, :, others], f"{gradient} beside a bad {name}")
        for gradient in ("dA", "dD", "ddt_bias"):
            assert_same_bits(got[gradient][others], expected[gradient][others], f"{gradient} beside a bad {name}")
