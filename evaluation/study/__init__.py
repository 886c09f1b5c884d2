"""The scaling study: tokenizers by objective and compute, each followed by the same generator."""
