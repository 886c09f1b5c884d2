"""Which latents a generator is trained on: pinned by the digest of the tokenizer that made them.

config = pinned(config)          # latents.tokenizer is now that of the directory: science
"""

from __future__ import annotations

from configs import UserError
from configs.generator import GeneratorConfig
from data.latents.store import LatentStore


def pinned(config: GeneratorConfig) -> GeneratorConfig:
    """The config with latents.tokenizer filled in. Raises UserError where the store is missing, or another one."""
    given, found = config.latents, LatentStore(config.latents.train).tokenizer
    if given.tokenizer not in (None, found):
        raise UserError(
            f"latents.train={given.train} was made by the tokenizer {found}, but latents.tokenizer={given.tokenizer}: "
            "these are other latents; give the directory that was meant, or remove latents.tokenizer"
        )
    return config.model_copy(update={"latents": given.model_copy(update={"tokenizer": found})})
