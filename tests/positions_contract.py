"""What the scans that give states at `state_positions` promise. A test_<op>.py subclasses PositionsContract and names its op."""

import numpy as np
import pytest
import statescan
from scan_contract import PACKINGS, cumulative
from support import DTYPES, LAYOUTS, NARROW, assert_accurate, assert_same_bits, exact, laid_out, poison


class PositionsContract:
    op = None  # a cases.Scan
    sizes = {}

    def make(self, rng, **sizes):
        return self.op.inputs(rng, **{**self.sizes, **sizes})

    def run(self, device, inputs, positions, **options):
        """y, final_state and the states at the positions."""
        given = {name: device.put(value) for name, value in {**inputs, **options, "state_positions": positions}.items()}
        results = device.call(getattr(statescan, self.op.name), **given, return_final_state=True, **self.op.options)
        return [device.get(result) for result in results]

    def expected(self, inputs, positions, cu_seqlens=None, reverse=False):
        """Each state as the final state of the tokens before it."""
        seqlen = inputs["x"].shape[1]
        spans = [(row, 0, seqlen) for row in range(len(inputs["x"]))]
        if cu_seqlens is not None:
            spans = [(0, int(first), int(last)) for first, last in zip(cu_seqlens[:-1], cu_seqlens[1:])]
        states = [[None] * positions.shape[1] for _ in spans]
        for s, (row, first, last) in enumerate(spans):
            start = {name: inputs[name][s : s + 1] for name in self.op.carried.values() if name in inputs}
            of_row = self.op.rows(inputs, slice(row, row + 1)) | start
            for k, position in enumerate(positions[s]):
                count = position if 0 <= position <= last - first else 0
                part = slice(last - count, last) if reverse else slice(first, first + count)
                final = self.op.expected(self.op.tokens(of_row, part), reverse=reverse, **self.op.options)["final_state"][0]
                states[s][k] = final if count == position else np.zeros_like(final)
        return np.array(states)

    def coarser(self, device, inputs):
        """On a GPU states are as accurate as products of numbers of x's dtype."""
        return inputs["x"].dtype.name if device.name == "cuda" else None

    def check(self, device, inputs, positions, **options):
        y, final_state, states = self.run(device, inputs, positions, **options)
        expected = self.expected(inputs, positions, **options)
        assert_accurate(states, expected, "states", self.coarser(device, inputs))
        plain = self.op.run(device, inputs, **options, **self.op.options)
        assert_same_bits(y, plain["y"], "y beside the states")
        assert_same_bits(final_state, plain["final_state"], "final_state beside the states")
        return states

    @pytest.mark.parametrize("dtype", ("float32", *NARROW))
    @pytest.mark.parametrize("reverse", (False, True))
    def test_positions(self, device, rng, reverse, dtype):
        positions = np.array([[0, 1, 2, 16, 47, 48, 64, 67], [-1, 5, 5, 33, 67, 68, -1, 2**20]], np.int32)
        states = self.check(device, self.make(rng, dtype=dtype), positions, reverse=reverse)
        assert not np.any(states[1, [0, 5, 6, 7]])

    def test_without_initial_state(self, device, rng):
        states = self.check(device, self.make(rng, omit=("initial_state",)), np.array([[0, 3, 50], [-1, 0, 67]], np.int64))
        assert not np.any(states[0, 0]) and not np.any(states[1, 1])

    @pytest.mark.parametrize("reverse", (False, True))
    @pytest.mark.parametrize("packing", PACKINGS)
    def test_packed(self, device, rng, packing, reverse):
        lengths = PACKINGS[packing]
        inputs = self.make(rng, batch=1, seqlen=sum(lengths), sequences=len(lengths))
        positions = np.array([[0, length // 3, length, length + 1, -1] for length in lengths], np.int32)
        self.check(device, inputs, positions, cu_seqlens=cumulative(lengths), reverse=reverse)

    def test_the_ends_are_the_carried_states(self, device, rng):
        inputs = self.make(rng)
        _, final_state, states = self.run(device, inputs, np.array([[0, 67], [0, 67]], np.int32))
        assert_same_bits(states[:, 0], inputs["initial_state"], "the state at 0")
        assert_same_bits(states[:, 1], final_state, "the state at the end")

    @pytest.mark.parametrize("seqlen", (0, 1))
    def test_short(self, device, rng, seqlen):
        self.check(device, self.make(rng, seqlen=seqlen), np.array([[0, 0, 1], [-1, 0, 1]], np.int32))

    def test_every_position(self, device, rng):
        positions = np.tile(np.arange(68, dtype=np.int32), (2, 1))
        inputs = self.make(rng)
        states = self.check(device, inputs, positions)
        again = self.run(device, inputs, positions[:, 40:41])[2]
        assert_same_bits(again[:, 0], states[:, 40], "a state asked for alone")

    def test_no_positions(self, device, rng):
        assert self.run(device, self.make(rng), np.zeros((2, 0), np.int32))[2].shape[:2] == (2, 0)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, device, rng, layout):
        inputs, positions = self.make(rng), np.array([[1, 40], [7, 67]], np.int64)
        plain = self.run(device, inputs, positions)[2]
        out = device.put(laid_out(poison(plain.shape, plain.dtype), layout))
        states = self.run(device, inputs, laid_out(positions, layout), position_states_out=out)[2]
        assert_same_bits(states, plain, "states")

    def test_narrow_states(self, device, rng):
        if self.sizes.get("complex_A"):
            pytest.skip("complex states have one dtype")
        inputs, positions = self.make(rng), np.array([[1, 40], [7, 67]], np.int64)
        expected = self.expected(inputs, positions)
        for dtype in NARROW:
            out = device.put(poison(expected.shape, DTYPES[dtype]))
            got = self.run(device, inputs, positions, position_states_out=out)[2]
            assert_accurate(got, expected, f"states in {dtype}", self.coarser(device, inputs))

    def test_alone_in_the_result(self, device, rng):
        """(y, states) without a final state."""
        given = {name: device.put(value) for name, value in self.make(rng).items()}
        positions = device.put(np.array([[3], [4]], np.int32))
        results = device.call(getattr(statescan, self.op.name), **given, state_positions=positions, **self.op.options)
        assert len(results) == 2 and device.get(results[1]).shape[:2] == (2, 1)

    def test_same_bits_alone_and_in_a_packing(self, device, rng):
        if device.name != "cpu":
            pytest.skip("asked for with batch_invariant on a GPU")
        lengths = [19, 0, 97, 1, 64]
        cu_seqlens = cumulative(lengths)
        inputs = self.make(rng, batch=1, seqlen=sum(lengths), sequences=len(lengths))
        positions = np.array([[0, length // 2, length] for length in lengths], np.int32)
        packed = self.run(device, inputs, positions, cu_seqlens=cu_seqlens)[2]
        for s, (first, last) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:])):
            alone = self.op.tokens(inputs, slice(first, last)) | {"initial_state": inputs["initial_state"][s : s + 1]}
            assert_same_bits(self.run(device, alone, positions[s : s + 1])[2][0], packed[s], f"states of sequence {s}")

    def test_errors(self, device, rng):
        inputs = self.make(rng)
        for positions, error, text in (
            (np.zeros((3, 1), np.int32), ValueError, "state_positions has shape (3, 1); expected (num_sequences=2, npositions)"),
            (np.zeros(2, np.int32), ValueError, "state_positions has shape (2,)"),
            (np.zeros((2, 1), np.float32), TypeError, "state_positions is float32; expected int32 or int64"),
        ):
            with pytest.raises(error) as raised:
                self.run(device, inputs, positions)
            assert f"{self.op.name}: {text}" in str(raised.value)
        with pytest.raises(ValueError, match="position_states has shape"):
            out = device.put(poison((2, 3, *exact(inputs["initial_state"]).shape[1:]), inputs["initial_state"].dtype))
            self.run(device, inputs, np.zeros((2, 2), np.int32), position_states_out=out)
        with pytest.raises(ValueError, match="position_states without state_positions"):
            self.run(device, inputs, None, position_states_out=out)

    def test_positions_ascend(self, rng):
        from support import Cpu  # on a GPU the values are not read

        with pytest.raises(ValueError, match="state_positions must ascend, got 5 then 3 in sequence 1"):
            self.run(Cpu(), self.make(rng), np.array([[1, 2, 3], [5, -1, 3]], np.int32))
