"""What a run costs: instruments that engine and benches use, and programs.

clock.py      time variants side by side        memory.py     peak bytes of a call
machine.py    what was measured on, and its matmul peak
bench.py      python -m profiling.bench NAME    benches/      one file a bench
"""
