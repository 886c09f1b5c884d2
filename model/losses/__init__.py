"""The losses: one a file, pure functions of tensors, summed in `total`.

In the order of the paper: clip; dino + ibot + koleo on the teacher's `targets` (ssl); pixels + perceptual, and
alignment with a frozen encoder (rec); gan for stage 2. Other ranks are reached through a `comm`; each rank's loss is
the mean over its own rows, so that the mean over ranks, which is what ZeRO makes of the gradients, is the loss of the
whole batch.

Letters beyond model/__init__.py: E width of what is compared (joint space, prototypes), G = 2S global crops,
L = N*S local crops, A rows of all ranks.
"""
