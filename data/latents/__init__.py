"""Latents of a corpus on disk, in LightningDiT's layout: store, channel statistics, loader for a generator."""
