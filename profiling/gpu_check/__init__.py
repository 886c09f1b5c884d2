"""python -m profiling.gpu_check: all tests and benches for GPUs in one command. Standard library alone."""
