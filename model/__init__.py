"""The models that are trained: one trunk over one packed sequence, text tower, heads, decoder, teacher.

Read in the order data travels: packing -> rope -> block -> trunk -> text -> heads -> latent -> decoder -> pretrainer ->
outputs -> losses. After training: weights, tokenizer, hub. Generators of latents: generator/.

Shapes. A tensor whose shape changes on its way carries its axes as a suffix: `x_TD` is (T, D), `q_THE` is (T, H, E).

    B  image-text pairs of one rank          S  segments: runs of tokens that attend to each other only
    T  packed tokens, padding included       N  tokens of one segment: CLS, registers, then patches
    D  width                                 P  patches of one crop, row by row
    H  attention heads                       E  width of one head; in outputs, of what is compared
    F  hidden width of an MLP                L  latent channels
    G  global ssl crops, view-major          K  prototypes
    M  hidden (masked) patches               C  caption length in tokens
    R  reconstructed images                  V  visible patches of one crop

Only model/outputs.py counts local crops with L, where no latent is near.
"""
