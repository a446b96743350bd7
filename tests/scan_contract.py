"""What every scan promises, whatever its recurrence. A test_<op>.py subclasses ScanContract and names its op."""

import numpy as np
import pytest
import statescan
from support import LAYOUTS, NARROW, assert_accurate, assert_same_bits, exact, laid_out, poison

PACKINGS = {
    "one": [29],
    "two": [17, 12],
    "first_empty": [0, 20, 9],
    "middle_empty": [13, 0, 0, 16],
    "last_empty": [5, 24, 0],
    "all_empty": [0, 0, 0],
    "single_tokens": [1, 1, 1, 2, 1],
    "unaligned": [50, 70, 90],  # known_bugs 17: starts inside a chunk
    "short_and_long": [2, 131, 3],
}


def cumulative(lengths, dtype=np.int32):
    return np.cumsum([0, *lengths]).astype(dtype)


class ScanContract:
    op = None  # a cases.Scan
    sizes = {}  # of inputs, where the op wants others
    lengths = (0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 63, 64, 65, 67, 127, 128, 129, 255, 256, 257)

    def make(self, rng, **sizes):
        return self.op.inputs(rng, **{**self.sizes, **sizes})

    # ---- values --------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("seqlen", lengths)
    def test_lengths(self, device, rng, seqlen):
        self.op.check(device, self.make(rng, seqlen=seqlen), **self.op.options)

    @pytest.mark.parametrize("seqlen", (1023, 1024, 1025, 1026, 2047, 2048, 2049))
    def test_long(self, device, rng, seqlen):
        self.op.check(device, self.make(rng, batch=1, seqlen=seqlen), **self.op.options)

    @pytest.mark.parametrize("dtype", ("float32", *NARROW))
    def test_dtypes(self, device, rng, dtype):
        self.op.check(device, self.make(rng, dtype=dtype), **self.op.options)

    def test_float64(self, rng):
        from support import Cpu  # float64 runs on the CPU alone

        self.op.check(Cpu(), self.make(rng, dtype="float64"), **self.op.options)

    @pytest.mark.parametrize("batch", (0, 1, 3))
    def test_batch(self, device, rng, batch):
        self.op.check(device, self.make(rng, batch=batch), **self.op.options)

    # ---- layouts -------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, device, rng, layout, dtype):
        inputs = self.make(rng, dtype=dtype)
        plain = self.op.run(device, inputs, **self.op.options)
        views = {name: laid_out(value, layout) for name, value in inputs.items()}
        out = {name: laid_out(poison(value.shape, value.dtype), layout) for name, value in plain.items()}
        got = self.op.check(device, views, out, **self.op.options)
        for name in got:
            assert_same_bits(got[name], plain[name], name)

    def test_every_input_alone_is_a_view(self, device, rng):
        inputs = self.make(rng)
        plain = self.op.run(device, inputs, **self.op.options)
        for changed, value in inputs.items():
            got = self.op.run(device, {**inputs, changed: laid_out(value, "gapped")}, **self.op.options)
            for name in got:
                assert_same_bits(got[name], plain[name], f"{name} with a strided {changed}")

    def test_expanded_inputs(self, device, rng):
        """A batch that shares its memory, as torch's expand gives it."""
        inputs = self.make(rng, batch=1)
        shared = {
            name: np.broadcast_to(value, (3, *value.shape[1:])) if self.op.has_rows(name, value) else value
            for name, value in inputs.items()
        }
        got = self.op.check(device, shared, **self.op.options)
        for name in got:
            assert_same_bits(got[name][2], got[name][0], name)

    def test_inputs_are_not_written(self, device, rng):
        inputs = self.make(rng)
        for value in inputs.values():
            value.flags.writeable = False
        before = {name: value.copy() for name, value in inputs.items()}
        self.op.run(device, inputs, **self.op.options)
        for name in inputs:
            assert_same_bits(inputs[name], before[name], name)

    # ---- optional arguments --------------------------------------------------------------------------------------------
    def test_each_optional_input_left_out(self, device, rng):
        every = self.make(rng)
        for name in self.optional:
            self.op.check(device, {**every, name: None}, **self.op.options)

    def test_each_optional_input_alone(self, device, rng):
        every = self.make(rng)
        for name in (None, *self.optional):
            self.op.check(device, {**every, **dict.fromkeys(set(self.optional) - {name})}, **self.op.options)

    def test_out_is_filled_and_returned(self, device, rng):
        inputs = self.make(rng)
        plain = self.op.run(device, inputs, **self.op.options)
        out = {name: poison(value.shape, value.dtype) for name, value in plain.items()}
        got = self.op.run(device, inputs, out, **self.op.options)
        for name in got:
            assert_same_bits(got[name], plain[name], name)

    def test_states_may_be_updated_in_place(self, device, rng):
        """The slot of a cache as initial and as final state: it is read before it is written."""
        inputs = self.make(rng)
        expected = self.op.expected(inputs, **self.op.options)
        given = {name: device.put(value.copy()) for name, value in inputs.items()}
        outs = {self.op.out[final]: given[initial] for final, initial in self.op.carried.items()}
        device.call(getattr(statescan, self.op.name), **given, **outs, **self.op.options)
        for final, initial in self.op.carried.items():
            assert_accurate(device.get(given[initial]), expected[final], final)

    # ---- direction, splits, packings -----------------------------------------------------------------------------------
    def test_reverse_is_flipping(self, device, rng):
        inputs = self.make(rng)
        self.op.check(device, inputs, reverse=True, **self.op.options)
        expected = self.op.expected(inputs, reverse=True, **self.op.options)
        mirrored = {name: value.copy() for name, value in self.op.tokens(inputs, slice(None, None, -1)).items()}
        flipped = self.op.run(device, mirrored, **self.op.options)
        for name in flipped:
            assert_accurate(flipped[name] if name in self.op.carried else flipped[name][:, ::-1], expected[name], name)

    @pytest.mark.parametrize("reverse", (False, True))
    @pytest.mark.parametrize("batch", (1, 2))
    def test_split_anywhere(self, device, rng, batch, reverse):
        """known_bugs 16: the state of x[:k] carried into x[k:] gives one pass, for every k."""
        inputs = self.make(rng, batch=batch, seqlen=37)
        whole = self.op.expected(inputs, reverse=reverse, **self.op.options)
        for k in range(38):
            first, second = (slice(k, None), slice(0, k)) if reverse else (slice(0, k), slice(k, None))
            head = self.op.run(device, self.op.tokens(inputs, first), reverse=reverse, **self.op.options)
            carried = {taken: head[given] for given, taken in self.op.carried.items()}
            tail = self.op.run(device, {**self.op.tokens(inputs, second), **carried}, reverse=reverse, **self.op.options)
            for name in whole:
                parts = (tail[name], head[name]) if reverse else (head[name], tail[name])
                got = tail[name] if name in self.op.carried else np.concatenate(parts, axis=1)
                assert_accurate(got, whole[name], f"{name} split at {k}")

    @pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
    @pytest.mark.parametrize("reverse", (False, True))
    @pytest.mark.parametrize("packing", PACKINGS)
    def test_packed(self, device, rng, packing, reverse, dtype):
        lengths = PACKINGS[packing]
        inputs = self.make(rng, dtype=dtype, batch=1, seqlen=sum(lengths), sequences=len(lengths))
        self.op.check(device, inputs, cu_seqlens=cumulative(lengths), reverse=reverse, **self.op.options)

    def test_packed_without_initial_state(self, device, rng):
        inputs = self.make(rng, batch=1, seqlen=29, omit=tuple(self.op.carried.values()))
        got = self.op.check(device, inputs, cu_seqlens=cumulative([0, 13, 0, 16, 0]), **self.op.options)
        for name in self.op.carried:
            assert not np.any(got[name][[0, 2, 4]]), "an empty sequence without initial state ends in zero"

    def test_no_sequences(self, device, rng):
        inputs = self.make(rng, batch=1, seqlen=5, sequences=0)
        got = self.op.check(device, inputs, cu_seqlens=np.zeros(1, np.int32), **self.op.options)
        for name in self.op.out:
            assert not np.any(got[name])

    @pytest.mark.parametrize("view", ("int32", "int64", "strided"))
    def test_cu_seqlens_types(self, device, rng, view):
        lengths = [4, 0, 21, 7]
        inputs = self.make(rng, batch=1, seqlen=sum(lengths), sequences=len(lengths))
        cu_seqlens = laid_out(cumulative(lengths), "gapped") if view == "strided" else cumulative(lengths, view)
        self.op.check(device, inputs, cu_seqlens=cu_seqlens, **self.op.options)

    @pytest.mark.parametrize("reverse", (False, True))
    def test_rows_past_the_last_packed_token(self, device, rng, reverse):
        """known_bugs 19: they are zero in the outputs, whatever lies there in the inputs."""
        lengths, used, allocated = [11, 0, 18], 29, 40
        inputs = self.make(rng, batch=1, seqlen=allocated, sequences=len(lengths))
        for name, value in self.op.tokens(inputs, slice(used, None)).items():
            if self.op.has_tokens(name, inputs[name]):
                value[:] = np.nan
        options = dict(cu_seqlens=cumulative(lengths), reverse=reverse, **self.op.options)
        plain = self.op.run(device, inputs, **options)
        out = {name: poison(value.shape, value.dtype) for name, value in plain.items()}
        got = self.op.check(device, inputs, out, **options)
        for name in got:
            if name not in self.op.carried:
                assert not np.any(got[name][:, used:]), f"{name} is not zero past the last packed token"

    # ---- bits ----------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
    def test_same_bits_every_run(self, device, rng, dtype):
        inputs = self.make(rng, dtype=dtype, batch=5, seqlen=131)
        first = self.op.run(device, inputs, **self.op.options)
        for _ in range(5):
            again = self.op.run(device, inputs, **self.op.options)
            for name in first:
                assert_same_bits(again[name], first[name], name)

    def test_same_bits_at_any_thread_count(self, rng, threads):
        from support import Cpu

        inputs = self.make(rng, batch=3, seqlen=131)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(self.op.run(Cpu(), inputs, **self.op.options))
        for name in results[0]:
            assert_same_bits(results[1][name], results[0][name], f"{name} on two threads")
            assert_same_bits(results[2][name], results[0][name], f"{name} on three threads")

    def batch_invariant(self, device):
        """The CPU is always so; on a GPU it is asked for, where the op has the choice."""
        has_choice = self.op.name in ("ssd_scan", "selective_scan", "mamba2_scan")
        return {"batch_invariant": True} if device.name == "cuda" and has_choice else {}

    def test_same_bits_at_any_batch_size(self, device, rng):
        options = {**self.op.options, **self.batch_invariant(device)}
        inputs = self.make(rng, batch=4, seqlen=131)
        together = self.op.run(device, inputs, **options)
        for row in range(4):
            alone = self.op.run(device, self.op.rows(inputs, slice(row, row + 1)), **options)
            for name in alone:
                assert_same_bits(alone[name], together[name][row : row + 1], f"{name} of row {row}")

    def test_same_bits_in_any_packing(self, device, rng):
        options = {**self.op.options, **self.batch_invariant(device)}
        lengths = [19, 0, 97, 1, 64]
        cu_seqlens = cumulative(lengths)
        inputs = self.make(rng, batch=1, seqlen=sum(lengths), sequences=len(lengths))
        packed = self.op.run(device, inputs, cu_seqlens=cu_seqlens, **options)
        for s, (first, last) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:])):
            alone_inputs = self.op.tokens(inputs, slice(first, last))
            alone_inputs |= {name: inputs[name][s : s + 1] for name in self.op.carried.values()}
            alone = self.op.run(device, alone_inputs, **options)
            for name in alone:
                part = packed[name][s : s + 1] if name in self.op.carried else packed[name][:, first:last]
                assert_same_bits(alone[name], part, f"{name} of sequence {s}")

    # ---- what one row holds stays there ------------------------------------------------------------------------------------
    @pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
    def test_bad_row_stays_alone(self, device, rng, bad):
        clean = self.make(rng, batch=3)
        spoiled = {name: value.copy() for name, value in clean.items()}
        for name, value in spoiled.items():
            if self.op.has_rows(name, value):
                value[1] = bad
        expected = self.op.run(device, clean, **self.op.options)
        got = self.op.run(device, spoiled, **self.op.options)
        for name in got:
            for row in (0, 2):
                assert_same_bits(got[name][row], expected[name][row], f"{name} of row {row}")
        assert not np.all(np.isfinite(exact(got[next(iter(self.op.out))][1])))

    def test_bad_sequence_stays_alone(self, device, rng):
        lengths = [9, 21, 14]
        clean = self.make(rng, batch=1, seqlen=sum(lengths), sequences=3)
        spoiled = {name: value.copy() for name, value in clean.items()}
        for name, value in self.op.tokens(spoiled, slice(9, 30)).items():
            if self.op.has_tokens(name, spoiled[name]):
                value[:] = np.nan
        for name in self.op.carried.values():
            spoiled[name][1] = np.nan
        options = dict(cu_seqlens=cumulative(lengths), **self.op.options)
        expected, got = self.op.run(device, clean, **options), self.op.run(device, spoiled, **options)
        for name in got:
            keep = [0, 2] if name in self.op.carried else np.r_[0:9, 30:44]
            axis = 0 if name in self.op.carried else 1
            assert_same_bits(np.take(got[name], keep, axis), np.take(expected[name], keep, axis), name)

    def test_future_stays_out_of_the_past(self, device, rng):
        """A NaN at token k reaches no token before k: causality, seen through what a mask would multiply by zero."""
        inputs = self.make(rng, batch=1, seqlen=67)
        expected = self.op.run(device, inputs, **self.op.options)
        for k in (1, 33, 66):
            spoiled = {name: value.copy() for name, value in inputs.items()}
            for name, value in self.op.tokens(spoiled, k).items():
                if self.op.has_tokens(name, spoiled[name]):
                    value[:] = np.nan
            got = self.op.run(device, spoiled, **self.op.options)
            for name in self.op.out.keys() - self.op.carried.keys():
                assert_same_bits(got[name][:, :k], expected[name][:, :k], f"{name} before token {k}")

    # ---- errors --------------------------------------------------------------------------------------------------------
    def refuses(self, device, error, text, inputs, out=None, **options):
        """The call raises `error` with `text` in its message, and writes nothing."""
        shapes = out or {}
        before = {name: array.copy() for name, array in shapes.items()}
        with pytest.raises(error) as raised:
            self.op.run(device, inputs, out, **{**self.op.options, **options})
        assert f"{self.op.name}: " in str(raised.value) and text in str(raised.value), str(raised.value)
        for name, array in shapes.items():
            np.testing.assert_array_equal(exact(array), exact(before[name]))

    def test_cu_seqlens_rules(self, device, rng):
        if device.name != "cpu":
            pytest.skip("on a GPU the values are not read")
        unit = self.make(rng, batch=1, seqlen=10, sequences=2)
        for values, text in (
            ([1, 4, 10], "cu_seqlens must start at 0, got 1"),
            ([0, 6, 4], "cu_seqlens must not decrease, got 6 then 4 at position 2"),
            ([0, 6, 11], "cu_seqlens ends at 11, past the 10 that there are"),
        ):
            self.refuses(device, ValueError, text, unit, cu_seqlens=np.array(values, np.int32))
        self.refuses(device, ValueError, "cu_seqlens has shape (0,)", unit, cu_seqlens=np.zeros(0, np.int32))
        self.refuses(device, ValueError, "cu_seqlens has shape (1, 3)", unit, cu_seqlens=np.zeros((1, 3), np.int32))
        self.refuses(
            device, TypeError, "cu_seqlens is float32; expected int32 or int64", unit, cu_seqlens=np.zeros(3, np.float32)
        )
        self.refuses(
            device, ValueError, "batch must be 1, got 2", self.make(rng, batch=2, seqlen=10), cu_seqlens=cumulative([4, 6])
        )
        wrong_count = self.make(rng, batch=1, seqlen=10, sequences=3)
        self.refuses(device, ValueError, "num_sequences=2", wrong_count, cu_seqlens=cumulative([4, 6]))

    def test_wrong_shapes_name_the_argument(self, device, rng):
        inputs = self.make(rng)
        for name, value in inputs.items():
            if name == self.op.main:
                continue
            longer = np.concatenate([value, value[:1]])
            with pytest.raises(ValueError, match=rf"{self.op.name}: .*({name}|{self.op.main})"):
                self.op.run(device, {**inputs, name: longer}, **self.op.options)
            with pytest.raises(ValueError, match=rf"{self.op.name}: {name} has shape .*; expected \("):
                self.op.run(device, {**inputs, name: value[None]}, **self.op.options)

    def test_wrong_dtypes_name_the_argument(self, device, rng):
        inputs = self.make(rng)
        for name, value in inputs.items():
            with pytest.raises(TypeError, match=rf"{self.op.name}: {name} is int32; expected "):
                self.op.run(device, {**inputs, name: np.zeros(value.shape, np.int32)}, **self.op.options)

    def test_wrong_outputs_are_refused(self, device, rng):
        inputs = self.make(rng)
        plain = self.op.run(device, inputs, **self.op.options)
        for name, value in plain.items():
            self.refuses(device, ValueError, "has shape", inputs, {name: poison(value.shape[:-1], value.dtype)})
            self.refuses(device, TypeError, "is int32; expected", inputs, {name: poison(value.shape, np.int32)})
            overlapping = np.lib.stride_tricks.as_strided(poison(value.shape, value.dtype), value.shape, (0, *value.strides[1:]))
            self.refuses(device, ValueError, "share memory", inputs, {name: overlapping})

    def test_read_only_output_is_refused(self, rng):
        from support import Cpu

        inputs = self.make(rng)
        for name, value in self.op.run(Cpu(), inputs, **self.op.options).items():
            frozen = poison(value.shape, value.dtype)
            frozen.flags.writeable = False
            self.refuses(Cpu(), ValueError, "read-only", inputs, {name: frozen})

    def test_missing_arguments(self, device, rng):
        inputs = self.make(rng)
        for name in inputs.keys() - set(self.optional):
            with pytest.raises(TypeError, match=name):
                self.op.run(device, {k: v for k, v in inputs.items() if k != name}, **self.op.options)
            with pytest.raises(ValueError, match=rf"{self.op.name}: {name} is required"):
                self.op.run(device, {**inputs, name: None}, **self.op.options)
