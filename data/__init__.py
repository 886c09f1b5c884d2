"""Data: tar shards -> deterministic order -> decoded views -> batches; corpora, captions, latents.

Imports configs only; never model.
"""
