"""Corpora to write: image folders, synthetic scenes of shapes, scenes of emoji."""
