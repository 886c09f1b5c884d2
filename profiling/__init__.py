"""What a run costs: instruments that engine and benches use, and programs.

clock.py      time variants side by side             memory.py     peak bytes of a call
phases.py     where a step's time goes               window.py     steps under torch's profiler
energy.py     joules of GPUs and processors          machine.py    what was measured on, and its matmul peak
step/         what a step computes, holds and moves, counted without running it
plan/         python -m profiling.plan               report/       python -m profiling.report
bench.py      python -m profiling.bench NAME         benches/      one file a bench
doctor.py     python -m profiling.doctor             checks/       one file a kind of question
scaling.py    python -m profiling.scaling               gpu_check/   python -m profiling.gpu_check
"""
