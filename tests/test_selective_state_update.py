import cases
import numpy as np
import pytest
import statescan
from support import NARROW, Cpu, assert_accurate, assert_same_bits
from update_contract import UpdateContract, indices

MAMBA1, MAMBA2 = cases.MAMBA1_STATE_UPDATE, cases.MAMBA2_STATE_UPDATE


class TestMamba1(UpdateContract):
    op = MAMBA1
    optional = ("D", "z", "dt_bias")


class TestMamba2(UpdateContract):
    op = MAMBA2
    optional = ("D", "z", "dt_bias")


class TestComplex(UpdateContract):
    op = MAMBA1
    sizes = dict(complex_A=True)
    optional = ("D", "z", "dt_bias")


class TestTimeInvariant(UpdateContract):
    op = MAMBA1
    sizes = dict(varying_B=False, varying_C=False)
    optional = ("D", "z", "dt_bias")


@pytest.mark.parametrize(
    "row",
    (
        dict(nheads=1, ngroups=1),
        dict(nheads=3, ngroups=1),
        dict(nheads=3, ngroups=3),
        dict(nheads=8, ngroups=4),
        dict(headdim=1),
        dict(headdim=40),
        dict(headdim=64, dstate=128),
        dict(headdim=80),
        dict(headdim=128),
        dict(dstate=1),
        dict(dstate=12),
        dict(dstate=16),
        dict(dstate=96),
        dict(dstate=256),
        dict(dstate=0),
        dict(headdim=0),
        dict(nheads=80, headdim=3, ngroups=1),
        dict(headdim=2, dstate=300),
        dict(headdim=3, dstate=1100),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_mamba2_sizes(device, rng, row, dtype):
    MAMBA2.check(device, cases.mamba2_state_update(rng, dtype, **row), dt_softplus=True)
    MAMBA2.check(device, cases.mamba2_state_update(rng, dtype, ntokens=3, **row), dt_softplus=True)


@pytest.mark.parametrize(
    "row",
    (
        dict(dim=1, ngroups=1),
        dict(dim=3, ngroups=1),
        dict(dim=100, ngroups=4),
        dict(dim=257, ngroups=1, dstate=16),
        dict(dstate=1),
        dict(dstate=12),
        dict(dstate=96),
        dict(dstate=256),
        dict(dstate=0),
        dict(dim=0, ngroups=1),
        dict(dim=6, dstate=1100),
    ),
    ids=str,
)
@pytest.mark.parametrize("complex_A", (False, True))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_mamba1_sizes(device, rng, row, dtype, complex_A):
    MAMBA1.check(device, cases.mamba1_state_update(rng, dtype, complex_A=complex_A, **row), dt_softplus=True)
    MAMBA1.check(device, cases.mamba1_state_update(rng, dtype, complex_A=complex_A, ntokens=3, **row), dt_softplus=True)


@pytest.mark.parametrize("op", (MAMBA1, MAMBA2), ids=("mamba1", "mamba2"))
@pytest.mark.parametrize("state_dtype", ("float32", *NARROW))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
@pytest.mark.parametrize("ntokens", (None, 4))
@pytest.mark.parametrize("dstate", (7, 16, 128, 300))
def test_dtypes_of_states(device, rng, op, dtype, state_dtype, ntokens, dstate):
    op.check(device, op.inputs(rng, dtype, ntokens=ntokens, state_dtype=state_dtype, dstate=dstate), dt_softplus=True)


@pytest.mark.parametrize("op", (MAMBA1, MAMBA2), ids=("mamba1", "mamba2"))
@pytest.mark.parametrize("dt_dtype", ("float32", *NARROW))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_dtypes_of_dt(device, rng, op, dtype, dt_dtype):
    op.check(device, op.inputs(rng, dtype, dt_dtype=dt_dtype), dt_softplus=True)


@pytest.mark.parametrize("complex_A", (False, True))
@pytest.mark.parametrize("varying", ((True, False), (False, True), (False, False)))
@pytest.mark.parametrize("ntokens", (None, 3))
def test_projections(device, rng, varying, complex_A, ntokens):
    inputs = cases.mamba1_state_update(rng, ntokens=ntokens, varying_B=varying[0], varying_C=varying[1], complex_A=complex_A)
    MAMBA1.check(device, inputs, dt_softplus=True)


@pytest.mark.parametrize("op", (MAMBA1, MAMBA2), ids=("mamba1", "mamba2"))
@pytest.mark.parametrize(
    "options",
    (
        dict(),
        dict(dt_limit=(0.0, 0.1)),
        dict(dt_softplus=True, dt_limit=(0.05, 0.2)),
        dict(dt_softplus=True, dt_limit=(0.3, 0.3)),
    ),
    ids=str,
)
def test_steps(device, rng, op, options):
    inputs = op.inputs(rng, ntokens=3)
    if "dt_softplus" not in options:
        inputs["dt"], inputs["dt_bias"] = np.abs(inputs["dt"]) / 8, np.abs(inputs["dt_bias"]) / 8
    op.check(device, inputs, **options)


@pytest.mark.parametrize("op", (MAMBA1, MAMBA2), ids=("mamba1", "mamba2"))
@pytest.mark.parametrize("A", (-1e5, -1e3, 0.0, 0.3))
@pytest.mark.parametrize("dt", (0.0, 1e-8, 1.0, 20.1, 50.0))
def test_extremes(device, rng, op, A, dt):
    inputs = op.inputs(rng, omit=("dt_bias",))
    inputs["A"][:] = A
    inputs["dt"][:] = dt
    op.check(device, inputs)
    op.check(device, inputs, dt_softplus=True)


@pytest.mark.parametrize("op", (MAMBA1, MAMBA2), ids=("mamba1", "mamba2"))
@pytest.mark.parametrize("v", (-80.0, -40.0, -17.0))
def test_softplus_of_very_negative_steps(device, rng, op, v):
    inputs = op.inputs(rng, omit=("D", "dt_bias"))
    inputs["state"][:] = 0
    inputs["dt"][:] = v
    got = op.check(device, inputs, dt_softplus=True)
    assert np.any(got["y"]) and np.any(got["state"])


def test_D_of_every_shape(device, rng):
    for D in (rng.standard_normal(6), rng.standard_normal((6, 5))):
        for ntokens in (None, 2):
            inputs = {**cases.mamba2_state_update(rng, ntokens=ntokens), "D": D.astype(np.float32)}
            MAMBA2.check(device, inputs, dt_softplus=True)


# ---- reading one slot, writing another ---------------------------------------------------------------------------------
@pytest.mark.parametrize("op", (MAMBA1, MAMBA2), ids=("mamba1", "mamba2"))
@pytest.mark.parametrize(
    "reads,writes",
    (
        ((0, 1, 2), (3, 4, 5)),
        ((0, 1, 2), (0, 5, -1)),
        ((0, -1, 2), (3, 4, 5)),
        ((-1, -1, -1), (0, 1, 2)),
        ((4, 0, 2), (-1, -1, -1)),
        ((1, 1, 1), (3, 4, 5)),
        ((5, 3, 4), (5, 3, 4)),
    ),
)
@pytest.mark.parametrize("ntokens", (None, 3))
def test_out_state_indices(device, rng, op, reads, writes, ntokens):
    """Rows that share a prefix read one slot and write their own; -1 reads nothing, or writes nothing."""
    inputs = op.inputs(rng, batch=3, slots=6, ntokens=ntokens)
    options = dict(state_indices=indices(*reads), out_state_indices=indices(*writes), dt_softplus=True)
    expected, got = op.expected(inputs, **options), op.run(device, inputs, **options)
    assert_accurate(got["y"], expected["y"], "y")
    written = [write for read, write in zip(reads, writes) if read >= 0 and write >= 0]
    kept = [slot for slot in range(6) if slot not in written]
    assert_same_bits(got["state"][kept], inputs["state"][kept], "slots that are not written")
    if written:
        assert_accurate(got["state"][written], expected["state"][written], "state")


def test_out_state_indices_alone(device, rng):
    inputs = cases.mamba2_state_update(rng, batch=3, slots=3)
    MAMBA2.check(device, inputs, out_state_indices=indices(0, -1, 2), dt_softplus=True)


@pytest.mark.parametrize(
    "slots,text",
    (
        (indices(0, 6, 1), "out_state_indices[1]=6 must lie in 0..5, or be -1 for padding"),
        (indices(0, 1), "out_state_indices has shape (2,); expected (batch=3)"),
    ),
)
def test_out_state_indices_rules(rng, slots, text):
    inputs = cases.mamba2_state_update(rng, batch=3, slots=6)
    with pytest.raises(ValueError) as raised:
        MAMBA2.run(Cpu(), inputs, state_indices=indices(0, 1, 2), out_state_indices=slots)
    assert f"selective_state_update: {text}" in str(raised.value)


# ---- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change,error,text",
    (
        (
            dict(state=np.zeros((3, 7), np.float32)),
            ValueError,
            "state has shape (3, 7); expected (slots, dim, dstate) for Mamba-1 or (slots, nheads, headdim, dstate) for Mamba-2",
        ),
        (
            dict(x=np.zeros((3, 6), np.float32)),
            ValueError,
            "x has shape (3, 6); expected (batch, nheads, headdim) or (batch, ntokens, nheads, headdim), to go with a state of four axes",
        ),
        (
            dict(state=np.zeros((3, 6, 7), np.float32), x=np.zeros((3, 6, 5, 1), np.float32)),
            ValueError,
            "to go with a state of three axes",
        ),
        (dict(B=np.zeros((3, 4, 7), np.float32)), ValueError, "ngroups=4 (from B, shape (3, 4, 7)) must divide nheads=6"),
        (dict(C=np.zeros((3, 3, 7), np.float32)), ValueError, "C has shape (3, 3, 7); expected (batch=3, ngroups=2, dstate=7)"),
        (dict(A=np.zeros(5, np.float32)), ValueError, "A has shape (5,); expected (nheads=6)"),
        (dict(dt=np.zeros((3, 5), np.float32)), ValueError, "dt has shape (3, 5); expected (batch=3, nheads=6)"),
        (dict(A=np.zeros(6, np.complex64)), TypeError, "A is complex64; expected float32"),
        (dict(state=np.zeros((3, 6, 5, 7), np.float64)), TypeError, "state is float64; expected float32, float16 or bfloat16"),
        (dict(dt_limit=(2.0, 1.0)), ValueError, "dt_limit=(2, 1) must be ordered (low, high)"),
        (dict(state=None), ValueError, "state is required"),
        (dict(A=None), ValueError, "A is required"),
        (dict(dt=None), ValueError, "dt is required"),
        (dict(B=None), ValueError, "B is required"),
    ),
    ids=lambda v: None if not isinstance(v, dict) else "-".join(v),
)
def test_errors(rng, change, error, text):
    with pytest.raises(error) as raised:
        statescan.selective_state_update(**{**cases.mamba2_state_update(rng), **change})
    assert str(raised.value).startswith("selective_state_update: ") and text in str(raised.value)
