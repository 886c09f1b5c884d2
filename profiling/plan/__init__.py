"""What a run would need of a cluster: `python -m profiling.plan`."""
