"""The public VTP layout: directories of config.json and model.safetensors, and conversion of our weights.

    write_public(directory, state, config.model, WeightsOrigin(image_size=256))
    state, model, origin = read_public(directory)       # ours, or one that public code wrote

    DIR/config.json                             the model (model/public_config.py)
    DIR/model.safetensors                       one file, or, as Hugging Face's libraries split large models,
    DIR/model.safetensors.index.json            {"weight_map": {"head.weight": "model-00002-of-00002.safetensors", ...}}
    DIR/model-00001-of-00002.safetensors ...    and the files that it names
    DIR/tokenizer.json                          the captions' vocabulary: optional, used by zero-shot

Conversion is exact both ways: names and a few shapes change, values do not. Teacher and prototypes are left out, the
layout has no place for them. The periods of RoPE, which the layout stores and we compute, are written and compared. A
model that the official class would refuse, or compute otherwise, is not exported; a decoder that it cannot build is,
with train_reconstruction=false in config.json (public_config.official_class_note).

    ours                              public
    trunk.patch_embed.weight          trunk.patch_embed.proj.weight
    bottleneck.weight                 trunk.feature_bottleneck.weight
    decoder.proj_in.weight (D, L)     pixel_decoder.proj_in.weight (D, L, 1, 1)
    clip.logit_scale (1,)             logit_scale ()           or (1,); both are logarithms
    trunk.blocks.0.mlp.w12 (2F, D)    trunk.blocks.0.mlp.w1 (F, D), .w2 (F, D)
    text.resblocks.0. ...             text_transformer.resblocks.0. ...
    text.ln_final.weight              ln_final.weight
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs import UserError
from configs.command_line import apply_umask
from configs.model import Model
from model.block import swiglu_hidden
from model.factory import TokenizerModules, is_tokenizer_parameter
from model.public_config import (
    has_logit_bias,
    has_scalar_logit_scale,
    model_from_config,
    official_hidden_width,
    public_config,
    read_image_size,
    tokenizer_parts,
)
from model.rope import build_rope
from model.weights import ORIGIN_KEY, WeightsOrigin

PUBLIC_WEIGHTS = "model.safetensors"
SHARD_INDEX = f"{PUBLIC_WEIGHTS}.index.json"
PUBLIC_CONFIG = "config.json"
VOCABULARY = "tokenizer.json"
LAYOUT_FILES = f"the public layout is config.json and {PUBLIC_WEIGHTS}, or {SHARD_INDEX} and the files it names"
_ALTERNATIVES = (
    "vtp-engine reads `weights.safetensors` itself; `python -m model.interchange programs` writes programs for torch"
)
_PREFIXES = (
    ("trunk.patch_embed.", "trunk.patch_embed.proj."),
    ("bottleneck.", "trunk.feature_bottleneck."),
    ("decoder.", "pixel_decoder."),
    ("clip.", ""),
    ("text.resblocks.", "text_transformer.resblocks."),
    ("text.", ""),
)


def read_public(directory: Path) -> tuple[dict[str, Tensor], Model, WeightsOrigin]:
    """Read weights under our names, their model section and their origin.

    Raises UserError for a missing or damaged file, and for all that `from_public` refuses.
    """
    described = read_config(directory)
    public, metadata = read_public_tensors(directory)
    try:
        state, model = from_public(public, described)
        text = metadata.get(ORIGIN_KEY)
        return state, model, WeightsOrigin.from_json(text) if text else WeightsOrigin(read_image_size(described))
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None


def write_public(directory: Path, state: dict[str, Tensor], model: Model, origin: WeightsOrigin) -> None:
    """Write config.json and model.safetensors. Raises UserError for a model that the layout cannot describe."""
    public, described = to_public(state, model, origin.image_size)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in public.items()}
    save_file(tensors, directory / PUBLIC_WEIGHTS, {"format": "pt", ORIGIN_KEY: origin.to_json()})
    apply_umask(directory / PUBLIC_WEIGHTS)
    (directory / PUBLIC_CONFIG).write_text(json.dumps(described, indent=2) + "\n")


def read_config(directory: Path) -> dict[str, Any]:
    """Read DIR/config.json. Raises UserError where it is missing or not a JSON object."""
    path = directory / PUBLIC_CONFIG
    if not path.is_file():
        raise UserError(f"{path} does not exist: {LAYOUT_FILES}")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(described, dict):
        raise UserError(f"{path} holds {type(described).__name__}, not keys and values")
    return described


def to_public(state: dict[str, Tensor], model: Model, image_size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert weights under our names to (tensors of model.safetensors, config.json).

    Raises UserError for a model the public layout cannot describe.
    """
    check_exportable(state, model)
    kept = {name: tensor for name, tensor in state.items() if is_tokenizer_parameter(name)}
    public = {key: part for name, tensor in kept.items() for key, part in _public_parts(name, tensor).items()}
    public["trunk.rope_embed.periods"] = build_rope(model, model.trunk).periods()
    if "decoder.norm.weight" in kept:
        public["pixel_decoder.rope_embed.periods"] = build_rope(model, model.decoder).periods()
    parts = {name.split(".")[0] for name in kept}
    return public, public_config(model, parts, "clip.logit_bias" in kept, image_size)


def from_public(public: dict[str, Tensor], described: dict[str, Any]) -> tuple[dict[str, Tensor], Model]:
    """Convert (tensors of model.safetensors, config.json) to weights under our names and their model section.

    Raises UserError for a setting we do not have, a missing or unknown tensor, or one of another shape.
    """
    model = model_from_config(described)
    with torch.device("meta"):
        wanted = TokenizerModules(
            model, tokenizer_parts(described, public.keys()), has_logit_bias(described)
        ).state_dict()
    is_scalar = has_scalar_logit_scale(described)
    left = dict(public)
    for part, vit in (("trunk", model.trunk), ("pixel_decoder", model.decoder)):
        _check_periods(left.pop(f"{part}.rope_embed.periods", None), build_rope(model, vit).periods(), part)
    state = {}
    for name, like in wanted.items():
        pieces = [
            _pop_tensor(left, key, tuple(part.shape)) for key, part in _public_parts(name, like, is_scalar).items()
        ]
        state[name] = (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).reshape(like.shape)
    if left:
        raise UserError(
            f"{len(left)} tensors are not of the VTP layout as config.json describes it, the first is {min(left)}; "
            "nothing was imported: get both files from one source"
        )
    return state, model


def check_exportable(state: dict[str, Tensor], model: Model) -> None:
    """Raise UserError for a model that the public layout cannot describe."""
    if model.conv is not None:
        raise UserError(
            "model.conv has no place in the public layout, which is of a transformer: not exported; "
            "`weights.safetensors` itself is what opens here"
        )
    if "bottleneck.weight" not in state:
        raise UserError("these weights hold no bottleneck: the public layout needs one; train with objectives.rec on")
    if model.latent != "deterministic":
        raise UserError(
            f"model.latent={model.latent} has no place in the public layout, which holds no variance; not exported. "
            f"{_ALTERNATIVES}, whose encode gives the mode"
        )
    rules: list[tuple[str, Any, Any, str]] = [
        ("model.clip_width", model.clip_width, model.text.width, "the text width serves for both"),
        ("model.registers", model.registers, 0, "there are no register tokens"),
        ("model.rope_base", model.rope_base, 100.0, "the base is fixed"),
        ("model.rope_dtype", model.rope_dtype, "bf16", "the official class computes RoPE in bf16 whatever is stored"),
        ("model.decoder.mlp_ratio", model.decoder.mlp_ratio, 4.0, "the ratio is fixed"),
    ]
    for key, vit in (("model.trunk", model.trunk), ("model.decoder", model.decoder)):
        scale = (str(vit.layer_scale), str(vit.layer_scale or None))
        rules.append((f"{key}.layer_scale", *scale, "the official class has none where the initial value is 0"))
        ours, theirs = swiglu_hidden(vit.width, vit.mlp_ratio), official_hidden_width(vit)
        rules.append(
            (f"{key}.mlp_ratio, hidden channels", ours, theirs, "the official class rounds the width down twice")
        )
    for key, found, rule, reason in rules:
        if found != rule:
            raise UserError(
                f"{key}={found} has no place in the public layout, only {rule}: {reason}; not exported. {_ALTERNATIVES}"
            )
    if model.latent_channels == model.trunk.width:
        raise UserError(
            f"model.latent_channels={model.latent_channels} is the trunk's width: the official class has no bottleneck "
            f"then, and would not load this one; not exported. {_ALTERNATIVES}"
        )


def _public_name(name: str) -> str:
    for ours, public in _PREFIXES:
        if name.startswith(ours):
            return public + name.removeprefix(ours)
    return name


def _public_parts(name: str, tensor: Tensor, is_scalar: bool = True) -> dict[str, Tensor]:
    """Map a tensor of ours to public names: itself, or the two halves of a fused one.

    `is_scalar`: the public logit_scale and logit_bias have the shape ().
    """
    if ".w12." in name:
        return dict(
            zip((_public_name(name.replace("w12", part)) for part in ("w1", "w2")), tensor.chunk(2), strict=True)
        )
    return {_public_name(name): _public_shape(name, tensor, is_scalar)}


def _public_shape(name: str, tensor: Tensor, is_scalar: bool) -> Tensor:
    if name in ("decoder.proj_in.weight", "decoder.proj_out.weight"):
        return tensor[:, :, None, None]  # a 1x1 convolution there
    return tensor.reshape(()) if is_scalar and name in ("clip.logit_scale", "clip.logit_bias") else tensor


def _pop_tensor(left: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    """Remove the public tensor `key` from `left` and return it."""
    tensor = left.pop(key, None)
    if tensor is None or tuple(tensor.shape) != shape:
        found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise UserError(
            f"{key}: found {found}, config.json asks for {shape}; the weights and the config do not belong together: "
            "get both from one source"
        )
    return tensor


def _check_periods(found: Tensor | None, ours: Tensor, part: str) -> None:
    if found is not None and not (found.shape == ours.shape and torch.equal(found.to(ours.dtype), ours)):
        raise UserError(
            f"{part}.rope_embed.periods are {found.tolist()} and config.json's number of heads gives {ours.tolist()}: "
            "another RoPE, which would change the latents of these weights. Correct the number of heads if it is "
            "wrong; export again, from the run, what an earlier vtp-engine exported with a head width that is no power "
            "of two"
        )


def read_public_tensors(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors by name, and the metadata. Raises UserError where a file is missing, damaged, or contradicts the
    index."""
    if (directory / PUBLIC_WEIGHTS).is_file() or not (directory / SHARD_INDEX).is_file():
        return _read_safetensors(directory / PUBLIC_WEIGHTS)
    where = read_shard_index(directory / SHARD_INDEX)
    files = {file: _read_safetensors(directory / file) for file in sorted(set(where.values()))}
    for name, file in where.items():
        if name not in files[file][0]:
            raise UserError(f"{directory / file} has no {name}, though {SHARD_INDEX} lists it there; fetch both again")
    metadata = {key: value for _, words in files.values() for key, value in words.items()}
    return {name: files[file][0][name] for name, file in where.items()}, metadata


def read_shard_index(path: Path) -> dict[str, str]:
    """Read tensor name -> file name. Raises UserError for a damaged index or a file outside its directory."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from None
    where = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(where, dict) or not where:
        raise UserError(f"{path} has no weight_map from names of tensors to files; fetch it again")
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{path} puts {name} into {file!r}: only *.safetensors beside it are read")
    return where


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: {LAYOUT_FILES}")
    try:
        with safe_open(path, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, stored.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is cut off or no safetensors file ({error}); fetch it again") from None
