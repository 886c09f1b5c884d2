"""Kinds of training for the one loop of engine/trainer.py: pre-training, decoder against discriminator, generators."""
