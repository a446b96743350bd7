import cases
import numpy as np
import pytest
import statescan
from gradient_contract import GradientContract
from scan_contract import ScanContract
from support import NARROW, Cpu, assert_same_bits, laid_out, poison

OP = cases.CAUSAL_CONV1D


class TestCausalConv1d(ScanContract):
    op = OP
    optional = ("bias", "initial_state")


class TestWidest(TestCausalConv1d):
    sizes = dict(width=8, dim=37)


@pytest.mark.parametrize("seqlen", (0, 1, 2, 3, 6, 7, 8, 9, 67))
@pytest.mark.parametrize("width", (2, 3, 4, 5, 6, 7, 8))
@pytest.mark.parametrize("reverse", (False, True))
def test_widths(device, rng, width, seqlen, reverse):
    """known_bugs 11: sequences shorter than the window take part of the final state from the initial one."""
    for omit in ((), ("initial_state",)):
        inputs = cases.causal_conv1d(rng, width=width, seqlen=seqlen, omit=omit)
        OP.check(device, inputs, activation="silu", reverse=reverse)


@pytest.mark.parametrize("width", (2, 4, 8))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_packed_sequences_shorter_than_the_window(device, rng, width, dtype):
    lengths = [1, 0, 2, 3, 7, 1, 8, 0, 9]
    inputs = cases.causal_conv1d(rng, dtype, batch=1, seqlen=sum(lengths), sequences=len(lengths), width=width)
    for reverse in (False, True):
        OP.check(device, inputs, activation="silu", reverse=reverse, cu_seqlens=np.cumsum([0, *lengths]))


@pytest.mark.parametrize(
    "row",
    (
        dict(dim=1),
        dict(dim=3),
        dict(dim=8),
        dict(dim=16),
        dict(dim=31),
        dict(dim=100),
        dict(dim=1025, seqlen=19),
        dict(dim=0),
        dict(dim=65537, seqlen=4, batch=1),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_sizes(device, rng, row, dtype):
    OP.check(device, cases.causal_conv1d(rng, dtype, **row), activation="silu")


@pytest.mark.parametrize("weight_dtype", ("float32", "same"))
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("activation", (None, "silu"))
def test_dtypes_of_weights(device, rng, dtype, weight_dtype, activation):
    inputs = cases.causal_conv1d(rng, dtype, weight_dtype=dtype if weight_dtype == "same" else "float32")
    OP.check(device, inputs, activation=activation)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("state_dtype", ("float32", "same"))
def test_dtypes_of_states(device, rng, dtype, state_dtype):
    inputs = cases.causal_conv1d(rng, dtype, state_dtype=dtype if state_dtype == "same" else "float32")
    final_state = poison(inputs["initial_state"].shape, inputs["initial_state"].dtype)
    OP.check(device, inputs, {"final_state": final_state}, activation="silu")


@pytest.mark.parametrize("width", (2, 3, 4, 8))
@pytest.mark.parametrize("activation", (None, "silu"))
def test_float64(rng, width, activation):
    OP.check(Cpu(), cases.causal_conv1d(rng, "float64", width=width), activation=activation)


@pytest.mark.parametrize("seqlen", (1, 3, 64, 67, 257))
@pytest.mark.parametrize("width", (2, 4, 5))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_channels_first_callers(device, rng, dtype, width, seqlen):
    """x and y as transposed views of [b,d,l], states and all (known_bugs 21)."""
    inputs = cases.causal_conv1d(rng, dtype, width=width, seqlen=seqlen)
    inputs["x"] = laid_out(inputs["x"], "channels_first")
    y = laid_out(poison(inputs["x"].shape, inputs["x"].dtype), "channels_first")
    OP.check(device, inputs, {"y": y}, activation="silu")
    OP.check(device, inputs, {"y": y}, activation="silu", reverse=True)


def test_final_state_may_be_the_initial_state(device, rng):
    """A cache updated in place: the state is read before it is written."""
    inputs = cases.causal_conv1d(rng)
    expected = OP.expected(inputs, activation="silu")
    state = device.put(inputs["initial_state"].copy())
    rest = {name: device.put(value) for name, value in inputs.items() if name != "initial_state"}
    y, final_state = device.call(statescan.causal_conv1d, **rest, initial_state=state, final_state_out=state, activation="silu")
    np.testing.assert_allclose(device.get(y), expected["y"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(device.get(final_state), expected["final_state"].astype(np.float32))


def test_final_state_is_exact(device, rng):
    for dtype in ("float32", *NARROW):
        inputs = cases.causal_conv1d(rng, dtype, seqlen=67, width=5)
        final_state = OP.run(device, inputs)["final_state"]
        assert_same_bits(final_state.astype(inputs["x"].dtype), np.swapaxes(inputs["x"][:, -4:], 1, 2), "final_state")


def test_final_state_only_when_asked_for(device, rng):
    inputs = {name: device.put(value) for name, value in cases.causal_conv1d(rng).items()}
    y = device.call(statescan.causal_conv1d, **inputs)
    both = device.call(statescan.causal_conv1d, **inputs, return_final_state=True)
    assert not isinstance(y, tuple) and isinstance(both, tuple) and len(both) == 2
    assert_same_bits(device.get(y), device.get(both[0]), "y")


@pytest.mark.parametrize("scale", (1e-30, 1e-3, 30.0, 1e4))
def test_silu_at_any_scale(device, rng, scale):
    inputs = cases.causal_conv1d(rng, omit=("bias",))
    inputs = {**inputs, "x": inputs["x"] * np.float32(scale), "initial_state": inputs["initial_state"] * np.float32(scale)}
    OP.check(device, inputs, activation="silu")


def test_bad_channel_stays_alone(device, rng):
    clean = cases.causal_conv1d(rng, dim=21)
    expected = OP.run(device, clean, activation="silu")
    spoiled = {**clean, "x": clean["x"].copy()}
    spoiled["x"][0, 20, 4] = np.nan
    got = OP.run(device, spoiled, activation="silu")
    good = np.ones(got["y"].shape, bool)
    good[0, 20:24, 4] = False
    assert_same_bits(got["y"][good], expected["y"][good], "y")
    assert np.all(np.isnan(got["y"][~good]))
    assert_same_bits(got["final_state"], expected["final_state"], "final_state")


# ---- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "change,error,text",
    (
        (
            dict(weight=np.zeros((13, 1), np.float32)),
            ValueError,
            "causal_conv1d: width=1 (from weight, shape (13, 1)) must be between 2 and 8",
        ),
        (
            dict(weight=np.zeros((13, 9), np.float32)),
            ValueError,
            "causal_conv1d: width=9 (from weight, shape (13, 9)) must be between 2 and 8",
        ),
        (
            dict(weight=np.zeros((12, 4), np.float32)),
            ValueError,
            "causal_conv1d: weight has shape (12, 4); expected (dim=13, width)",
        ),
        (dict(bias=np.zeros(12, np.float32)), ValueError, "causal_conv1d: bias has shape (12,); expected (dim=13)"),
        (
            dict(initial_state=np.zeros((2, 13, 4), np.float32)),
            ValueError,
            "causal_conv1d: initial_state has shape (2, 13, 4); expected (batch=2, dim=13, width - 1=3)",
        ),
        (dict(bias=np.zeros(13, np.float16)), TypeError, "causal_conv1d: bias is float16; expected float32"),
        (dict(weight=np.zeros((13, 4), np.float64)), TypeError, "causal_conv1d: weight is float64; expected float32"),
        (dict(activation="relu"), ValueError, "activation"),
    ),
    ids=lambda v: None if not isinstance(v, dict) else "-".join(v),
)
def test_errors(device, rng, change, error, text):
    with pytest.raises(error) as raised:
        OP.run(device, {**cases.causal_conv1d(rng), **change})
    assert text in str(raised.value)


# ---- backward ----------------------------------------------------------------------------------------------------------
BACKWARD = cases.CAUSAL_CONV1D_BACKWARD


class TestBackward(GradientContract):
    op = BACKWARD
    optional = ("bias", "initial_state")

    def torch_forward(self, x, weight, bias=None, initial_state=None, activation=None, reverse=False):
        import torch

        batch, seqlen, dim = x.shape
        taps = weight.shape[1] - 1
        past = x.new_zeros(batch, dim, taps) if initial_state is None else initial_state
        inputs = torch.cat([past, (x.flip(1) if reverse else x).transpose(1, 2)], dim=2)
        y = torch.nn.functional.conv1d(inputs, weight[:, None], bias, groups=dim).transpose(1, 2)
        y = torch.nn.functional.silu(y) if activation == "silu" else y
        return y.flip(1) if reverse else y, inputs[:, :, seqlen:]


class TestBackwardWidest(TestBackward):
    sizes = dict(width=8, dim=37)


@pytest.mark.parametrize("activation", (None, "silu"))
@pytest.mark.parametrize("seqlen", (0, 1, 2, 3, 6, 7, 8, 9, 67, 513, 519))
@pytest.mark.parametrize("width", (2, 3, 4, 5, 6, 7, 8))
def test_backward_widths(device, rng, width, seqlen, activation):
    """known_bugs 11: sequences shorter than the window pass a part of dfinal_state on to the initial state."""
    BACKWARD.check(device, BACKWARD.inputs(rng, width=width, seqlen=seqlen), activation=activation)
    BACKWARD.check(device, BACKWARD.inputs(rng, width=width, seqlen=seqlen), activation=activation, reverse=True)


@pytest.mark.parametrize("width", (2, 4, 8))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_backward_packed_sequences_shorter_than_the_window(device, rng, width, dtype):
    lengths = [1, 0, 2, 3, 7, 1, 8, 0, 9]
    inputs = BACKWARD.inputs(rng, dtype, batch=1, seqlen=sum(lengths), sequences=len(lengths), width=width)
    for reverse in (False, True):
        BACKWARD.check(device, inputs, activation="silu", reverse=reverse, cu_seqlens=np.cumsum([0, *lengths]))


@pytest.mark.parametrize("dim", (0, 1, 3, 16, 63, 64, 65, 200))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_backward_dims(device, rng, dim, dtype):
    BACKWARD.check(device, BACKWARD.inputs(rng, dtype, dim=dim), activation="silu")


@pytest.mark.parametrize("dtype", NARROW)
def test_backward_dtypes_of_parameters_and_states(device, rng, dtype):
    for sizes in (dict(weight_dtype=dtype), dict(state_dtype="float32"), dict(weight_dtype=dtype, state_dtype="float32")):
        BACKWARD.check(device, BACKWARD.inputs(rng, dtype, **sizes), activation="silu")


def test_backward_of_many_sequences(device, rng):
    """More segments than partial sums."""
    lengths = [int(n) for n in rng.integers(0, 9, 150)] + [1100]
    inputs = BACKWARD.inputs(rng, batch=1, seqlen=sum(lengths), sequences=len(lengths))
    BACKWARD.check(device, inputs, activation="silu", cu_seqlens=np.cumsum([0, *lengths]))


@pytest.mark.parametrize("scale", (1e-30, 1e-3, 30.0, 1e4))
def test_backward_silu_at_any_scale(device, rng, scale):
    inputs = BACKWARD.inputs(rng, omit=("bias",))
    inputs |= {name: inputs[name] * np.float32(scale) for name in ("x", "initial_state")}
    BACKWARD.check(device, inputs, activation="silu")


def test_backward_bad_channel_stays_alone(device, rng):
    clean = BACKWARD.inputs(rng, dim=21)
    expected = BACKWARD.run(device, clean, activation="silu")
    others = [c for c in range(21) if c != 4]
    for name in ("x", "dy"):
        spoiled = {**clean, name: clean[name].copy()}
        spoiled[name][0, 20, 4] = np.nan
        got = BACKWARD.run(device, spoiled, activation="silu")
        assert_same_bits(got["dx"][:, :, others], expected["dx"][:, :, others], f"dx beside a bad {name}")
        assert_same_bits(got["dx"][:, 24:], expected["dx"][:, 24:], f"dx after a bad {name}")
        for gradient in ("dweight", "dbias"):
            assert_same_bits(got[gradient][others], expected[gradient][others], f"{gradient} beside a bad {name}")


@pytest.mark.parametrize("sizes", (dict(seqlen=8), dict(seqlen=64), dict(seqlen=520), dict(seqlen=4104, dim=3)), ids=str)
@pytest.mark.parametrize("width", (2, 4, 8))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_backward_channels_first_callers(device, rng, dtype, width, sizes):
    """x and dy as transposed views of [b,d,l], states and all."""
    inputs = BACKWARD.inputs(rng, dtype, width=width, **sizes)
    inputs |= {name: laid_out(inputs[name], "channels_first") for name in ("x", "dy")}
    for reverse in (False, True):
        BACKWARD.check(device, inputs, activation="silu", reverse=reverse)


@pytest.mark.parametrize("width", (3, 4))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_backward_of_long_sequences(device, rng, dtype, width):
    """Several segments of tokens, with runs of channels."""
    BACKWARD.check(device, BACKWARD.inputs(rng, dtype, width=width, dim=16, seqlen=1031), activation="silu")
    lengths = [700, 1, 330]
    inputs = BACKWARD.inputs(rng, dtype, batch=1, width=width, dim=16, seqlen=1031, sequences=3)
    BACKWARD.check(device, inputs, activation="silu", reverse=True, cu_seqlens=np.cumsum([0, *lengths]))
