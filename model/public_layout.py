"""Our weights <-> the tensors of the public VTP Hugging Face layout.

    public, described = to_public(state, config.model, image_size=256)      # model.safetensors, config.json
    state, model = from_public(public, described)                           # the same tensors again

Both ways are exact: names and a few shapes change, numbers do not. The teacher and the prototypes stay
behind, the layout has no place for them. The periods of RoPE, which the layout stores and we compute, are
written and compared. A model that the official class would refuse, or compute otherwise, is not exported; a decoder
that it cannot build is, with train_reconstruction=false in config.json (public_config.official_class_note).

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

from typing import Any

import torch
from torch import Tensor

from configs import UserError
from configs.architecture import Model
from model.block import swiglu_hidden
from model.parts import Parts, outlives_training
from model.public_config import (
    has_logit_bias,
    has_scalar_logit_scale,
    model_of,
    official_hidden_width,
    parts_of,
    public_config,
)
from model.rope import rope_of

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


def to_public(state: dict[str, Tensor], model: Model, image_size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under our names -> (tensors of model.safetensors, config.json).

    Raises UserError for a model the public layout cannot describe.
    """
    check_exportable(state, model)
    kept = {name: tensor for name, tensor in state.items() if outlives_training(name)}
    public = {key: part for name, tensor in kept.items() for key, part in _public_parts(name, tensor).items()}
    public["trunk.rope_embed.periods"] = rope_of(model, model.trunk).periods()
    if "decoder.norm.weight" in kept:
        public["pixel_decoder.rope_embed.periods"] = rope_of(model, model.decoder).periods()
    parts = {name.split(".")[0] for name in kept}
    return public, public_config(model, parts, "clip.logit_bias" in kept, image_size)


def from_public(public: dict[str, Tensor], described: dict[str, Any]) -> tuple[dict[str, Tensor], Model]:
    """(tensors of model.safetensors, config.json) -> weights under our names and the model they fit.

    Raises UserError for a setting we do not have, a tensor too few or too many, or one of another shape.
    """
    model = model_of(described)
    with torch.device("meta"):
        wanted = Parts(model, parts_of(described, public.keys()), has_logit_bias(described)).state_dict()
    is_scalar = has_scalar_logit_scale(described)
    left = dict(public)
    for part, vit in (("trunk", model.trunk), ("pixel_decoder", model.decoder)):
        _check_periods(left.pop(f"{part}.rope_embed.periods", None), rope_of(model, vit).periods(), part)
    state = {}
    for name, like in wanted.items():
        pieces = [_take(left, key, tuple(part.shape)) for key, part in _public_parts(name, like, is_scalar).items()]
        state[name] = (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).reshape(like.shape)
    if left:
        raise UserError(
            f"{len(left)} tensors are not of the VTP layout as config.json describes it, the first is {min(left)}; "
            "nothing was imported: get both files from one source"
        )
    return state, model


def check_exportable(state: dict[str, Tensor], model: Model) -> None:
    """Raises UserError for what the public layout cannot describe."""
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


def _take(left: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    """Takes the public tensor `key` out of `left`."""
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
