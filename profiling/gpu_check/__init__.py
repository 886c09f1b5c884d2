"""python -m profiling.gpu_check: everything that is to be shown on a GPU, in one command. Standard library alone."""
