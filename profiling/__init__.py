"""Measure and predict what a run costs: instruments that the engine uses, predictions, and programs.

instruments/    phases, memory, energy, torch.profiler, the machine's peaks
cost/           FLOPs, bytes moved and sent, peak memory of a step: predicted
plan/           python -m profiling.plan               report/       python -m profiling.report
bench.py        python -m profiling.bench NAME         benches/      the benches
doctor/         python -m profiling.doctor             gpu_check/    python -m profiling.gpu_check
scaling.py      python -m profiling.scaling
"""
