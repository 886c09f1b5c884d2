"""The tokenizer that stage 2 takes its encoder from: checked, pinned, read; and written with the new decoder in it.

    config = pinned(config)                        # tokenizer.sha256 becomes that of the file's tensors: science
    model = described(config)                      # the file says what it holds
    with opened(Path(config.tokenizer.weights)) as stored: ...
    write_with_decoder(config, averages, steps=1000, out=run_dir / "weights.safetensors")

What is written is the file, tensor by tensor and bit for bit, but for the decoder's: whatever else it holds, text tower
and heads included, stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from configs import DecoderGan, UserError, fingerprint
from configs.model import Model
from configs.section import require_digest
from engine.initial import perceptual_digest
from model.decoder import PixelDecoder
from model.factory import TokenizerModules
from model.weights import WeightsOrigin, digest, open_weights, read_model_section, read_weights, write_weights

NEEDED = ("trunk", "bottleneck", "decoder")


def pinned(config: DecoderGan) -> DecoderGan:
    """Return the config with tokenizer.sha256 and objectives.rec.lpips_sha256 filled in.

    Raises UserError where a file is missing or damaged, is not the one whose digest the config has, lacks a part, or
    does not fit the model it describes or the pictures of this run.
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
    _check(config, described(config))
    changed = {
        "tokenizer": given.model_copy(update={"sha256": found}),
        "objectives": config.objectives.model_copy(update={"rec": rec}),
    }
    return config.model_copy(update=changed)


def described(config: DecoderGan) -> Model:
    """The model of the tokenizer, as its file says."""
    path = Path(config.tokenizer.weights)
    with open_weights(path) as stored:
        return read_model_section(stored, path)


def write_with_decoder(config: DecoderGan, decoder: Mapping[str, Tensor], steps: int, out: Path) -> None:
    """The tokenizer's file with the tensors of `decoder` in the place of its own. Raises UserError where it is gone, or
    is another by now."""
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
    """The decoder as the file has it, on the CPU."""
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
    missing = [part for part in NEEDED if not any(key.startswith(f"{part}.") for key in held)]
    if missing:
        raise UserError(
            f"tokenizer.weights={path} has no {' and no '.join(missing)}: stage 2 needs {', '.join(NEEDED)}; take a "
            "tokenizer that was trained with the rec objective on"
        )
    with torch.device("meta"):
        expected = TokenizerModules(model, frozenset(NEEDED)).state_dict()
    for name, tensor in expected.items():
        if held.get(name) != tuple(tensor.shape):
            raise UserError(
                f"tokenizer.weights={path} describes a model in which {name} is {tuple(tensor.shape)}, and holds "
                f"{held.get(name, 'none')}: its tensors are another model's; export them anew"
            )
    if config.views.image_size % model.patch_size:
        raise UserError(
            f"views.image_size={config.views.image_size} is not a multiple of {model.patch_size}, the patch size of "
            f"tokenizer.weights={path}: a picture holds whole patches; change views.image_size"
        )
