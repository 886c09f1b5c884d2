"""Tar shards by their headers: which samples lie where, kept in an index beside each shard."""
