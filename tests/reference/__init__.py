"""The oracles: every op as its recurrence says, in float64 NumPy, one step at a time.

They take exact (float64, complex128) arrays, return every output, and share nothing with the kernels that they judge.
"""
