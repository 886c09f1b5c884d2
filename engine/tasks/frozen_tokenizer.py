"""The tokenizer that a run builds on: checked, and pinned by its digest; stage 2 writes it with the new decoder in it.

    config = with_tokenizer_digests(config)        # stage 2: tokenizer.sha256 becomes that of the file's tensors
    config = with_latents_digest(config)           # generators: latents.tokenizer becomes that of the latents
    model = described_tokenizer(config)            # as the file describes it
    write_with_decoder(config, averages, steps=1000, out=run_dir / "weights.safetensors")

Digests are science: a run keeps its tokenizer. What is written is the file, tensor by tensor and bit for bit, but for
the decoder's: whatever else it holds, text tower and heads included, stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from configs import DecoderGan, UserError, fingerprint
from configs.generator import GeneratorConfig
from configs.model import Model
from configs.section import require_digest
from data.latents.store import LatentStore
from engine.initial_weights import perceptual_digest
from model.decoder import PixelDecoder
from model.factory import TokenizerModules
from model.weights import WeightsOrigin, digest, open_weights, read_model_section, read_weights, write_weights

NEEDED_PARTS = ("trunk", "bottleneck", "decoder")


def with_tokenizer_digests(config: DecoderGan) -> DecoderGan:
    """Return the config with tokenizer.sha256 and objectives.rec.lpips_sha256 filled in.

    Raises UserError where a file is missing or damaged, is not the one whose digest the config has, lacks a part, or
    does not fit the model it describes or the images of this run.
    """
    rec = config.objectives.rec
    if rec.perceptual:
        rec = rec.model_copy(update={"lpips_sha256": perceptual_digest(rec.lpips_weights, rec.lpips_sha256)})
    given = config.tokenizer
    if not Path(given.weights).is_file():
        raise UserError(
            f"tokenizer.weights={given.weights} is not a file: stage 2 trains the decoder of a tokenizer that exists; "
            "name a run's weights.safetensors, or what `python -m model.interchange import` wrote"
        )
    found = digest(Path(given.weights))
    require_digest("tokenizer.weights", given.weights, "tokenizer.sha256", given.sha256, found)
    _check(config, described_tokenizer(config))
    changed = {
        "tokenizer": given.model_copy(update={"sha256": found}),
        "objectives": config.objectives.model_copy(update={"rec": rec}),
    }
    return config.model_copy(update=changed)


def with_latents_digest(config: GeneratorConfig) -> GeneratorConfig:
    """Return the config with latents.tokenizer filled in: the digest of the tokenizer that made the latents.

    Raises UserError where the store is missing, or made by another tokenizer than the config says.
    """
    given, found = config.latents, LatentStore(config.latents.train).tokenizer
    if given.tokenizer not in (None, found):
        raise UserError(
            f"latents.train={given.train} was made by the tokenizer {found}, but latents.tokenizer={given.tokenizer}: "
            "these are other latents; give the directory that was meant, or remove latents.tokenizer"
        )
    return config.model_copy(update={"latents": given.model_copy(update={"tokenizer": found})})


def described_tokenizer(config: DecoderGan) -> Model:
    """Return the model that the tokenizer's file describes."""
    path = Path(config.tokenizer.weights)
    with open_weights(path) as stored:
        return read_model_section(stored, path)


def write_with_decoder(config: DecoderGan, decoder: Mapping[str, Tensor], steps: int, out: Path) -> None:
    """Write the tokenizer's file with the tensors of `decoder` in place of its own.

    Raises UserError where the tokenizer's file is gone, or is another by now.
    """
    path = Path(config.tokenizer.weights)
    if not path.is_file() or digest(path) != config.tokenizer.sha256:
        problem = "is not the file this run began with" if path.is_file() else "is gone"
        raise UserError(
            f"tokenizer.weights={path} {problem} (sha256 {config.tokenizer.sha256}): put it back, or give its new path "
            "with --resume tokenizer.weights=FILE"
        )
    state, model = read_weights(path)
    origin = WeightsOrigin(config.views.image_size, config.name, steps, fingerprint(config))
    write_weights(out, {**state, **decoder}, model, origin)


def initial_decoder(config: DecoderGan, model: Model) -> PixelDecoder:
    """Return the decoder of the tokenizer's file, on the CPU, frozen."""
    with torch.device("meta"):
        decoder = PixelDecoder(model, "sdpa")
    with open_weights(Path(config.tokenizer.weights)) as stored:
        state = {name: stored.get_tensor(f"decoder.{name}").float() for name, _ in decoder.named_parameters()}
    decoder.load_state_dict(state, assign=True)
    return decoder.requires_grad_(False)


def _check(config: DecoderGan, model: Model) -> None:
    path = Path(config.tokenizer.weights)
    if model.conv is not None:
        raise UserError(
            f"tokenizer.weights={path} is an autoencoder of convolutions (model.conv): stage 2 trains decoders "
            "that are transformers; take another tokenizer"
        )
    with open_weights(path) as stored:
        held = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118 (not a mapping)
    missing = [part for part in NEEDED_PARTS if not any(key.startswith(f"{part}.") for key in held)]
    if missing:
        raise UserError(
            f"tokenizer.weights={path} has no {' and no '.join(missing)}: stage 2 needs {', '.join(NEEDED_PARTS)}; "
            "take a tokenizer that was trained with the rec objective on"
        )
    with torch.device("meta"):
        expected = TokenizerModules(model, frozenset(NEEDED_PARTS)).state_dict()
    for name, tensor in expected.items():
        if held.get(name) != tuple(tensor.shape):
            raise UserError(
                f"tokenizer.weights={path} describes a model in which {name} is {tuple(tensor.shape)}, and holds "
                f"{held.get(name, 'none')}: its tensors are another model's; export them anew"
            )
    if config.views.image_size % model.patch_size:
        raise UserError(
            f"views.image_size={config.views.image_size} is not a multiple of {model.patch_size}, the patch size of "
            f"tokenizer.weights={path}: an image holds whole patches; change views.image_size"
        )
