"""The scalar functions and conversions inside the kernels, point by point: each reached through an op that shows it alone."""

import cases
import numpy as np
import pytest
import statescan
from support import DTYPES, NARROW, exact

ULP = {"float32": 2.0**-24, "float64": 2.0**-53}


def bound(device):
    """Half-units that silu and softplus may be off: exp and reciprocal are the special-function unit's on a GPU, whose errors grow
    with the exponent; float32 has 1e-5 to keep, which is 168."""
    return 64 if device.name == "cuda" else 8


def ones(device, dtype, *shape):
    return device.put(np.ones(shape, DTYPES[dtype]))


def assert_pointwise(got, expected, dtype, ulps, floor=0.0):
    """Each value within some half-units in the last place of the exact one, or within `floor` of it."""
    with np.errstate(invalid="ignore"):
        error = np.abs(exact(got) - expected) - floor
    finite = np.isfinite(expected)
    worst = np.max(np.where(finite, error / np.maximum(np.abs(expected), 1e-300), 0)) / ULP[dtype]
    assert worst <= ulps, f"{worst:.3g} half-ulps"
    np.testing.assert_array_equal(got[~finite], expected[~finite].astype(got.dtype))


def points(dtype, low, high):
    spread = np.concatenate([np.linspace(low, high, 4001), np.linspace(-1, 1, 1001), [0.0, -0.0, 1e-30, -1e-30, 1e-6, -1e-6]])
    return np.sort(spread[(spread >= low) & (spread <= high)]).astype(dtype)


# ---- conversions -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", NARROW)
def test_every_narrow_value_passes(device, dtype):
    """A convolution with the weight 1 of one token gives back every one of the 65536 values, subnormals and all."""
    x = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype])[None, None]
    weight = np.zeros((65536, 2), np.float32)
    weight[:, 1] = 1
    y = device.get(device.call(statescan.causal_conv1d, device.put(x), device.put(weight)))
    is_nan = np.isnan(x.astype(np.float32))
    assert np.all(np.isnan(y.astype(np.float32)[is_nan]))
    np.testing.assert_array_equal(y[~is_nan].astype(np.float64), x[~is_nan].astype(np.float64))


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_is_to_nearest_even(device, rng, dtype):
    """float32 states through a scan of no chunks into a narrow final state: every exponent, ties, overflow, NaN payloads."""
    bits = rng.integers(0, 2**32, 2**16, dtype=np.uint32)
    ties = (bits & 0xFFFFE000) | 0x1000 if dtype == "float16" else (bits & 0xFFFF0000) | 0x8000
    special = np.array(
        [
            0x7FFFFFFF,
            0xFFFFFFFF,
            0x7F800001,
            0x7F800000,
            0xFF800000,
            0x477FEFFF,
            0x477FF000,
            0x33000000,
            0x33000001,
            0x7F7FFFFF,
            0,
            0x80000000,
            1,
            0x387FC000,
            0x387FE000,
        ],
        np.uint32,
    )
    state = np.concatenate([bits, ties, special]).view(np.float32).reshape(1, 1, -1, 1)
    final_state = device.put(np.zeros(state.shape, DTYPES[dtype]))
    device.call(
        statescan.state_scan,
        device.put(np.zeros((1, 0, 1), np.float32)),
        device.put(np.zeros((1, 0, 1, state.size, 1), np.float32)),
        initial_state=device.put(state),
        final_state_out=final_state,
    )
    got = device.get(final_state)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = state.astype(DTYPES[dtype])
    is_nan = np.isnan(state)
    assert np.all(np.isnan(got.astype(np.float32)[is_nan]))
    np.testing.assert_array_equal(got.view(np.uint16)[~is_nan], expected.view(np.uint16)[~is_nan])


def test_results_too_large_for_float16_are_infinite(device):
    x = device.put(np.array([6e4, -6e4, 3e4, 1.0], np.float16)[None, None])
    y = device.get(device.call(statescan.causal_conv1d, x, device.put(np.full((4, 2), 2, np.float32))))
    np.testing.assert_array_equal(y[0, 0], np.array([np.inf, -np.inf, 6e4, 2], np.float16))


# ---- functions ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ("float32", "float64"))
def test_exp(device, dtype):
    """exp(log_decay) times a state of 1."""
    if dtype == "float64" and device.name == "cuda":
        pytest.skip("float64 runs on the CPU")
    low, high = (-110, 88.7) if dtype == "float32" else (-750, 709)
    v = np.concatenate([points(dtype, low, high), np.array([-np.inf, -1e5, -1e30, np.inf, 1e5], dtype)])
    _, final_state = device.call(
        statescan.state_scan,
        device.put(v[None, None]),
        device.put(np.zeros((1, 1, v.size, 1, 1), dtype)),
        initial_state=ones(device, dtype, 1, v.size, 1, 1),
    )
    with np.errstate(over="ignore", under="ignore"):
        expected = np.exp(v.astype(np.longdouble)).astype(np.float64)
    assert_pointwise(device.get(final_state)[0, :, 0, 0], expected, dtype, 4, floor=float(np.finfo(dtype).tiny))


@pytest.mark.parametrize("dtype", ("float32", "float64"))
def test_silu(device, dtype):
    if dtype == "float64" and device.name == "cuda":
        pytest.skip("float64 runs on the CPU")
    v = points(dtype, -100, 100)
    weight = np.zeros((v.size, 2), dtype)
    weight[:, 1] = 1
    y = device.get(device.call(statescan.causal_conv1d, device.put(v[None, None]), device.put(weight), activation="silu"))
    wide = v.astype(np.longdouble)
    assert_pointwise(y[0, 0], (wide / (1 + np.exp(-wide))).astype(np.float64), dtype, bound(device), floor=float(np.finfo(dtype).tiny) * 100)


@pytest.mark.parametrize("op", ("selective_scan", "selective_state_update", "ssd_scan"))
@pytest.mark.parametrize("dtype", ("float32", "float64"))
def test_softplus(device, dtype, op):
    """One token with A = 0 and x = B = C = 1: y = softplus(dt)."""
    if dtype == "float64" and device.name == "cuda":
        pytest.skip("float64 runs on the CPU")
    v = points(dtype, -87 if dtype == "float32" else -700, 100)
    one = lambda *shape: ones(device, dtype, *shape)
    zero = lambda *shape: device.put(np.zeros(shape, dtype))
    if op == "selective_scan":
        y = device.call(
            statescan.selective_scan,
            one(1, 1, v.size),
            device.put(v[None, None]),
            zero(v.size, 1),
            one(1, 1, 1, 1),
            one(1, 1, 1, 1),
            dt_softplus=True,
        )
    elif op == "ssd_scan":
        y = device.call(
            statescan.ssd_scan,
            one(1, 1, v.size, 1),
            device.put(v[None, None]),
            zero(v.size),
            one(1, 1, 1, 1),
            one(1, 1, 1, 1),
            dt_softplus=True,
        )
    else:
        y = device.call(
            statescan.selective_state_update,
            zero(1, v.size, 1),
            one(1, v.size),
            device.put(v[None]),
            zero(v.size, 1),
            one(1, 1, 1),
            one(1, 1, 1),
            dt_softplus=True,
        )
    wide = v.astype(np.longdouble)
    expected = (np.maximum(wide, 0) + np.log1p(np.exp(-np.abs(wide)))).astype(np.float64)
    # On a GPU ssd_scan multiplies float32 as sums of bfloat16 terms: the last of them ends where bfloat16 does.
    floor = float(np.finfo(dtype).tiny) if device.name == "cuda" else 0.0
    assert_pointwise(device.get(y).ravel(), expected, dtype, bound(device), floor)


@pytest.mark.parametrize("turns", (1, 100, 1e4))
def test_complex_exponential(device, rng, turns):
    """exp(i v) for phases of many turns; powers of two for dt make them exact."""
    phase = (rng.uniform(-1, 1, 4096) * 2 * np.pi * turns).astype(np.float32)
    A = (1j * phase).astype(np.complex64)[:, None]
    state = np.ones((1, 4096, 1), np.complex64)
    zero = np.zeros((1, 1, 4096), np.float32)
    _, final_state = device.call(
        statescan.selective_scan,
        device.put(zero),
        device.put(zero + np.float32(1)),
        device.put(A),
        device.put(np.ones((1, 1, 1, 1), np.complex64)),
        device.put(np.ones((1, 1, 1, 1), np.complex64)),
        initial_state=device.put(state),
        return_final_state=True,
    )
    error = np.abs(device.get(final_state)[0, :, 0] - np.exp(1j * phase.astype(np.float64)))
    assert error.max() < 1e-6


# ---- NaN ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dt_limit", (None, (0.0, 1.0), (0.01, float("inf"))))
@pytest.mark.parametrize("dt_softplus", (False, True))
def test_a_bad_step_is_not_limited_away(device, rng, dt_softplus, dt_limit):
    """A NaN in dt stays NaN through softplus and limits, and shows in everything after it."""
    options = dict(dt_softplus=dt_softplus, dt_limit=dt_limit)
    for op in (cases.SSD_SCAN, cases.SELECTIVE_SCAN):
        inputs = op.inputs(rng, omit=("dt_bias",))
        inputs["dt"] = np.abs(inputs["dt"]) / 8
        inputs["dt"][0, 20] = np.nan
        got = op.run(device, inputs, **options)
        assert np.all(np.isnan(got["y"][0, 20:])) and np.all(np.isnan(got["final_state"][0]))
        assert np.all(np.isfinite(got["y"][0, :20])) and np.all(np.isfinite(got["y"][1]))
    for op in (cases.MAMBA1_STATE_UPDATE, cases.MAMBA2_STATE_UPDATE):
        inputs = op.inputs(rng, omit=("dt_bias",))
        inputs["dt"] = np.abs(inputs["dt"]) / 8
        inputs["dt"][1] = np.nan
        got = op.run(device, inputs, **options)
        assert np.all(np.isnan(got["y"][1])) and np.all(np.isnan(got["state"][1])) and np.all(np.isfinite(got["y"][0]))
