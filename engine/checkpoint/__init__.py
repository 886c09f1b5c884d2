"""Checkpoints: saved behind the steps, whole or not at all, checked when read.

    checkpoints/step-00000300/   rank-00000.safetensors ... state.json config.yaml SHA256SUMS
    checkpoints/latest           "step-00000300"

    saver = Saver(root, config)                     # saver.py
    saver.save(300, training.kept())

    path = newest_good(root, say)                   # verified.py: `latest`, or the one before it where it is damaged
    state, whole = load(path, training.kept())      # contents.py

A checkpoint appears in the moment its directory is renamed, so a process that is killed at any point leaves the one
before it. `sha256sum -c SHA256SUMS` checks one by hand. All ranks write to one file system.
"""
