"""Generators: models of a tokenizer's latents given a class, trained and sampled here.

Two families. Diffusion (DiT, SiT, LightningDiT): blocks -> diffusion, with the processes ddpm or flow_matching.
Autoregressive (MAR, RandomAR, RasterAR): tokens -> blocks -> autoregressive_networks -> autoregressive. Both: draws
(random numbers), sampling (settings), factory (build, write, read).

Shapes, beside the legend of `model`: B latents with their classes, L h w one latent, N tokens of one latent (T = B N in
all), S steps of a noise schedule. Where tokens are drawn one by one: C numbers of a token, K known tokens, R rows of
the head (noisy tokens), X latents with and without their classes.

Engine and evaluation use all generators through the same methods:

    generator = build_generator(section, LatentShape(64, 16, 16), num_classes=1000, attention="sdpa")
    draws = draw(generator.draw_counts, seed=0, step=7, positions=positions_B)
    terms = generator(latents_BLhw, labels_B, draws)            # {"total": ..., "velocity": ..., "direction": ...}
    draws = draw(generator.sampling_draw_counts(sampling), seed=1, step=0, positions=positions_B)
    latents_BLhw = generator.sample(labels_B, sampling, draws)  # label num_classes: no class
"""
