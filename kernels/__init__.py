"""Fast kernels and the plain-PyTorch oracles they are tested against. Imports nothing of ours."""
