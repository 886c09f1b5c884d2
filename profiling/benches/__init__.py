"""Benches: functions `bench_NAME(recorder)`, listed in profiling/bench.py."""
