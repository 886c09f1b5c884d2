"""Conversion between the public layout's config.json and the model section of our configs.

    public_config(model, {"trunk", "bottleneck", "decoder"}, has_bias=False, image_size=256)     # a dictionary for JSON
    model_from_config(json.loads(text))                          # back, or a UserError

The keys are those of the official class's VTPConfig, which writes all of them. Each is read, or rejected with a remedy.
Keys of transformers' PretrainedConfig are ignored: none of them changes what the model computes.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Literal

from pydantic import ValidationError

from configs import UserError
from configs.model import Model, Text, Vit
from model.block import swiglu_hidden

OFFICIAL_DECODER_PATCH = 16  # pixels a side; the official class builds its decoder for it, ignoring vision_patch_size
_FIXED: dict[str, Any] = {  # keys of which our modules implement one value only
    "vision_ffn_layer": "swiglu",
    "text_ls_init_value": None,
    "text_embed_cls": False,
    "text_no_causal_mask": False,
    "text_pool_type": "argmax",
    "text_proj_type": "linear",
    "text_proj_bias": False,
    "text_quick_gelu": False,
    "decoder_ffn_layer": "swiglu",
}
# Written as the official class writes them; any value is accepted. An initial value does not matter to trained weights,
# and the official model uses neither the text tower's padding id nor its own forward.
_WITHOUT_EFFECT: dict[str, Any] = {"text_pad_id": 0, "text_output_tokens": False, "init_logit_scale": None}
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
# Keys that transformers' PretrainedConfig and its writers add.
_TRANSFORMERS_KEYS = frozenset(
    (
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
        "attn_implementation", "auto_map", "dtype", "gradient_checkpointing", "id2label", "is_decoder",
        "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
        "tie_word_embeddings", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16", "use_cache",
    )
)  # fmt: skip
_FEATURES: dict[Literal["cls", "patch_mean"], str] = {"cls": "cls", "patch_mean": "pooled"}
_USE_PUBLIC_CODE = "weights of such a model run in the public VTP code, not here"


def public_config(model: Model, parts: Set[str], has_bias: bool, image_size: int) -> dict[str, Any]:
    """Return the config.json of weights that hold `parts` (model.factory.TOKENIZER_PARTS); `image_size` in pixels.

    train_reconstruction is false for a decoder that the official class cannot build: see `official_class_note`.
    """
    vits = {"vision": model.trunk, "decoder": model.decoder}
    return {
        "model_type": "vtp",
        "image_size": image_size,
        "train_clip": "text" in parts,
        "train_reconstruction": "decoder" in parts and model.patch_size == OFFICIAL_DECODER_PATCH,
        "vision_patch_size": model.patch_size,
        "vision_mlp_ratio": model.trunk.mlp_ratio,
        "vision_feature_bottleneck": model.latent_channels,
        "vision_bottleneck_ae_only": model.bottleneck_ae_only,
        "vision_clip_feat": _FEATURES[model.image_feature],
        **{f"{part}_{key}": getattr(vit, ours) for part, vit in vits.items() for key, ours in _VIT_KEYS.items()},
        **{f"text_{key}": getattr(model.text, ours) for key, ours in _TEXT_KEYS.items()},
        **_FIXED,
        **_WITHOUT_EFFECT,
        "init_logit_bias": -10.0 if has_bias else None,
        "nonscalar_logit_scale": False,
    }


def official_class_note(model: Model, parts: Set[str]) -> str | None:
    """Describe what the official class cannot read of weights that hold `parts`, and why; None where it reads all."""
    if "decoder" not in parts or model.patch_size == OFFICIAL_DECODER_PATCH:
        return None
    return (
        f"the official VTP class builds decoders only for patches of {OFFICIAL_DECODER_PATCH} pixels, this one is for "
        f"{model.patch_size}: config.json has train_reconstruction=false, the class reads the rest and warns of "
        "unused pixel_decoder.* tensors; vtp-engine reads all"
    )


def tokenizer_parts(described: dict[str, Any], names: Set[str]) -> frozenset[str]:
    """Return the model.factory.TOKENIZER_PARTS in weights with this config.json and these public tensor names."""
    parts = {"trunk", "bottleneck"}
    parts |= {"text", "clip"} if read_key(described, "train_clip") else set()
    has_decoder = read_key(described, "train_reconstruction") or any(
        name.startswith("pixel_decoder.") for name in names
    )
    return frozenset(parts | ({"decoder"} if has_decoder else set()))


def has_logit_bias(described: dict[str, Any]) -> bool:
    """Whether the contrastive logits have a bias."""
    return read_key(described, "init_logit_bias") is not None


def has_scalar_logit_scale(described: dict[str, Any]) -> bool:
    """Whether logit_scale and logit_bias have the shape (), not (1,). Raises UserError unless the key is a boolean."""
    nonscalar = described.get("nonscalar_logit_scale", False)  # the official class's default
    if not isinstance(nonscalar, bool):
        raise UserError(
            f"config.json has nonscalar_logit_scale={nonscalar!r}: it must be true where logit_scale has the shape "
            "(1,), false where it has the shape (); correct it"
        )
    return not nonscalar


def read_image_size(described: dict[str, Any]) -> int:
    """Return the side in pixels of the training images. Raises UserError unless it is a positive integer."""
    size = read_key(described, "image_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(
            f"config.json has image_size={size!r}: it must be the side of the training images in pixels, such as "
            "256; correct it"
        )
    return size


def model_from_config(described: dict[str, Any]) -> Model:
    """Return the model section that a config.json describes.

    Raises UserError for another architecture, a missing or unknown key, or a value that we do not implement.
    """
    _check_known(described)
    feature = read_key(described, "vision_clip_feat")
    if feature not in _FEATURES.values():
        raise UserError(
            f"config.json has vision_clip_feat={feature!r}: only {' or '.join(_FEATURES.values())} are known; "
            f"{_USE_PUBLIC_CODE}"
        )
    try:
        model = _model(described, next(ours for ours, public in _FEATURES.items() if public == feature))
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"]))
        raise UserError(
            f"config.json describes no model of ours: {location} {first['input']!r}: {first['msg']}; {_USE_PUBLIC_CODE}"
        ) from None
    _check_hidden_width(described, model)
    return model


def read_key(described: dict[str, Any], key: str) -> Any:
    """Return the value of `key`. Raises UserError where it is missing: a default may not fit the weights."""
    if key not in described:
        raise UserError(
            f"config.json has no {key}: every key of the public layout must be there, as the official class writes "
            "them; add it with the value that fits the weights"
        )
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
        if not key.endswith("_ffn_layer") and described.get(key, rule) != rule:
            raise UserError(
                f"config.json has {key}={described[key]!r}: only {rule!r} can be imported; {_USE_PUBLIC_CODE}"
            )


def _check_hidden_width(described: dict[str, Any], model: Model) -> None:
    """Raise UserError for an MLP other than SwiGLU, or whose hidden width is not the one of ours.

    The layout also has swiglu32, swiglu64 and swiglu128: most often their hidden width is that of swiglu.
    """
    for part, vit in (("vision", model.trunk), ("decoder", model.decoder)):
        key = f"{part}_ffn_layer"
        found = described.get(key, _FIXED[key])
        align = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}.get(found)
        ours = swiglu_hidden(vit.width, vit.mlp_ratio)
        theirs = None if align is None else official_hidden_width(vit, align)
        if theirs != ours:
            width = "" if theirs is None else f" with {theirs} hidden channels, ours has {ours}"
            raise UserError(
                f"config.json has {key}={found!r}{width}: only 'swiglu' can be imported; {_USE_PUBLIC_CODE}"
            )


def official_hidden_width(vit: Vit, align: int = 8) -> int:
    """Return the hidden width of the official SwiGLU: rounded down twice, then up to a multiple of `align`."""
    return -(-int(int(vit.width * vit.mlp_ratio) * 2 / 3) // align) * align


def _known_keys() -> Set[str]:
    vit = Vit(width=4, depth=1, heads=1)  # any model: all have the same keys
    return public_config(Model(trunk=vit, decoder=vit), set(), False, 0).keys() | _TRANSFORMERS_KEYS


def _model(described: dict[str, Any], feature: Literal["cls", "patch_mean"]) -> Model:
    vits = {
        part: {ours: read_key(described, f"{part}_{key}") for key, ours in _VIT_KEYS.items()}
        for part in ("vision", "decoder")
    }
    for vit in vits.values():
        # the official class has no layer scale where the initial value is 0
        vit["layer_scale"] = vit["layer_scale"] or None
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
