"""From tar shard to Batch: corpora and captions, a deterministic order, host-drawn views, decoded pixels.

Imports configs only; never model.
"""
