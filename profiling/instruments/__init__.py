"""Instruments that measure a run: phases, memory, energy, profiler, machine. They import nothing of the engine.

phases.py      time of each phase of a step                     memory.py      peak bytes of a call or a process
energy.py      joules of GPUs and processors                    profiler.py    steps and calls under torch.profiler
machine.py     the device, its peaks, and timing of variants
"""
