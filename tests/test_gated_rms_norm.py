import numpy as np
import pytest
import reference.gated_rms_norm
import statescan
from cases import normal, without
from support import LAYOUTS, NARROW, Cpu, assert_accurate, assert_same_bits, exact, laid_out, poison


def make(rng, dtype="float32", leading=(3, 5), dim=24, weight_dtype=None, omit=()):
    shape = (*leading, dim)
    w = weight_dtype or ("float64" if dtype == "float64" else "float32")
    return without(dict(x=normal(rng, dtype, *shape), z=normal(rng, dtype, *shape), weight=normal(rng, w, dim)), omit)


def run(device, inputs, out=None, **options):
    given = {} if out is None else {"out": device.put(out)}
    y = device.call(statescan.gated_rms_norm, **{name: device.put(value) for name, value in inputs.items()}, **given, **options)
    assert out is None or y is given["out"]
    return device.get(y)


def check(device, inputs, out=None, **options):
    y = run(device, inputs, out, **options)
    assert_accurate(y, reference.gated_rms_norm.gated_rms_norm(**{k: exact(v) for k, v in inputs.items()}, **options), "y")
    return y


@pytest.mark.parametrize("norm_before_gate", (False, True))
@pytest.mark.parametrize("omit", ((), ("z",), ("weight",), ("z", "weight")))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_forward(device, rng, dtype, omit, norm_before_gate):
    check(device, make(rng, dtype, omit=omit), norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("norm_before_gate", (False, True))
@pytest.mark.parametrize("dim", (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 257, 1024, 1031, 5120, 10001))
def test_dims(device, rng, dim, norm_before_gate):
    check(device, make(rng, dim=dim), norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("norm_before_gate", (False, True))
@pytest.mark.parametrize(
    "dim,group_size",
    ((24, 24), (24, 12), (24, 8), (24, 3), (24, 1), (120, 40), (130, 65), (96, 48), (1024, 256), (3840, 1920), (40000, 20000)),
)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_groups(device, rng, dtype, dim, group_size, norm_before_gate):
    check(device, make(rng, dtype, dim=dim), group_size=group_size, norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("leading", ((), (1,), (7,), (2, 3), (2, 3, 5), (2, 1, 3, 2), (2, 1, 3, 2, 2), (0,), (3, 0), (131,)))
def test_leading_axes(device, rng, leading):
    check(device, make(rng, leading=leading))


@pytest.mark.parametrize("weight_dtype", ("float32", "same"))
@pytest.mark.parametrize("dtype", NARROW)
def test_dtypes_of_weight(device, rng, dtype, weight_dtype):
    check(device, make(rng, dtype, weight_dtype=dtype if weight_dtype == "same" else "float32"))


def test_float64(rng):
    for options in (dict(), dict(norm_before_gate=True), dict(group_size=8)):
        check(Cpu(), make(rng, "float64", dim=48), **options)


@pytest.mark.parametrize("eps", (0.0, 1e-12, 1e-5, 0.5))
def test_eps(device, rng, eps):
    inputs = make(rng)
    inputs["x"] *= np.float32(1e-2)
    check(device, inputs, eps=eps)


@pytest.mark.parametrize("scale", (1e-15, 1e-6, 1e6, 1e15))
def test_scales(device, rng, scale):
    """Squares stay within float32 for values from 1e-15 to 1e15."""
    inputs = make(rng, omit=("z",))
    inputs["x"] *= np.float32(scale)
    check(device, inputs, eps=0.0 if scale < 1 else 1e-5)


def test_gates_far_from_zero(device, rng):
    inputs = make(rng, dim=40)
    inputs["z"] *= np.float32(60)
    check(device, inputs)
    check(device, inputs, norm_before_gate=True)


def test_zero_rows(device, rng):
    inputs = make(rng)
    inputs["x"][1] = 0
    assert not np.any(check(device, inputs)[1])


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, rng, layout, dtype):
    inputs = make(rng, dtype)
    plain = run(device, inputs)
    out = laid_out(poison(plain.shape, plain.dtype), layout)
    got = check(device, {name: laid_out(value, layout) for name, value in inputs.items()}, out)
    assert_same_bits(got, plain, "y")


def test_in_place(device, rng):
    """y may be x or z: a row is read before it is written."""
    inputs = make(rng)
    plain = run(device, inputs)
    for name in ("x", "z"):
        put = {key: device.put(value.copy()) for key, value in inputs.items()}
        y = device.call(statescan.gated_rms_norm, **put, out=put[name])
        assert y is put[name]
        assert_same_bits(device.get(y), plain, f"y written to {name}")


def test_inputs_are_not_written(device, rng):
    inputs = make(rng)
    before = {name: value.copy() for name, value in inputs.items()}
    for value in inputs.values():
        value.flags.writeable = False
    run(device, inputs)
    for name in inputs:
        assert_same_bits(inputs[name], before[name], name)


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_bad_row_and_group_stay_alone(device, rng, bad):
    clean = make(rng, leading=(7,))
    expected = run(device, clean, group_size=8)
    for name in ("x", "z"):
        spoiled = {**clean, name: clean[name].copy()}
        spoiled[name][3, 9] = bad
        got = run(device, spoiled, group_size=8)
        good = np.ones(got.shape, bool)
        good[3, 8:16] = False
        assert_same_bits(got[good], expected[good], f"y beside a bad {name}")
        assert not np.isfinite(got[3, 9])


def test_same_bits(device, rng, threads):
    inputs = make(rng, leading=(37,), dim=200)
    first = run(device, inputs, group_size=50)
    for count in (1, 2, 3):
        threads(count)
        assert_same_bits(run(device, inputs, group_size=50), first, "y")
    alone = [run(device, {**inputs, "x": inputs["x"][i : i + 1], "z": inputs["z"][i : i + 1]}, group_size=50) for i in range(37)]
    assert_same_bits(np.concatenate(alone), first, "y of single rows")


def test_read_only_output_is_refused(rng):
    out = np.broadcast_to(np.zeros(24, np.float32), (3, 5, 24))
    with pytest.raises(ValueError, match="gated_rms_norm: out is written, but the array is read-only"):
        statescan.gated_rms_norm(**make(rng), out=out)


@pytest.mark.parametrize(
    "change,error,text",
    (
        (dict(group_size=7), ValueError, "gated_rms_norm: group_size=7 must divide dim=24"),
        (dict(group_size=-8), ValueError, "gated_rms_norm: group_size=-8 must divide dim=24"),
        (
            dict(z=np.zeros((3, 4, 24), np.float32)),
            ValueError,
            "gated_rms_norm: z has shape (3, 4, 24); expected (leading=3, leading=5, dim=24)",
        ),
        (dict(z=np.zeros((15, 24), np.float32)), ValueError, "gated_rms_norm: z has shape (15, 24)"),
        (dict(weight=np.zeros(23, np.float32)), ValueError, "gated_rms_norm: weight has shape (23,); expected (dim=24)"),
        (dict(weight=np.zeros(24, np.float16)), TypeError, "gated_rms_norm: weight is float16; expected float32"),
        (dict(z=np.zeros((3, 5, 24), np.float16)), TypeError, "gated_rms_norm: z is float16; expected float32"),
        (
            dict(x=np.zeros((3, 5, 24), np.int64)),
            TypeError,
            "gated_rms_norm: x is int64; expected float32, float64, float16 or bfloat16",
        ),
        (dict(x=np.zeros((), np.float32)), ValueError, "gated_rms_norm: x has shape (); expected (..., dim)"),
        (dict(x=np.zeros((1,) * 7, np.float32)), ValueError, "at most 6 dimensions"),
        (dict(x=None), ValueError, "gated_rms_norm: x is required"),
        (dict(eps=-1e-5), ValueError, "gated_rms_norm: eps=-1e-05 must not be negative"),
        (dict(eps=float("nan")), ValueError, "gated_rms_norm: eps=nan must not be negative"),
        (dict(out=np.zeros((3, 5, 23), np.float32)), ValueError, "has shape (3, 5, 23)"),
        (dict(out=np.zeros((3, 5, 24), np.float64)), TypeError, "is float64; expected float32"),
        (dict(out=np.lib.stride_tricks.as_strided(np.zeros(24, np.float32), (3, 5, 24), (0, 0, 4))), ValueError, "share memory"),
    ),
    ids=lambda v: None if not isinstance(v, dict) else "-".join(v),
)
def test_errors(device, rng, change, error, text):
    arguments = {name: device.put(value) for name, value in {**make(rng), **change}.items()}
    with pytest.raises(error) as raised:
        device.call(statescan.gated_rms_norm, **arguments)
    assert text in str(raised.value)


# ---- backward ----------------------------------------------------------------------------------------------------------
GRADIENTS = ("dx", "dz", "dweight")


def make_backward(rng, dtype="float32", leading=(3, 5), dim=24, **rest):
    inputs = make(rng, dtype, leading, dim, **rest)
    return {**inputs, "dy": normal(rng, dtype, *leading, dim)}


def run_backward(device, inputs, **options):
    given = {name: device.put(value) for name, value in inputs.items()}
    results = device.call(statescan.gated_rms_norm_backward, **given, **options)
    return dict(zip(GRADIENTS, (device.get(result) for result in results), strict=True))


def expected_backward(inputs, **options):
    exact_inputs = {name: exact(value) for name, value in inputs.items()}
    return dict(zip(GRADIENTS, reference.gated_rms_norm.gated_rms_norm_backward(**exact_inputs, **options), strict=True))


def check_backward(device, inputs, **options):
    got, expected = run_backward(device, inputs, **options), expected_backward(inputs, **options)
    for name in GRADIENTS:
        if expected[name] is None:
            assert got[name] is None
            continue
        assert got[name].dtype == inputs[name[1:]].dtype
        assert_accurate(got[name], expected[name], name)
    return got


@pytest.mark.parametrize("norm_before_gate", (False, True))
@pytest.mark.parametrize("omit", ((), ("z",), ("weight",), ("z", "weight")))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_backward(device, rng, dtype, omit, norm_before_gate):
    check_backward(device, make_backward(rng, dtype, omit=omit), norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("norm_before_gate", (False, True))
@pytest.mark.parametrize("dim", (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 257, 1031, 5120, 10001))
def test_backward_dims(device, rng, dim, norm_before_gate):
    # One channel alone is normed to 1: without an eps of its size the exact gradient is what rounding leaves of 1 - 1.
    eps = 0.5 if dim == 1 else 1e-5
    check_backward(device, make_backward(rng, dim=dim), eps=eps, norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("norm_before_gate", (False, True))
@pytest.mark.parametrize("dim,group_size", ((24, 12), (24, 3), (24, 2), (120, 40), (130, 65), (1024, 256)))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_backward_groups(device, rng, dtype, dim, group_size, norm_before_gate):
    check_backward(device, make_backward(rng, dtype, dim=dim), group_size=group_size, norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("leading", ((), (1,), (7,), (2, 3, 5), (2, 1, 3, 2, 2), (0,), (3, 0), (1367,)))
def test_backward_leading_axes(device, rng, leading):
    got = check_backward(device, make_backward(rng, leading=leading))
    assert 0 not in leading or not np.any(got["dweight"])


@pytest.mark.parametrize("weight_dtype", ("float32", "same"))
@pytest.mark.parametrize("dtype", NARROW)
def test_backward_dtypes_of_weight(device, rng, dtype, weight_dtype):
    check_backward(device, make_backward(rng, dtype, weight_dtype=dtype if weight_dtype == "same" else "float32"))


@pytest.mark.parametrize("options", (dict(), dict(norm_before_gate=True), dict(group_size=8)), ids=str)
def test_backward_float64(rng, options):
    check_backward(Cpu(), make_backward(rng, "float64", dim=48), **options)


@pytest.mark.parametrize("eps", (0.0, 1e-12, 1e-5, 0.5))
def test_backward_eps(device, rng, eps):
    inputs = make_backward(rng)
    inputs["x"] *= np.float32(1e-2)
    check_backward(device, inputs, eps=eps)


@pytest.mark.parametrize("scale", (1e-15, 1e-6, 1e6, 1e15))
def test_backward_scales(device, rng, scale):
    inputs = make_backward(rng, omit=("z",))
    inputs["x"] *= np.float32(scale)
    check_backward(device, inputs, eps=0.0 if scale < 1 else 1e-5)


def test_backward_gates_far_from_zero(device, rng):
    inputs = make_backward(rng, dim=40)
    inputs["z"] *= np.float32(60)
    check_backward(device, inputs)
    check_backward(device, inputs, norm_before_gate=True)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_layouts(device, rng, layout, dtype):
    """known_bugs 33: a dy with strides, like everything else."""
    inputs = make_backward(rng, dtype)
    plain = run_backward(device, inputs)
    got = check_backward(device, {name: laid_out(value, layout) for name, value in inputs.items()})
    for name in GRADIENTS:
        assert_same_bits(got[name], plain[name], name)


def test_backward_same_bits(device, rng, threads):
    inputs = make_backward(rng, leading=(37,), dim=2000)
    first = run_backward(device, inputs, group_size=50)
    for count in (1, 2, 3):
        threads(count)
        again = run_backward(device, inputs, group_size=50)
        for name in GRADIENTS:
            assert_same_bits(again[name], first[name], name)
    for i in range(37):
        row = {name: value[i : i + 1] if name != "weight" else value for name, value in inputs.items()}
        alone = run_backward(device, row, group_size=50)
        for name in ("dx", "dz"):
            assert_same_bits(alone[name], first[name][i : i + 1], f"{name} of row {i}")


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_backward_bad_row_and_group_stay_alone(device, rng, bad):
    clean = make_backward(rng, leading=(7,))
    expected = run_backward(device, clean, group_size=8)
    for name in ("x", "z", "dy"):
        spoiled = {**clean, name: clean[name].copy()}
        spoiled[name][3, 9] = bad
        got = run_backward(device, spoiled, group_size=8)
        good = np.ones((7, 24), bool)
        good[3, 8:16] = False
        for gradient in ("dx", "dz"):
            assert_same_bits(got[gradient][good], expected[gradient][good], f"{gradient} beside a bad {name}")
        assert_same_bits(got["dweight"][good[3]], expected["dweight"][good[3]], f"dweight beside a bad {name}")


@pytest.mark.parametrize(
    "change,error,text",
    (
        (dict(dy=None), ValueError, "gated_rms_norm_backward: dy is required"),
        (
            dict(dy=np.zeros((3, 5, 23), np.float32)),
            ValueError,
            "gated_rms_norm_backward: dy has shape (3, 5, 23); expected (leading=3, leading=5, dim=24)",
        ),
        (dict(dy=np.zeros((3, 5, 24), np.float16)), TypeError, "gated_rms_norm_backward: dy is float16; expected float32"),
        (dict(group_size=7), ValueError, "gated_rms_norm_backward: group_size=7 must divide dim=24"),
    ),
    ids=lambda v: None if not isinstance(v, dict) else "-".join(v),
)
def test_backward_errors(device, rng, change, error, text):
    arguments = {name: device.put(value) for name, value in {**make_backward(rng), **change}.items()}
    with pytest.raises(error) as raised:
        device.call(statescan.gated_rms_norm_backward, **arguments)
    assert text in str(raised.value)


@pytest.mark.parametrize("norm_before_gate", (False, True))
@pytest.mark.parametrize("omit", ((), ("z",), ("weight",)))
def test_backward_beside_torch(rng, omit, norm_before_gate):
    torch = pytest.importorskip("torch")
    import torch_gradients

    def forward(x, z=None, weight=None):
        gate = 1.0 if z is None else torch.nn.functional.silu(z)
        v = (x if norm_before_gate else x * gate).unflatten(-1, (-1, 8))
        y = (v / torch.sqrt((v**2).mean(-1, keepdim=True) + 1e-5)).flatten(-2) * (1.0 if weight is None else weight)
        return (y * gate if norm_before_gate else y,)

    inputs = make(rng, "float64", omit=omit)
    options = dict(group_size=8, norm_before_gate=norm_before_gate)
    dy = normal(rng, "float64", 3, 5, 24)
    expected = torch_gradients.gradients(forward, inputs, [dy])
    for source in (run_backward(Cpu(), {**inputs, "dy": dy}, **options), expected_backward({**inputs, "dy": dy}, **options)):
        for name in inputs:
            assert_accurate(source[f"d{name}"], expected[name], f"d{name}")
    small = {name: value[:2, :2] if value.ndim > 1 else value for name, value in inputs.items()}
    torch_gradients.gradcheck("gated_rms_norm", small, ("x", "z", "weight"), **options)
