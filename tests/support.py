"""What the tests share: devices, memory layouts and the accuracy gates."""

import ml_dtypes
import numpy as np
import pytest

DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "float16", "complex64", "complex128")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
NARROW = ("float16", "bfloat16")
EXACT = {"complex64": np.complex128, "complex128": np.complex128}


def dtype_name(a):
    return np.asarray(a).dtype.name


# ---- devices -----------------------------------------------------------------------------------------------------------
class Cpu:
    """NumPy arrays as they are."""

    name = "cpu"

    def put(self, a):
        return a

    def get(self, a):
        return a

    def call(self, op, *inputs, **arguments):
        return op(*inputs, **arguments)


class Cuda:
    """torch tensors on the current GPU, with the memory layout of the NumPy arrays that the tests write."""

    name = "cuda"

    def put(self, a):
        import torch

        if not isinstance(a, np.ndarray):
            return a
        if any(step < 0 for step in a.strides):
            pytest.skip("torch has no negative strides")
        flat, first = memory_of(a)
        is_bfloat16 = dtype_name(a) == "bfloat16"
        stored = torch.from_numpy(flat.view(np.int16)).view(torch.bfloat16) if is_bfloat16 else torch.from_numpy(flat)
        return stored.cuda().as_strided(a.shape, [step // a.itemsize for step in a.strides], first)

    def get(self, a):
        import torch

        if not isinstance(a, torch.Tensor):
            return a
        a = a.cpu()
        return a.view(torch.int16).numpy().view(DTYPES["bfloat16"]) if a.dtype == torch.bfloat16 else a.numpy()

    def call(self, op, *inputs, **arguments):
        try:
            return op(*inputs, **arguments)
        except NotImplementedError as missing:
            pytest.skip(str(missing))


def has_cuda():
    try:
        import torch
    except ImportError:
        return False
    import statescan

    return torch.cuda.is_available() and statescan.info()["cuda_devices"] > 0


DEVICES = [Cpu()] + ([Cuda()] if has_cuda() else [])


# ---- layouts -----------------------------------------------------------------------------------------------------------
def poison(shape, dtype):
    """Memory that nobody should read: NaN, or a far too large index."""
    kind = np.dtype(dtype).kind
    return np.full(shape, 2**30 if kind in "iu" else np.nan, dtype)


def laid_out(a, layout):
    """A copy of `a` in another memory layout; what lies between its elements is poison."""
    if layout == "sliced":  # as a split of one wide projection
        view = poison((*a.shape[:-1], a.shape[-1] * 2 + 3), a.dtype)[..., 3 : 3 + a.shape[-1]]
    elif layout == "gapped":
        view = poison([2 * size + 1 for size in a.shape], a.dtype)[tuple(slice(1, 2 * size + 1, 2) for size in a.shape)]
    elif layout == "channels_first":
        view = np.empty_like(np.swapaxes(a, 1, -1), order="C").swapaxes(1, -1) if a.ndim > 2 else np.empty_like(a)
    elif layout == "transposed":
        view = np.empty_like(a.T, order="C").T
    elif layout == "flipped":
        view = np.empty_like(a, order="C")[(slice(None, None, -1),) * a.ndim]
    else:
        raise ValueError(layout)
    view[...] = a
    return view


def memory_of(a):
    """A copy of all the memory behind a view, flat, and the index of the view's first element in it."""
    whole = a
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    first = (a.__array_interface__["data"][0] - whole.__array_interface__["data"][0]) // a.itemsize
    return whole.flatten(order="K").view(a.dtype), first


def copied(a):
    """A copy in the same memory layout, with whatever lies between the elements."""
    flat, first = memory_of(a)
    return np.ndarray(a.shape, a.dtype, flat, first * a.itemsize, a.strides)


LAYOUTS = ("sliced", "gapped", "channels_first", "transposed", "flipped")


# ---- accuracy ----------------------------------------------------------------------------------------------------------
def exact(value):
    """The value of an array in float64 or complex128; anything else as it is."""
    if isinstance(value, np.ndarray) and value.dtype.kind not in "iu":
        return value.astype(EXACT.get(dtype_name(value), np.float64))
    return value


def relative_error(got, expected):
    """Root mean square of the error, in units of the root mean square of the exact result."""
    got = exact(np.asarray(got))
    scale = np.linalg.norm(expected.ravel())
    error = np.linalg.norm((got - expected).ravel())
    return error / scale if scale > 0 else error


def rounded(expected, dtype):
    """The exact result, rounded once to a dtype; complex numbers part by part."""
    if np.iscomplexobj(expected):
        return rounded(expected.real, dtype) + 1j * rounded(expected.imag, dtype)
    return exact(expected.astype(DTYPES[dtype]))


def gate(expected, dtype):
    """The largest relative error that a result of this dtype may have."""
    if dtype in ("float64", "complex128"):
        return 1e-12
    # Where even rounding loses more, as below the range of float32, that is the measure.
    return max(1e-5, 1.5 * relative_error(rounded(expected, dtype), expected))


def dithered(expected, dtype, rng):
    """The exact result with another draw of such rounding errors: rounded to a grid that is shifted at random."""
    if np.iscomplexobj(expected):
        return dithered(expected.real, dtype, rng) + 1j * dithered(expected.imag, dtype, rng)
    _, exponent = np.frexp(expected)
    spacing = np.ldexp(float(ml_dtypes.finfo(DTYPES[dtype]).eps), exponent - 1)
    return expected + spacing * rng.uniform(-0.5, 0.5, expected.shape)


def assert_accurate(got, expected, name, dtype=None, reachable=()):
    """`got` against the exact result, by the gate of its own dtype, or of a coarser one. `reachable`: what exact arithmetic comes
    to when it rounds wherever the op says that it stores a value, drawn more than once, since a sum of a few heads takes its
    error from few numbers; the gate is then 1.5 times the largest error of these."""
    assert got.shape == expected.shape, f"{name} has shape {got.shape}; expected {expected.shape}"
    assert np.all(np.isfinite(exact(got))), f"{name} is not finite"
    limit = gate(expected, dtype_name(got))
    if dtype is not None:
        limit = max(limit, gate(expected, dtype))
    for value in reachable:
        limit = max(limit, 1.5 * relative_error(rounded(value, dtype_name(got)), expected))
    error = relative_error(got, expected)
    assert error <= limit, f"{name} ({dtype_name(got)}): relative error {error:.3g} above {limit:.3g}"


def assert_same_bits(got, expected, name):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    bits = f"u{got.itemsize if got.dtype.kind != 'c' else got.itemsize // 2}"
    as_bits = lambda a: np.ascontiguousarray(a).view(bits)
    differ = np.count_nonzero(as_bits(got) != as_bits(expected))
    assert differ == 0, f"{name}: {differ} of {got.size} elements differ"
