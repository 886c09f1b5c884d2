"""python -m profiling.doctor: what this machine has, what a run would use of it, what is missing."""
