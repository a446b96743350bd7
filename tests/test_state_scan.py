import cases
import numpy as np
import pytest
import reference.state_scan
import statescan
from scan_contract import PACKINGS, ScanContract, cumulative
from support import NARROW, Cpu, assert_accurate, assert_same_bits, exact, laid_out, poison


class TestStateScan(ScanContract):
    op = cases.STATE_SCAN
    optional = ("initial_state",)
    lengths = (0, 1, 2, 3, 5, 8, 31, 64, 65)


@pytest.mark.parametrize(
    "row",
    (
        dict(nheads=1),
        dict(nheads=2),
        dict(headdim=1),
        dict(headdim=40),
        dict(headdim=64, dstate=128, seqlen=17),
        dict(headdim=80),
        dict(dstate=1),
        dict(dstate=12),
        dict(dstate=96),
        dict(dstate=256),
        dict(headdim=3, dstate=512),
        dict(nheads=0),
        dict(headdim=0),
        dict(dstate=0),
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_sizes(device, rng, row, dtype):
    cases.STATE_SCAN.check(device, cases.state_scan(rng, dtype, **row))


@pytest.mark.parametrize("value", (0.0, -1e-8, -50.0, -1e5, -np.inf, 3.0))
def test_decays(device, rng, value):
    inputs = cases.state_scan(rng)
    inputs["log_decay"][:, ::2] = value
    cases.STATE_SCAN.check(device, inputs)


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_state_dtypes(device, rng, dtype):
    inputs = cases.state_scan(rng, state_dtype=dtype)
    final_state = poison(inputs["initial_state"].shape, inputs["initial_state"].dtype)
    cases.STATE_SCAN.check(device, inputs, {"final_state": final_state})


# ---- backward ----------------------------------------------------------------------------------------------------------
def backward_inputs(rng, dtype="float32", omit=(), reverse=False, cu_seqlens=None, **sizes):
    forward = cases.state_scan(rng, dtype, **sizes)
    states, final = reference.state_scan.state_scan(
        **{k: exact(v) for k, v in forward.items()}, reverse=reverse, cu_seqlens=cu_seqlens
    )
    return cases.without(
        dict(
            log_decay=forward["log_decay"],
            states=states.astype(forward["update"].dtype),
            dstates=cases.normal(rng, dtype, *states.shape),
            dfinal_state=cases.normal(rng, cases.parameter_dtype(dtype), *final.shape),
            initial_state=forward["initial_state"],
        ),
        omit,
    )


GRADIENTS = ("dlog_decay", "dupdate", "dinitial_state")


def run_backward(device, inputs, **options):
    results = device.call(statescan.state_scan_backward, **{k: device.put(v) for k, v in (inputs | options).items()})
    return dict(zip(GRADIENTS, (device.get(r) for r in results), strict=True))


def check_backward(device, inputs, **options):
    got = run_backward(device, inputs, **options)
    expected = reference.state_scan.state_scan_backward(**{k: exact(v) for k, v in inputs.items()}, **options)
    for name, value in zip(GRADIENTS, expected):
        assert_accurate(got[name], value, name, inputs["states"].dtype.name if device.name == "cuda" else None)
    return got


@pytest.mark.parametrize("seqlen", (0, 1, 2, 7, 64, 131))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_backward(device, rng, dtype, seqlen):
    check_backward(device, backward_inputs(rng, dtype, seqlen=seqlen))


def test_backward_float64(rng):
    check_backward(Cpu(), backward_inputs(rng, "float64"))


@pytest.mark.parametrize("omit", ((), ("dfinal_state",), ("initial_state",), ("dfinal_state", "initial_state")))
def test_backward_optional_inputs(device, rng, omit):
    check_backward(device, backward_inputs(rng, omit=omit))


@pytest.mark.parametrize("row", (dict(nheads=1), dict(headdim=40), dict(dstate=1), dict(dstate=96), dict(dstate=256)), ids=str)
def test_backward_sizes(device, rng, row):
    check_backward(device, backward_inputs(rng, **row))


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("packing", PACKINGS)
def test_backward_packed(device, rng, packing, reverse):
    lengths = PACKINGS[packing]
    options = dict(cu_seqlens=cumulative(lengths), reverse=reverse)
    check_backward(device, backward_inputs(rng, batch=1, seqlen=sum(lengths), sequences=len(lengths), **options), **options)


def test_backward_past_the_last_packed_chunk(device, rng):
    inputs = backward_inputs(rng, batch=1, seqlen=20, sequences=2, cu_seqlens=cumulative([7, 8]))
    for name in ("log_decay", "states", "dstates"):
        inputs[name][:, 15:] = np.nan
    got = check_backward(device, inputs, cu_seqlens=cumulative([7, 8]))
    assert not np.any(got["dlog_decay"][:, 15:]) and not np.any(got["dupdate"][:, 15:])


@pytest.mark.parametrize("layout", ("sliced", "gapped", "channels_first", "transposed", "flipped"))
def test_backward_layouts(device, rng, layout):
    inputs = backward_inputs(rng)
    plain = run_backward(device, inputs)
    got = run_backward(device, {name: laid_out(value, layout) for name, value in inputs.items()})
    for name in GRADIENTS:
        assert_same_bits(got[name], plain[name], name)


def test_backward_is_the_gradient_of_the_forward(device, rng):
    """<forward(u + v) - forward(u), g> = <v, backward(g)>: the op is linear in its update and its initial state."""
    inputs, gradients = cases.state_scan(rng), backward_inputs(rng)
    v = cases.state_scan(rng)
    change = cases.STATE_SCAN.run(device, {**v, "log_decay": inputs["log_decay"]})
    got = run_backward(device, {**gradients, "log_decay": inputs["log_decay"]})
    left = np.vdot(exact(change["states"]), exact(gradients["dstates"])) + np.vdot(
        change["final_state"], gradients["dfinal_state"]
    )
    right = np.vdot(exact(got["dupdate"]), v["update"]) + np.vdot(exact(got["dinitial_state"]), v["initial_state"])
    assert abs(left - right) <= 1e-5 * np.linalg.norm(exact(change["states"])) * np.linalg.norm(exact(gradients["dstates"]))


def test_backward_same_bits(device, rng, threads):
    inputs = backward_inputs(rng, batch=3, seqlen=31)
    first = run_backward(device, inputs)
    for count in (1, 2, 3):
        threads(count)
        again = run_backward(device, inputs)
        for name in GRADIENTS:
            assert_same_bits(again[name], first[name], name)


def test_backward_bad_row_stays_alone(device, rng):
    clean = backward_inputs(rng, batch=3)
    spoiled = {name: value.copy() for name, value in clean.items()}
    for value in spoiled.values():
        value[1] = np.nan
    expected, got = run_backward(device, clean), run_backward(device, spoiled)
    for name in GRADIENTS:
        assert_same_bits(got[name][[0, 2]], expected[name][[0, 2]], name)


def test_backward_errors(device, rng):
    inputs = backward_inputs(rng)
    for name in ("log_decay", "dstates", "dfinal_state", "initial_state"):
        with pytest.raises(ValueError, match=rf"state_scan_backward: {name} has shape .*; expected \("):
            run_backward(device, {**inputs, name: inputs[name][:, :-1]})
        with pytest.raises(TypeError, match=rf"state_scan_backward: {name} is int32; expected float32"):
            run_backward(device, {**inputs, name: np.zeros(inputs[name].shape, np.int32)})
