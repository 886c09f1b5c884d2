"""The public layout's config.json <-> our model section.

    public_config(model, {"trunk", "bottleneck", "decoder"}, has_bias=False, image_size=256)     # a dictionary for JSON
    model_of(json.loads(text))                                                                   # back, or one error

The keys are the layout's; every one that it has must be there, and what our modules cannot be is refused.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Literal

from pydantic import ValidationError

from configs import UserError
from configs.architecture import Model, Text, Vit

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
# What Hugging Face's own writers add; none of it changes the model.
_BOOKKEEPING = frozenset(("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"))
_FEATURES: dict[Literal["cls", "patch_mean"], str] = {"cls": "cls", "patch_mean": "pooled"}


def public_config(model: Model, parts: Set[str], has_bias: bool, image_size: int) -> dict[str, Any]:
    """What config.json says of weights that hold `parts` (model.parts.PARTS); `image_size` in pixels."""
    vits = {"vision": model.trunk, "decoder": model.decoder}
    return {
        "model_type": "vtp",
        "image_size": image_size,
        "train_clip": "text" in parts,
        "train_reconstruction": "decoder" in parts,
        "vision_patch_size": model.patch_size,
        "vision_mlp_ratio": model.trunk.mlp_ratio,
        "vision_feature_bottleneck": model.latent_channels,
        "vision_bottleneck_ae_only": model.bottleneck_ae_only,
        "vision_clip_feat": _FEATURES[model.image_feature],
        **{f"{part}_{key}": getattr(vit, ours) for part, vit in vits.items() for key, ours in _VIT_KEYS.items()},
        **{f"text_{key}": getattr(model.text, ours) for key, ours in _TEXT_KEYS.items()},
        **_FIXED,
        "init_logit_bias": -10.0 if has_bias else None,
    }


def parts_of(described: dict[str, Any]) -> frozenset[str]:
    """Which of model.parts.PARTS the weights beside this config.json hold."""
    parts = {"trunk", "bottleneck"}
    parts |= {"text", "clip"} if read_key(described, "train_clip") else set()
    return frozenset(parts | ({"decoder"} if read_key(described, "train_reconstruction") else set()))


def model_of(described: dict[str, Any]) -> Model:
    """The model that a config.json describes.

    Raises UserError for another architecture, a key too few or too many, or a value we do not have.
    """
    _check_known(described)
    feature = read_key(described, "vision_clip_feat")
    if feature not in _FEATURES.values():
        raise UserError(
            f"config.json has vision_clip_feat={feature!r}: only {' or '.join(_FEATURES.values())} are known"
        )
    try:
        return _model(described, next(ours for ours, public in _FEATURES.items() if public == feature))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"config.json describes no model of ours: {place} {first['input']!r}: {first['msg']}") from None


def read_key(described: dict[str, Any], key: str) -> Any:
    """The value of `key`. Raises UserError where it is missing: the layout has no defaults."""
    if key not in described:
        raise UserError(f"config.json has no {key}: every key of the public layout must be there")
    return described[key]


def _check_known(described: dict[str, Any]) -> None:
    kind = described.get("model_type", "vtp")
    if kind != "vtp":
        raise UserError(f"config.json has model_type={kind!r}: it describes no VTP tokenizer; name a directory of one")
    unknown = sorted(described.keys() - _known_keys())
    if unknown:
        raise UserError(
            f"config.json has {unknown[0]}={described[unknown[0]]!r}, which the VTP layout does not know: it might "
            "change what the model computes; remove the key if it does not"
        )
    for key, rule in _FIXED.items():
        if described.get(key, rule) != rule and key != "init_logit_scale":  # an initial value: the weights are past it
            raise UserError(f"config.json has {key}={described[key]!r}: only {rule!r} can be imported")


def _known_keys() -> Set[str]:
    vit = Vit(width=4, depth=1, heads=1)  # any model: its keys are those of all
    return public_config(Model(trunk=vit, decoder=vit), set(), False, 0).keys() | _BOOKKEEPING


def _model(described: dict[str, Any], feature: Literal["cls", "patch_mean"]) -> Model:
    vits = {
        part: {ours: read_key(described, f"{part}_{key}") for key, ours in _VIT_KEYS.items()}
        for part in ("vision", "decoder")
    }
    text = Text(**{ours: read_key(described, f"text_{key}") for key, ours in _TEXT_KEYS.items()})
    return Model(
        patch_size=read_key(described, "vision_patch_size"),
        latent_channels=read_key(described, "vision_feature_bottleneck"),
        bottleneck_ae_only=read_key(described, "vision_bottleneck_ae_only"),
        image_feature=feature,
        clip_width=text.width,
        trunk=Vit(**vits["vision"], mlp_ratio=read_key(described, "vision_mlp_ratio")),
        decoder=Vit(**vits["decoder"]),
        text=text,
    )
