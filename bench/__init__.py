"""Benchmarks of every op, installed as statescan.bench."""
