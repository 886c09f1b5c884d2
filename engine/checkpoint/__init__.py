"""Checkpoints: saved in the background, complete or absent, checked when read.

    checkpoints/step-00000300/   rank-00000.safetensors ... state.json config.yaml SHA256SUMS
    checkpoints/latest           "step-00000300"

    saver = Saver(root, config)                        # saver.py
    saver.save(300, task.train_state())

    path = newest_good(root, log)                      # contents.py: `latest`, or the one before it where it is damaged
    state = load_checkpoint(path, task.train_state())

A checkpoint appears in the moment its directory is renamed, so a process that is killed at any point leaves the one
before it. `sha256sum -c SHA256SUMS` checks one by hand. All ranks write to one file system.
"""
