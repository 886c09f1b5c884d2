"""Our weights <-> the public VTP Hugging Face layout: config.json and model.safetensors.

    python -m model.interchange export runs/demo --out DIR     # what the public inference code loads
    python -m model.interchange import DIR --out FILE          # VisualTokenizer.from_file(FILE) reads it

Both ways are exact: names and a few shapes change, numbers do not. The teacher and the prototypes stay
behind, the layout has no place for them. The periods of RoPE, which the layout stores and we compute, are
written and compared.

    ours                              public
    trunk.patch_embed.weight          trunk.patch_embed.proj.weight
    bottleneck.weight                 trunk.feature_bottleneck.weight
    decoder.proj_in.weight (D, L)     pixel_decoder.proj_in.weight (D, L, 1, 1)
    clip.logit_scale (1,)             logit_scale ()           both hold the logarithm
    trunk.blocks.0.mlp.w12 (2F, D)    trunk.blocks.0.mlp.w1 (F, D), .w2 (F, D)
    text.resblocks.0. ...             text_transformer.resblocks.0. ...
    text.ln_final.weight              ln_final.weight
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs import UserError, load_config
from configs.architecture import Model, Text, Vit
from model.rope import rope_of
from model.tokenizer import PARTS, VisualTokenizer
from model.weights import read_weights, write_weights

_PREFIXES = (
    ("trunk.patch_embed.", "trunk.patch_embed.proj."),
    ("bottleneck.", "trunk.feature_bottleneck."),
    ("decoder.", "pixel_decoder."),
    ("clip.", ""),
    ("text.resblocks.", "text_transformer.resblocks."),
    ("text.", ""),
)
_FIXED: dict[str, Any] = {  # what our modules are, in the layout's words
    "vision_ffn_layer": "swiglu",
    "text_ls_init_value": None,
    "text_embed_cls": False,
    "text_pad_id": 0,
    "text_no_causal_mask": False,
    "text_pool_type": "argmax",
    "text_proj_type": "linear",
    "text_proj_bias": False,
    "text_output_tokens": False,
    "text_quick_gelu": False,
    "decoder_ffn_layer": "swiglu",
    "init_logit_scale": None,
}
_VIT_KEYS = {
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "heads",
    "norm_layer": "norm",
    "init_values": "layer_scale",
    "use_qk_norm": "qk_norm",
}
_TEXT_KEYS = {
    "context_length": "context",
    "vocab_size": "vocab",
    "embed_dim": "width",
    "num_heads": "heads",
    "depth": "depth",
    "mlp_ratio": "mlp_ratio",
}
_FEATURES: dict[Literal["cls", "patch_mean"], str] = {"cls": "cls", "patch_mean": "pooled"}


def to_public(state: dict[str, Tensor], model: Model, image_size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under our names -> (tensors of model.safetensors, config.json).

    Raises UserError for a model the public layout cannot describe.
    """
    _check_exportable(state, model)
    kept = {name: tensor for name, tensor in state.items() if name.split(".")[0] in PARTS}
    public = {key: part for name, tensor in kept.items() for key, part in _public_parts(name, tensor).items()}
    public["trunk.rope_embed.periods"] = rope_of(model, model.trunk).periods()
    if "decoder.norm.weight" in kept:
        public["pixel_decoder.rope_embed.periods"] = rope_of(model, model.decoder).periods()
    return public, _public_config(kept, model, image_size)


def from_public(public: dict[str, Tensor], described: dict[str, Any]) -> tuple[dict[str, Tensor], Model]:
    """(tensors of model.safetensors, config.json) -> weights under our names and the model they fit.

    Raises UserError for a setting we do not have, a tensor too few or too many, or one of another shape.
    """
    model = _model(described)
    parts = {"trunk", "bottleneck"}
    parts |= {"text", "clip"} if _read(described, "train_clip") else set()
    parts |= {"decoder"} if _read(described, "train_reconstruction") else set()
    with torch.device("meta"):
        wanted = VisualTokenizer(model, frozenset(parts), has_bias="logit_bias" in public).state_dict()
    left = dict(public)
    for part, vit in (("trunk", model.trunk), ("pixel_decoder", model.decoder)):
        _check_periods(left.pop(f"{part}.rope_embed.periods", None), rope_of(model, vit).periods(), part)
    state = {}
    for name, like in wanted.items():
        pieces = [_take(left, key, tuple(part.shape)) for key, part in _public_parts(name, like).items()]
        state[name] = (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).reshape(like.shape)
    if left:
        raise UserError(
            f"{len(left)} tensors are not of the VTP layout, the first is {min(left)}; nothing was imported"
        )
    return state, model


def export_run(run: Path, out: Path) -> None:
    """RUN's weights -> DIR/model.safetensors and DIR/config.json."""
    config = load_config(run / "config.yaml")
    state, model = read_weights(run / "weights.safetensors")
    public, described = to_public(state, model, config.views.image_size)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in public.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def import_directory(directory: Path, out: Path) -> None:
    """DIR/model.safetensors and DIR/config.json -> FILE, a weights file of ours."""
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise UserError(
                f"{directory / name} does not exist: the public layout is config.json and model.safetensors"
            )
    described = json.loads((directory / "config.json").read_text())
    state, model = from_public(load_file(directory / "model.safetensors"), described)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_weights(out, state, model)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when done, 2 for a mistake the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m model.interchange", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export", help="a run directory -> the public layout")
    exporting.add_argument("run", type=Path, help="run directory with weights.safetensors and config.yaml")
    exporting.add_argument("--out", type=Path, required=True, metavar="DIR")
    importing = commands.add_parser("import", help="the public layout -> a weights file of ours")
    importing.add_argument("directory", type=Path, help="directory with config.json and model.safetensors")
    importing.add_argument("--out", type=Path, required=True, metavar="FILE")
    given = parser.parse_args(arguments)
    try:
        if given.command == "export":
            export_run(given.run, given.out)
        else:
            import_directory(given.directory, given.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.out)
    return 0


def _public_name(name: str) -> str:
    for ours, public in _PREFIXES:
        if name.startswith(ours):
            return public + name.removeprefix(ours)
    return name


def _public_parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What a tensor of ours is there: itself, or the two halves of a fused one."""
    if ".w12." in name:
        return dict(
            zip((_public_name(name.replace("w12", part)) for part in ("w1", "w2")), tensor.chunk(2), strict=True)
        )
    return {_public_name(name): _public_shape(name, tensor)}


def _take(left: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    """Takes the public tensor `key` out of `left`."""
    tensor = left.pop(key, None)
    if tensor is None or tuple(tensor.shape) != shape:
        found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise UserError(
            f"{key}: found {found}, config.json asks for {shape}; the weights and the config do not belong together"
        )
    return tensor


def _public_shape(name: str, tensor: Tensor) -> Tensor:
    if name in ("decoder.proj_in.weight", "decoder.proj_out.weight"):
        return tensor[:, :, None, None]  # a 1x1 convolution there
    return tensor.reshape(()) if name in ("clip.logit_scale", "clip.logit_bias") else tensor


def _check_exportable(state: dict[str, Tensor], model: Model) -> None:
    if "bottleneck.weight" not in state:
        raise UserError("these weights hold no bottleneck: the public layout needs one; train with objectives.rec on")
    rules = (
        ("model.clip_width", model.clip_width, model.text.width, "the text width serves for both"),
        ("model.registers", model.registers, 0, "there are no register tokens"),
        ("model.rope_base", model.rope_base, 100.0, "the base is fixed"),
        ("model.decoder.mlp_ratio", model.decoder.mlp_ratio, 4.0, "the ratio is fixed"),
    )
    for key, found, rule, reason in rules:
        if found != rule:
            raise UserError(f"{key}={found} has no place in the public layout, only {rule}: {reason}; not exported")


def _public_config(state: dict[str, Tensor], model: Model, image_size: int) -> dict[str, Any]:
    vits = {"vision": model.trunk, "decoder": model.decoder}
    return {
        "model_type": "vtp",
        "image_size": image_size,
        "train_clip": "text.text_projection" in state,
        "train_reconstruction": "decoder.proj_in.weight" in state,
        "vision_patch_size": model.patch_size,
        "vision_mlp_ratio": model.trunk.mlp_ratio,
        "vision_feature_bottleneck": model.latent_channels,
        "vision_bottleneck_ae_only": model.bottleneck_ae_only,
        "vision_clip_feat": _FEATURES[model.image_feature],
        **{f"{part}_{key}": getattr(vit, ours) for part, vit in vits.items() for key, ours in _VIT_KEYS.items()},
        **{f"text_{key}": getattr(model.text, ours) for key, ours in _TEXT_KEYS.items()},
        **_FIXED,
        "init_logit_bias": -10.0 if "clip.logit_bias" in state else None,
    }


def _model(described: dict[str, Any]) -> Model:
    for key, rule in _FIXED.items():
        if described.get(key, rule) != rule and key != "init_logit_scale":  # an initial value: the weights are past it
            raise UserError(f"config.json has {key}={described[key]!r}: only {rule!r} can be imported")
    feature = _read(described, "vision_clip_feat")
    if feature not in _FEATURES.values():
        raise UserError(
            f"config.json has vision_clip_feat={feature!r}: only {' or '.join(_FEATURES.values())} are known"
        )
    vits = {
        part: {ours: _read(described, f"{part}_{key}") for key, ours in _VIT_KEYS.items()}
        for part in ("vision", "decoder")
    }
    text = Text(**{ours: _read(described, f"text_{key}") for key, ours in _TEXT_KEYS.items()})
    return Model(
        patch_size=_read(described, "vision_patch_size"),
        latent_channels=_read(described, "vision_feature_bottleneck"),
        bottleneck_ae_only=_read(described, "vision_bottleneck_ae_only"),
        image_feature=next(ours for ours, public in _FEATURES.items() if public == feature),
        clip_width=text.width,
        trunk=Vit(**vits["vision"], mlp_ratio=_read(described, "vision_mlp_ratio")),
        decoder=Vit(**vits["decoder"]),
        text=text,
    )


def _read(described: dict[str, Any], key: str) -> Any:
    if key not in described:
        raise UserError(f"config.json has no {key}: every key of the public layout must be there")
    return described[key]


def _check_periods(found: Tensor | None, ours: Tensor, part: str) -> None:
    if found is not None and not torch.equal(found.to(ours.dtype), ours):
        raise UserError(f"{part}.rope_embed.periods are {found.tolist()}, ours {ours.tolist()}: another RoPE")


if __name__ == "__main__":
    sys.exit(main())
