import cases
import numpy as np
import pytest
import statescan
from support import NARROW
from update_contract import UpdateContract, indices

OP = cases.CAUSAL_CONV1D_UPDATE


class TestCausalConv1dUpdate(UpdateContract):
    op = OP
    optional = ("bias",)


@pytest.mark.parametrize("ntokens", (None, 1, 2, 3, 7, 8, 9, 20))
@pytest.mark.parametrize("width", (2, 3, 4, 5, 6, 7, 8))
@pytest.mark.parametrize("activation", (None, "silu"))
def test_widths(device, rng, width, ntokens, activation):
    OP.check(device, cases.causal_conv1d_update(rng, width=width, ntokens=ntokens), activation=activation)


@pytest.mark.parametrize("dim", (0, 1, 3, 8, 16, 31, 100, 1025))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_dims(device, rng, dim, dtype):
    OP.check(device, cases.causal_conv1d_update(rng, dtype, dim=dim), activation="silu")
    OP.check(device, cases.causal_conv1d_update(rng, dtype, dim=dim, ntokens=3), activation="silu")


@pytest.mark.parametrize("weight_dtype", ("float32", "same"))
@pytest.mark.parametrize("state_dtype", ("float32", "same"))
@pytest.mark.parametrize("dtype", NARROW)
def test_dtypes(device, rng, dtype, state_dtype, weight_dtype):
    inputs = cases.causal_conv1d_update(
        rng,
        dtype,
        ntokens=2,
        weight_dtype=dtype if weight_dtype == "same" else "float32",
        state_dtype=dtype if state_dtype == "same" else "float32",
    )
    OP.check(device, inputs, activation="silu")


def test_state_holds_the_last_inputs(device, rng):
    inputs = cases.causal_conv1d_update(rng, ntokens=5, slots=4)
    got = OP.run(device, inputs, state_indices=indices(3, -1, 0))
    np.testing.assert_array_equal(got["state"][3], inputs["x"][0, -3:].T)
    np.testing.assert_array_equal(got["state"][0], inputs["x"][2, -3:].T)
    np.testing.assert_array_equal(got["state"][1:3], inputs["state"][1:3])


@pytest.mark.parametrize(
    "change,error,text",
    (
        (
            dict(x=np.zeros(13, np.float32)),
            ValueError,
            "causal_conv1d_update: x has shape (13,); expected (batch, dim) or (batch, ntokens, dim)",
        ),
        (
            dict(weight=np.zeros((13, 9), np.float32)),
            ValueError,
            "causal_conv1d_update: width=9 (from weight, shape (13, 9)) must be between 2 and 8",
        ),
        (
            dict(state=np.zeros((3, 13, 4), np.float32)),
            ValueError,
            "causal_conv1d_update: state has shape (3, 13, 4); expected (slots=3, dim=13, width - 1=3)",
        ),
        (dict(state=np.zeros((3, 13, 3), np.float16)), TypeError, "causal_conv1d_update: state is float16; expected float32"),
        (dict(state=None), ValueError, "causal_conv1d_update: state is required"),
        (dict(x=None), ValueError, "causal_conv1d_update: x is required"),
        (dict(activation="gelu"), ValueError, "activation"),
    ),
    ids=lambda v: None if not isinstance(v, dict) else "-".join(v),
)
def test_errors(rng, change, error, text):
    with pytest.raises(error) as raised:
        statescan.causal_conv1d_update(**{**cases.causal_conv1d_update(rng), **change})
    assert text in str(raised.value)
