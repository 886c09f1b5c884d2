"""Generators: models of a tokenizer's latents given a class, trained and sampled here.

Read in the order data travels: shape -> draws -> conditioning -> modulated_block -> backbone -> velocity or noising ->
diffusion (the trained module) -> sampling -> ode -> build -> weights. The autoregressive ones: token_order ->
token_embedding -> token_block -> masked_backbone or causal_backbone -> diffusion_head -> token_process ->
autoregressive.

Shapes, beside the legend of `model`: B latents with their classes, L h w one latent, N tokens of one latent (T = B N in
all), S steps of a noise schedule. Where tokens are drawn one by one: C numbers of a token, K known tokens, R rows of
the head (noisy tokens), X latents with and without their classes.

Every generator is the same to the engine and to evaluation:

    generator = build(section, LatentShape(64, 16, 16), num_classes=1000, attention="sdpa")
    draws = draw(generator.needs, seed=0, step=7, positions=positions_B)
    terms = generator(latents_BLhw, labels_B, draws)            # {"total": ..., "velocity": ..., "direction": ...}
    draws = draw(generator.sampling_needs(sampling), seed=1, step=0, positions=positions_B)
    latents_BLhw = generator.sample(labels_B, sampling, draws)  # label num_classes: no class
"""
