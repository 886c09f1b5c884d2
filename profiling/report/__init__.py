"""A run as one page: `python -m profiling.report`."""
