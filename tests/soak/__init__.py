"""A long run under a random schedule of faults, held against the same run undisturbed: `make soak`."""
