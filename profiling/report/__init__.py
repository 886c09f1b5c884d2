"""Report on a run, or on two side by side, as one HTML page: `python -m profiling.report`."""
