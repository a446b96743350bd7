"""What the decode ops promise. A test_<op>.py subclasses UpdateContract and names its op."""

import numpy as np
import pytest
import statescan
from support import LAYOUTS, NARROW, Cpu, assert_accurate, assert_same_bits, copied, exact, laid_out, memory_of, poison


def indices(*slots, dtype=np.int32):
    return np.array(slots, dtype)


class UpdateContract:
    op = None  # a cases.Update
    sizes = {}
    optional = ()

    def make(self, rng, **sizes):
        return self.op.inputs(rng, **{**self.sizes, **sizes})

    # ---- values --------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("ntokens", (None, 0, 1, 2, 3, 4, 5, 17))
    @pytest.mark.parametrize("dtype", ("float32", *NARROW))
    def test_tokens(self, device, rng, dtype, ntokens):
        """known_bugs 24."""
        self.op.check(device, self.make(rng, dtype=dtype, ntokens=ntokens), **self.op.options)

    @pytest.mark.parametrize("ntokens", (None, 5))
    def test_float64(self, rng, ntokens):
        self.op.check(Cpu(), self.make(rng, dtype="float64", ntokens=ntokens), **self.op.options)

    @pytest.mark.parametrize("batch", (0, 1, 2, 17, 64))
    def test_batch(self, device, rng, batch):
        self.op.check(device, self.make(rng, batch=batch), **self.op.options)

    def test_each_optional_input_left_out(self, device, rng):
        every = self.make(rng, ntokens=2)
        for name in self.optional:
            self.op.check(device, {**every, name: None}, **self.op.options)
        self.op.check(device, {**every, **dict.fromkeys(self.optional)}, **self.op.options)

    def test_several_tokens_are_one_at_a_time(self, device, rng):
        inputs = self.make(rng, ntokens=17)
        whole = self.op.expected(inputs, **self.op.options)
        together = self.op.check(device, inputs, **self.op.options)
        now, parts = dict(inputs), []
        for t in range(17):
            step = self.op.run(device, {**self.op.tokens(now, t)}, **self.op.options)
            parts.append(step["y"])
            now |= {name: step[name] for name in self.op.states}
        got = {"y": np.stack(parts, axis=1), **{name: now[name] for name in self.op.states}}
        for name in got:
            assert_accurate(got[name], whole[name], name)
            assert_accurate(together[name], whole[name], name)

    # ---- slots ---------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("ntokens", (None, 3))
    @pytest.mark.parametrize("slots", ((4, 0, 2), (-1, 5, 0), (3, -1, -1), (-1, -1, -1), (5, 4, 3)))
    @pytest.mark.parametrize("index_dtype", (np.int32, np.int64))
    def test_slots(self, device, rng, slots, ntokens, index_dtype):
        """known_bugs 25: what no row points to keeps its bits, NaN included, and padding rows give zero."""
        inputs = self.make(rng, batch=3, slots=6, ntokens=ntokens)
        idle = [slot for slot in range(6) if slot not in slots]
        expected = self.op.expected(inputs, state_indices=indices(*slots), **self.op.options)
        for name in self.op.states:
            inputs[name][idle] = np.nan
        for name, value in inputs.items():
            if self.op.has_rows(name, value):
                value[[row for row in range(3) if slots[row] < 0]] = np.nan
        out = poison(expected["y"].shape, inputs[self.op.main].dtype)
        got = self.op.run(device, inputs, out, state_indices=indices(*slots, dtype=index_dtype), **self.op.options)
        assert_accurate(got["y"], expected["y"], "y")
        busy = [slot for slot in slots if slot >= 0]
        for name in self.op.states:
            assert_accurate(got[name][busy], expected[name][busy], name)
            assert_same_bits(got[name][idle], inputs[name][idle], f"{name} of idle slots")
        padding = [row for row in range(3) if slots[row] < 0]
        assert not np.any(got["y"][padding]), "a padding row is not zero"

    def test_strided_indices(self, device, rng):
        inputs = self.make(rng, batch=3, slots=6)
        self.op.check(device, inputs, state_indices=indices(4, 0, 2), **self.op.options)
        got = self.op.run(device, inputs, state_indices=laid_out(indices(4, 0, 2), "gapped"), **self.op.options)
        plain = self.op.run(device, inputs, state_indices=indices(4, 0, 2), **self.op.options)
        for name in got:
            assert_same_bits(got[name], plain[name], name)

    def test_reused_slot_forgets_nothing_else(self, device, rng):
        """A slot that held NaN is cleared and reused while others go on: no NaN comes back."""
        inputs = self.make(rng, batch=3, slots=5)
        for name in self.op.states:
            inputs[name][1] = np.nan
        first = self.op.run(device, inputs, state_indices=indices(0, 1, 2), **self.op.options)
        assert np.all(np.isfinite(exact(first["y"][[0, 2]]))) and not np.all(np.isfinite(exact(first["y"][1])))
        for name in self.op.states:
            inputs[name] = first[name]
            inputs[name][1] = 0
        second = self.op.run(device, inputs, state_indices=indices(3, 1, 0), **self.op.options)
        expected = self.op.expected(inputs, state_indices=indices(3, 1, 0), **self.op.options)
        assert_accurate(second["y"], expected["y"], "y")

    # ---- decode continues the scan ---------------------------------------------------------------------------------------
    def scan_inputs(self, inputs, part):
        """The tokens `part` of an update with a token axis, as the inputs of the scan it continues; no states."""
        taken = self.op.tokens(inputs, part)
        return {name: value for name, value in taken.items() if name not in self.op.states}

    @pytest.mark.parametrize("k", (0, 1, 3, 8, 20))
    def test_decode_continues_the_scan(self, device, rng, k):
        """known_bugs 22 and 24: prefill of k tokens, then one at a time, is one pass over all."""
        inputs = self.make(rng, ntokens=21)
        whole = self.op.scan.expected(self.scan_inputs(inputs, slice(None)), **self.op.options)
        prefill = self.op.scan.run(device, self.scan_inputs(inputs, slice(0, k)), **self.op.options)
        parts = [prefill["y"]]
        now = {**inputs, **{state: prefill[final] for state, final in self.op.states.items()}}
        for t in range(k, 21):
            step = self.op.run(device, self.op.tokens(now, t), **self.op.options)
            parts.append(step["y"][:, None])
            now |= {name: step[name] for name in self.op.states}
        assert_accurate(np.concatenate(parts, axis=1), whole["y"], "y")
        for state, final in self.op.states.items():
            assert_accurate(now[state], whole[final], state)

    # ---- layouts and memory ------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, device, rng, layout):
        inputs = self.make(rng, ntokens=2)
        plain = self.op.run(device, inputs, **self.op.options)
        views = {name: laid_out(value, layout) for name, value in inputs.items()}
        out = laid_out(poison(plain["y"].shape, plain["y"].dtype), layout)
        got = self.op.check(device, views, out, **self.op.options)
        for name in got:
            assert_same_bits(got[name], plain[name], name)

    def test_nothing_around_the_states_is_written(self, rng):
        inputs = self.make(rng)
        states = {name: copied(laid_out(inputs[name], "gapped")) for name in self.op.states}
        getattr(statescan, self.op.name)(**{**inputs, **states}, **self.op.options)
        for name, state in states.items():
            memory, _ = memory_of(state)
            assert np.count_nonzero(np.isfinite(exact(memory))) == state.size, f"the memory around {name} was written"

    def test_only_states_and_output_are_written(self, device, rng):
        inputs = self.make(rng)
        before = {name: value.copy() for name, value in inputs.items()}
        for name, value in inputs.items():
            value.flags.writeable = name in self.op.states
        self.op.run(device, inputs, **self.op.options)
        for name in inputs:
            assert_same_bits(inputs[name], before[name], name)

    # ---- bits ----------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("ntokens", (None, 3))
    def test_same_bits(self, device, rng, threads, ntokens):
        inputs = self.make(rng, batch=7, ntokens=ntokens)
        first = self.op.run(device, inputs, **self.op.options)
        for count in (1, 2, 3):
            threads(count)
            again = self.op.run(device, inputs, **self.op.options)
            for name in first:
                assert_same_bits(again[name], first[name], name)

    def test_same_bits_at_any_batch_size(self, device, rng):
        inputs = self.make(rng, batch=5)
        together = self.op.run(device, inputs, **self.op.options)
        for row in range(5):
            part = slice(row, row + 1)
            alone_inputs = self.op.rows(inputs, part) | {name: inputs[name][part] for name in self.op.states}
            alone = self.op.run(device, alone_inputs, **self.op.options)
            for name in alone:
                assert_same_bits(alone[name], together[name][part], f"{name} of row {row}")

    @pytest.mark.parametrize("bad", (np.nan, np.inf))
    def test_bad_row_stays_alone(self, device, rng, bad):
        clean = self.make(rng, batch=3)
        spoiled = {name: value.copy() for name, value in clean.items()}
        for name, value in spoiled.items():
            if self.op.has_rows(name, value) or name in self.op.states:
                value[1] = bad
        expected, got = (self.op.run(device, inputs, **self.op.options) for inputs in (clean, spoiled))
        for name in got:
            assert_same_bits(got[name][[0, 2]], expected[name][[0, 2]], name)

    # ---- errors --------------------------------------------------------------------------------------------------------
    def refuses(self, device, error, text, inputs, **options):
        with pytest.raises(error) as raised:
            self.op.run(device, inputs, **{**self.op.options, **options})
        assert f"{self.op.name}: " in str(raised.value) and text in str(raised.value), str(raised.value)

    def test_index_rules(self, device, rng):
        inputs = self.make(rng, batch=3, slots=6)
        self.refuses(device, ValueError, "state_indices has shape (2,); expected (batch=3)", inputs, state_indices=indices(0, 1))
        self.refuses(
            device, TypeError, "state_indices is float32; expected int32 or int64", inputs, state_indices=np.zeros(3, np.float32)
        )
        if device.name == "cpu":  # on a GPU the values are not read
            self.refuses(
                device,
                ValueError,
                "state_indices[1]=6 must lie in 0..5, or be -1 for padding",
                inputs,
                state_indices=indices(0, 6, 1),
            )
            self.refuses(
                device,
                ValueError,
                "state_indices[2]=-2 must lie in 0..5, or be -1 for padding",
                inputs,
                state_indices=indices(0, 1, -2),
            )
        for name in self.op.states:
            self.refuses(device, ValueError, "slots=3", {**inputs, name: np.concatenate([inputs[name]] * 2)})

    def test_wrong_shapes_name_the_argument(self, device, rng):
        inputs = self.make(rng)
        for name, value in inputs.items():
            with pytest.raises(ValueError, match=rf"{self.op.name}: "):
                self.op.run(device, {**inputs, name: np.zeros((1,) * 5, value.dtype)}, **self.op.options)
            if name in (self.op.main, "state"):
                continue
            with pytest.raises(ValueError, match=rf"{self.op.name}: {name} has shape .*; expected \("):
                self.op.run(device, {**inputs, name: np.zeros((1,) * 5, value.dtype)}, **self.op.options)

    def test_wrong_dtypes_name_the_argument(self, device, rng):
        inputs = self.make(rng)
        for name, value in inputs.items():
            blamed = "state" if name == "A" and self.sizes.get("complex_A") else name  # a real A makes a complex state wrong
            with pytest.raises(TypeError, match=rf"{self.op.name}: {blamed} is \w+; expected "):
                self.op.run(device, {**inputs, name: np.zeros(value.shape, np.int32)}, **self.op.options)

    def test_states_must_be_writable_and_whole(self, rng):
        inputs = self.make(rng)
        for name in self.op.states:
            frozen = inputs[name].copy()
            frozen.flags.writeable = False
            with pytest.raises(ValueError, match=f"{self.op.name}: {name} is written, but the array is read-only"):
                getattr(statescan, self.op.name)(**{**inputs, name: frozen}, **self.op.options)
            overlapping = np.lib.stride_tricks.as_strided(frozen.copy(), frozen.shape, (0, *frozen.strides[1:]))
            with pytest.raises(
                ValueError, match=f"{self.op.name}: {name} is written, but its strides make elements share memory"
            ):
                getattr(statescan, self.op.name)(**{**inputs, name: overlapping}, **self.op.options)

    def test_wrong_outputs_are_refused(self, device, rng):
        inputs = self.make(rng)
        y = self.op.run(device, inputs, **self.op.options)["y"]
        for out, error, text in (
            (poison(y.shape[:-1], y.dtype), ValueError, "has shape"),
            (poison(y.shape, np.complex64), TypeError, "is complex64; expected float32"),
            (np.lib.stride_tricks.as_strided(poison(y.shape, y.dtype), y.shape, (0, *y.strides[1:])), ValueError, "share memory"),
        ):
            self.refuses(device, error, text, inputs, out=out)

    def test_errors_leave_the_states_alone(self, rng):
        inputs = self.make(rng)
        states = {name: inputs[name].copy() for name in self.op.states}
        with pytest.raises(ValueError):
            getattr(statescan, self.op.name)(**inputs, **self.op.options, out=np.zeros(1, np.float32))
        for name in states:
            assert_same_bits(inputs[name], states[name], name)
