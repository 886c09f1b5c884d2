"""A corpus as latents on a disk: files as LightningDiT writes them, their statistics, batches for a generator."""
