"""What the backward of every scan promises. A test_<op>.py subclasses GradientContract and names its op."""

import numpy as np
import pytest
from scan_contract import PACKINGS, cumulative
from support import LAYOUTS, NARROW, Cpu, assert_accurate, assert_same_bits, laid_out


class GradientContract:
    op = None  # a cases.Backward
    sizes = {}  # of inputs, where the op wants others
    optional = ()
    lengths = (0, 1, 2, 3, 4, 5, 7, 8, 31, 63, 64, 65, 67, 127, 128, 129, 257)

    def make(self, rng, **sizes):
        return self.op.inputs(rng, **{**self.sizes, **sizes})

    def run(self, device, inputs, **options):
        return self.op.run(device, inputs, **{**self.op.options, **options})

    def check(self, device, inputs, **options):
        return self.op.check(device, inputs, **{**self.op.options, **options})

    def assert_same(self, got, expected, note="", names=None):
        for name in names or got:
            if expected[name] is not None:
                assert_same_bits(got[name], expected[name], f"{name} {note}")

    # ---- values --------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("seqlen", lengths)
    def test_lengths(self, device, rng, seqlen):
        self.check(device, self.make(rng, seqlen=seqlen))

    @pytest.mark.parametrize("seqlen", (511, 1031))
    def test_long(self, device, rng, seqlen):
        self.check(device, self.make(rng, batch=1, seqlen=seqlen))

    @pytest.mark.parametrize("reverse", (False, True))
    @pytest.mark.parametrize("dtype", ("float32", *NARROW))
    def test_dtypes(self, device, rng, dtype, reverse):
        self.check(device, self.make(rng, dtype=dtype), reverse=reverse)

    def test_float64(self, rng):
        self.check(Cpu(), self.make(rng, dtype="float64"))
        self.check(Cpu(), self.make(rng, dtype="float64"), reverse=True)

    @pytest.mark.parametrize("batch", (0, 1, 3))
    def test_batch(self, device, rng, batch):
        self.check(device, self.make(rng, batch=batch))

    # ---- layouts -------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, device, rng, layout, dtype):
        inputs = self.make(rng, dtype=dtype)
        plain = self.run(device, inputs)
        got = self.check(device, {name: laid_out(value, layout) for name, value in inputs.items()})
        self.assert_same(got, plain)

    def test_every_input_alone_is_a_view(self, device, rng):
        """known_bugs 33: a dy with strides, like everything else."""
        inputs = self.make(rng)
        plain = self.run(device, inputs)
        for changed, value in inputs.items():
            got = self.run(device, {**inputs, changed: laid_out(value, "gapped")})
            self.assert_same(got, plain, f"with a strided {changed}")

    def test_inputs_are_not_written(self, device, rng):
        inputs = self.make(rng)
        for value in inputs.values():
            value.flags.writeable = False
        before = {name: value.copy() for name, value in inputs.items()}
        self.run(device, inputs)
        for name in inputs:
            assert_same_bits(inputs[name], before[name], name)

    # ---- optional arguments --------------------------------------------------------------------------------------------
    def test_each_optional_input_left_out(self, device, rng):
        """known_bugs 34: the gradients of what is left out are None."""
        every = self.make(rng)
        for name in (*self.optional, *self.op.carried):
            got = self.check(device, {**every, name: None})
            assert name not in self.optional or got[f"d{name}"] is None

    def test_each_optional_input_alone(self, device, rng):
        every = self.make(rng)
        inputs = (*self.optional, *self.op.carried)
        for name in (None, *inputs):
            self.check(device, {**every, **dict.fromkeys(set(inputs) - {name})})

    def test_loss_on_the_final_state_alone(self, device, rng):
        inputs = self.make(rng)
        inputs["dy"][:] = 0
        self.check(device, inputs)

    # ---- packings ------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
    @pytest.mark.parametrize("reverse", (False, True))
    @pytest.mark.parametrize("packing", PACKINGS)
    def test_packed(self, device, rng, packing, reverse, dtype):
        lengths = PACKINGS[packing]
        inputs = self.make(rng, dtype=dtype, batch=1, seqlen=sum(lengths), sequences=len(lengths))
        self.check(device, inputs, cu_seqlens=cumulative(lengths), reverse=reverse)

    def test_no_sequences(self, device, rng):
        got = self.check(device, self.make(rng, batch=1, seqlen=5, sequences=0), cu_seqlens=np.zeros(1, np.int32))
        for name in got:
            assert not np.any(got[name])

    def test_empty_sequences_pass_the_gradient_of_their_state_on(self, device, rng):
        inputs = self.make(rng, batch=1, seqlen=12, sequences=3)
        got = self.run(device, inputs, cu_seqlens=cumulative([0, 12, 0]))
        for final, initial in self.op.carried.items():
            assert_same_bits(got[f"d{initial}"][[0, 2]], inputs[final][[0, 2]], f"d{initial}")

    @pytest.mark.parametrize("reverse", (False, True))
    def test_rows_past_the_last_packed_token(self, device, rng, reverse):
        """known_bugs 19: they have no gradient, and whatever lies there reaches none."""
        lengths, used, allocated = [11, 0, 18], 29, 200
        inputs = self.make(rng, batch=1, seqlen=allocated, sequences=len(lengths))
        for name, value in self.op.tokens(inputs, slice(used, None)).items():
            if self.op.has_tokens(name, inputs[name]):
                value[:] = np.nan
        got = self.check(device, inputs, cu_seqlens=cumulative(lengths), reverse=reverse)
        for name in got:
            if self.op.has_tokens(name[1:], inputs[name[1:]]):
                assert not np.any(got[name][:, used:]), f"{name} is not zero past the last packed token"

    # ---- bits ----------------------------------------------------------------------------------------------------------
    @pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
    def test_same_bits_every_run(self, device, rng, dtype):
        inputs = self.make(rng, dtype=dtype, batch=5, seqlen=131)
        first = self.run(device, inputs)
        for _ in range(5):
            self.assert_same(self.run(device, inputs), first)

    def test_same_bits_at_any_thread_count(self, rng, threads):
        inputs = self.make(rng, batch=3, seqlen=531)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(self.run(Cpu(), inputs))
        self.assert_same(results[1], results[0], "on two threads")
        self.assert_same(results[2], results[0], "on three threads")

    def batch_invariant(self, device):
        """The CPU is always so; on a GPU it is asked for, where the op has the choice."""
        has_choice = self.op.scan.name in ("ssd_scan", "selective_scan", "mamba2_scan")
        return {"batch_invariant": True} if device.name == "cuda" and has_choice else {}

    def of_rows(self, inputs):
        """The gradients that are not sums over the batch."""
        return [f"d{name}" for name in self.op.gradients if self.op.has_rows(name, inputs[name])]

    def test_same_bits_at_any_batch_size(self, device, rng):
        options = self.batch_invariant(device)
        inputs = self.make(rng, batch=4, seqlen=131)
        together = self.run(device, inputs, **options)
        for row in range(4):
            alone = self.run(device, self.op.rows(inputs, slice(row, row + 1)), **options)
            part = {name: together[name][row : row + 1] for name in self.of_rows(inputs)}
            self.assert_same(alone, part, f"of row {row}", part)

    def test_same_bits_in_any_packing(self, device, rng):
        options = self.batch_invariant(device)
        lengths = [19, 0, 97, 1, 64]
        cu_seqlens = cumulative(lengths)
        inputs = self.make(rng, batch=1, seqlen=sum(lengths), sequences=len(lengths))
        packed = self.run(device, inputs, cu_seqlens=cu_seqlens, **options)
        for s, (first, last) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:])):
            alone_inputs = self.op.tokens(inputs, slice(first, last))
            states = (*self.op.carried, *self.op.carried.values())
            alone = self.run(device, alone_inputs | {name: inputs[name][s : s + 1] for name in states}, **options)
            for name in self.of_rows(inputs):
                part = packed[name][s : s + 1] if name[1:] in states else packed[name][:, first:last]
                assert_same_bits(alone[name], part, f"{name} of sequence {s}")

    def test_parameters_of_a_batch_and_of_its_packing_have_the_same_bits(self, device, rng):
        options = self.batch_invariant(device)
        if device.name == "cuda" and (not options or self.op.scan.name == "mamba2_scan"):
            pytest.skip("on a GPU the shape decides how such sums are split, those of the convolution and the norm in any case")
        inputs = self.make(rng, batch=3, seqlen=70)
        flat = {name: v.reshape(1, -1, *v.shape[2:]) if self.op.has_tokens(name, v) else v for name, v in inputs.items()}
        batch = self.run(device, inputs, **options)
        packed = self.run(device, flat, cu_seqlens=cumulative([70, 70, 70]), **options)
        self.assert_same(packed, batch, "packed", batch.keys() - self.of_rows(inputs))

    # ---- what one row holds stays there ------------------------------------------------------------------------------------
    @pytest.mark.parametrize("bad", (np.nan, np.inf))
    def test_bad_row_stays_alone(self, device, rng, bad):
        clean = self.make(rng, batch=3)
        spoiled = {name: value.copy() for name, value in clean.items()}
        for name, value in spoiled.items():
            if self.op.has_rows(name, value):
                value[1] = bad
        expected, got = self.run(device, clean), self.run(device, spoiled)
        for name in self.of_rows(clean):
            for row in (0, 2):
                assert_same_bits(got[name][row], expected[name][row], f"{name} of row {row}")

    def test_bad_sequence_stays_alone(self, device, rng):
        clean = self.make(rng, batch=1, seqlen=44, sequences=3)
        spoiled = {name: value.copy() for name, value in clean.items()}
        for name, value in self.op.tokens(spoiled, slice(9, 30)).items():
            if self.op.has_tokens(name, spoiled[name]):
                value[:] = np.nan
        states = (*self.op.carried, *self.op.carried.values())
        for name in states:
            spoiled[name][1] = np.nan
        options = dict(cu_seqlens=cumulative([9, 21, 14]))
        expected, got = self.run(device, clean, **options), self.run(device, spoiled, **options)
        for name in self.of_rows(clean):
            keep, axis = ([0, 2], 0) if name[1:] in states else (np.r_[0:9, 30:44], 1)
            assert_same_bits(np.take(got[name], keep, axis), np.take(expected[name], keep, axis), name)

    # ---- errors --------------------------------------------------------------------------------------------------------
    def test_errors_name_the_argument(self, device, rng):
        inputs = self.make(rng)
        op = f"{self.op.scan.name}_backward"
        for name, value in inputs.items():
            with pytest.raises(ValueError, match=rf"{op}: {name} has shape .*; expected \("):
                self.run(device, {**inputs, name: value[None]})
            with pytest.raises(TypeError, match=rf"{op}: {name} is int32; expected "):
                self.run(device, {**inputs, name: np.zeros(value.shape, np.int32)})
        with pytest.raises(ValueError, match=rf"{op}: dy is required"):
            self.run(device, {**inputs, "dy": None})

    # ---- beside torch --------------------------------------------------------------------------------------------------
    def torch_forward(self, **inputs):
        """The recurrence in torch, float64: returns y and the final state. None where the op has none of its own."""
        raise NotImplementedError

    @pytest.mark.parametrize("reverse", (False, True))
    def test_torchs_gradients(self, rng, reverse):
        pytest.importorskip("torch")
        import torch_gradients

        every = self.make(rng, dtype="float64", seqlen=9)
        for omit in ((), *((name,) for name in self.optional), self.optional):
            inputs = {**every, **dict.fromkeys(omit)}
            given = {name: inputs[name] for name in self.op.gradients if inputs[name] is not None}
            cotangents = [inputs["dy"], *(inputs[name] for name in self.op.carried)]
            expected = torch_gradients.gradients(self.torch_forward, given, cotangents, reverse=reverse, **self.op.options)
            options = dict(reverse=reverse, **self.op.options)
            for got in (self.run(Cpu(), inputs, **options), self.op.expected(inputs, **options)):
                for name in given:
                    assert_accurate(got[f"d{name}"], expected[name], f"d{name} without {omit}")

    def test_gradcheck(self, rng):
        pytest.importorskip("torch")
        import torch_gradients

        inputs = self.make(rng, dtype="float64", batch=1, seqlen=4)
        given = {name: inputs[name] for name in self.op.gradients}
        torch_gradients.gradcheck(
            self.op.scan.name, given, self.op.gradients, self.op.scan.want_all, tuple(self.op.carried), **self.op.options
        )
