import cases
import numpy as np
import pytest
import statescan
from scan_contract import ScanContract
from support import NARROW, Cpu, assert_accurate, assert_same_bits, poison

OP = cases.MAMBA2_SCAN


class TestMamba2Scan(ScanContract):
    op = OP
    optional = ("conv_bias", "dt_bias", "D", "norm_weight", "initial_conv_state", "initial_state")

    def test_missing_arguments(self, device, rng):
        inputs = self.make(rng)
        for name in ("zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A"):  # conv_bias and dt_bias may be None, not left out
            with pytest.raises(TypeError, match=name):
                self.op.run(device, {k: v for k, v in inputs.items() if k != name}, **self.op.options)
        for name in ("zxbcdt", "conv_weight", "A"):
            with pytest.raises(ValueError, match=f"mamba2_scan: {name} is required"):
                self.op.run(device, {**inputs, name: None}, **self.op.options)


@pytest.mark.parametrize(
    "row",
    (
        dict(nheads=1, ngroups=1),
        dict(nheads=3, ngroups=1),
        dict(nheads=3, ngroups=3),
        dict(nheads=8, ngroups=2),
        dict(headdim=40),
        dict(headdim=64, dstate=128, nheads=2, ngroups=1),
        dict(headdim=80),
        dict(dstate=1),
        dict(dstate=12),
        dict(dstate=96),
        dict(dstate=256),
        dict(width=2),
        dict(width=3),
        dict(width=8),
        dict(headdim=1),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_sizes(device, rng, row, dtype):
    OP.check(device, cases.mamba2_scan(rng, dtype, **row), ngroups=row.get("ngroups", 3))


@pytest.mark.parametrize(
    "options",
    (
        dict(norm_before_gate=True),
        dict(norm_group_size=60),
        dict(norm_group_size=5),
        dict(norm_group_size=10, norm_before_gate=True),
        dict(eps=0.1),
        dict(dt_softplus=False),
        dict(dt_limit=(0.05, 0.2)),
        dict(reverse=True, norm_before_gate=True),
        dict(chunk_size=40),
        dict(chunk_size=1),
        dict(chunk_size=256),
        dict(batch_invariant=True),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_options(device, rng, options, dtype):
    inputs = cases.mamba2_scan(rng, dtype)
    if "dt_softplus" in options:
        inputs["dt_bias"] = np.abs(inputs["dt_bias"])
        inputs["zxbcdt"][:, :, -6:] = np.abs(inputs["zxbcdt"][:, :, -6:]) / 8
    OP.check(device, inputs, ngroups=3, **options)


@pytest.mark.parametrize("weight_dtype", ("float32", "same"))
@pytest.mark.parametrize("dtype", NARROW)
def test_dtypes_of_weights(device, rng, dtype, weight_dtype):
    OP.check(device, cases.mamba2_scan(rng, dtype, weight_dtype=dtype if weight_dtype == "same" else "float32"), ngroups=3)


@pytest.mark.parametrize("state_dtype", ("float32", *NARROW))
def test_dtypes_of_states(device, rng, state_dtype):
    inputs = cases.mamba2_scan(rng, "bfloat16", state_dtype=state_dtype)
    inputs["initial_conv_state"] = inputs["initial_conv_state"].astype(np.float32)
    out = {
        "final_state": poison(inputs["initial_state"].shape, inputs["initial_state"].dtype),
        "final_conv_state": poison(inputs["initial_conv_state"].shape, np.float32),
    }
    OP.check(device, inputs, out, ngroups=3)


def test_D_of_every_shape(device, rng):
    for D in (rng.standard_normal(6), rng.standard_normal((6, 10))):
        OP.check(device, {**cases.mamba2_scan(rng), "D": D.astype(np.float32)}, ngroups=3)


def test_is_its_parts(device, rng):
    """The fused block beside the same block from our other ops, in float32."""
    given = cases.mamba2_scan(rng)
    put = {name: device.put(value) for name, value in given.items()}
    z, xBC, dt = (np.ascontiguousarray(v) for v in np.split(given["zxbcdt"], [60, 162], axis=2))
    xBC = device.get(
        device.call(
            statescan.causal_conv1d,
            device.put(xBC),
            put["conv_weight"],
            put["conv_bias"],
            activation="silu",
            initial_state=put["initial_conv_state"],
        )
    )
    x, B, C = np.split(xBC, [60, 81], axis=2)
    views = [np.ascontiguousarray(v) for v in (x.reshape(2, 67, 6, 10), B.reshape(2, 67, 3, 7), C.reshape(2, 67, 3, 7))]
    x, B, C = (device.put(v) for v in views)
    y = device.get(
        device.call(
            statescan.ssd_scan,
            x,
            device.put(dt),
            put["A"],
            B,
            C,
            D=put["D"],
            dt_bias=put["dt_bias"],
            dt_softplus=True,
            initial_state=put["initial_state"],
        )
    )
    y = device.call(statescan.gated_rms_norm, device.put(y.reshape(2, 67, 60)), device.put(z), put["norm_weight"], group_size=20)
    fused = OP.run(device, given, ngroups=3)["y"]
    assert_accurate(fused, device.get(y).astype(np.float64), "y")


@pytest.mark.parametrize("omit", ((), ("norm_weight",)))
def test_float64(rng, omit):
    for options in (dict(), dict(norm_before_gate=True, norm_group_size=30), dict(reverse=True)):
        OP.check(Cpu(), cases.mamba2_scan(rng, "float64", omit=omit), ngroups=3, **options)


def test_final_states_only_when_asked_for(device, rng):
    inputs = {name: device.put(value) for name, value in cases.mamba2_scan(rng).items()}
    y = device.call(statescan.mamba2_scan, **inputs, ngroups=3)
    every = device.call(statescan.mamba2_scan, **inputs, ngroups=3, return_final_states=True)
    assert not isinstance(y, tuple) and isinstance(every, tuple) and len(every) == 3
    assert_same_bits(device.get(y), device.get(every[0]), "y")


def test_bad_z_stays_in_its_token(device, rng):
    clean = cases.mamba2_scan(rng)
    expected = OP.run(device, clean, ngroups=3)
    spoiled = {**clean, "zxbcdt": clean["zxbcdt"].copy()}
    spoiled["zxbcdt"][0, 20, 5] = np.nan
    got = OP.run(device, spoiled, ngroups=3)
    good = np.ones(67, bool)
    good[20] = False
    assert_same_bits(got["y"][0, good], expected["y"][0, good], "y")
    assert np.isnan(got["y"][0, 20, 5])
    assert_same_bits(got["final_state"], expected["final_state"], "final_state")


# ---- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change,error,text",
    (
        (dict(ngroups=4), ValueError, "mamba2_scan: ngroups=4 (from A, shape (6,)) must divide nheads=6"),
        (dict(ngroups=0), ValueError, "mamba2_scan: ngroups=0 (from A, shape (6,)) must divide nheads=6"),
        (dict(ngroups=2), ValueError, "mamba2_scan: conv_dim=102 (from conv_weight) must be d_inner + 2 ngroups dstate"),
        (
            dict(zxbcdt=np.zeros((2, 67, 167), np.float32)),
            ValueError,
            "must be d_inner + conv_dim + nheads with d_inner a positive multiple of nheads",
        ),
        (dict(zxbcdt=np.zeros((2, 67, 90), np.float32)), ValueError, "must be d_inner + conv_dim + nheads"),
        (dict(norm_group_size=7), ValueError, "mamba2_scan: norm_group_size=7 must divide d_inner=60"),
        (dict(eps=-1.0), ValueError, "mamba2_scan: eps=-1 must not be negative"),
        (
            dict(conv_weight=np.zeros((102, 9), np.float32)),
            ValueError,
            "mamba2_scan: width=9 (from conv_weight, shape (102, 9)) must be between 2 and 8",
        ),
        (dict(dt_bias=np.zeros(5, np.float32)), ValueError, "mamba2_scan: dt_bias has shape (5,); expected (nheads=6)"),
        (dict(norm_weight=np.zeros(6, np.float32)), ValueError, "mamba2_scan: norm_weight has shape (6,); expected (d_inner=60)"),
        (dict(chunk_size=-1), ValueError, "mamba2_scan: chunk_size=-1 must be positive"),
        (dict(A=np.zeros(6, np.float64)), TypeError, "mamba2_scan: A is float64; expected float32"),
    ),
    ids=lambda v: None if not isinstance(v, dict) else "-".join(v),
)
def test_errors(device, rng, change, error, text):
    with pytest.raises(error) as raised:
        OP.run(device, {**cases.mamba2_scan(rng), "ngroups": 3, **change})
    assert text in str(raised.value)
