"""The public layout's config.json <-> our model section.

    public_config(model, {"trunk", "bottleneck", "decoder"}, has_bias=False, image_size=256)     # a dictionary for JSON
    model_of(json.loads(text))                                                                   # back, or one error

The keys are those of the official class's VTPConfig, which writes all of them. Each is understood, or refused with the
way out; so are those of transformers' own base class, none of which changes what the model computes.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Literal

from pydantic import ValidationError

from configs import UserError
from configs.architecture import Model, Text, Vit
from model.block import swiglu_hidden

OFFICIAL_PATCH = 16  # pixels a side: the official class builds its decoder for these, whatever vision_patch_size says
_FIXED: dict[str, Any] = {  # what our modules are, in the layout's words
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
# Written as the official class writes them, any value is read: the weights are past an initial value, and the official
# model uses neither the text tower's padding id nor its own forward.
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
# What transformers' PretrainedConfig and its writers add.
_BOOKKEEPING = frozenset(
    (
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
        "attn_implementation", "auto_map", "dtype", "gradient_checkpointing", "id2label", "is_decoder",
        "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
        "tie_word_embeddings", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16", "use_cache",
    )
)  # fmt: skip
_FEATURES: dict[Literal["cls", "patch_mean"], str] = {"cls": "cls", "patch_mean": "pooled"}
_ELSEWHERE = "weights of such a model run in the public VTP code, not here"


def public_config(model: Model, parts: Set[str], has_bias: bool, image_size: int) -> dict[str, Any]:
    """What config.json says of weights that hold `parts` (model.parts.PARTS); `image_size` in pixels.

    A decoder that the official class cannot build is not announced: see `unread_by_official`.
    """
    vits = {"vision": model.trunk, "decoder": model.decoder}
    return {
        "model_type": "vtp",
        "image_size": image_size,
        "train_clip": "text" in parts,
        "train_reconstruction": "decoder" in parts and model.patch_size == OFFICIAL_PATCH,
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


def unread_by_official(model: Model, parts: Set[str]) -> str | None:
    """What the official class leaves unread of weights that hold `parts`, and why; None where it reads all."""
    if "decoder" not in parts or model.patch_size == OFFICIAL_PATCH:
        return None
    return (
        f"the official VTP class builds decoders for patches of {OFFICIAL_PATCH} pixels alone, this one is for "
        f"{model.patch_size}: config.json says train_reconstruction=false, the class reads the rest and warns of "
        "unused pixel_decoder.* tensors; vtp-engine reads all"
    )


def parts_of(described: dict[str, Any], names: Set[str]) -> frozenset[str]:
    """Which of model.parts.PARTS the weights beside this config.json hold, whose tensors have these public names."""
    parts = {"trunk", "bottleneck"}
    parts |= {"text", "clip"} if read_key(described, "train_clip") else set()
    has_decoder = read_key(described, "train_reconstruction") or any(
        name.startswith("pixel_decoder.") for name in names
    )
    return frozenset(parts | ({"decoder"} if has_decoder else set()))


def has_bias(described: dict[str, Any]) -> bool:
    """Whether the logits of clip have a bias."""
    return read_key(described, "init_logit_bias") is not None


def is_scale_scalar(described: dict[str, Any]) -> bool:
    """Whether logit_scale and logit_bias have the shape (), not (1,). Raises UserError for neither true nor false."""
    nonscalar = described.get("nonscalar_logit_scale", False)  # the official class's default, as of all its keys
    if not isinstance(nonscalar, bool):
        raise UserError(
            f"config.json has nonscalar_logit_scale={nonscalar!r}: it is true where logit_scale has the shape (1,), "
            "false where it has none; correct it"
        )
    return not nonscalar


def image_size_of(described: dict[str, Any]) -> int:
    """Pixels a side that the weights were trained at. Raises UserError for what is no such number."""
    size = read_key(described, "image_size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(f"config.json has image_size={size!r}: it is the side of the training pictures in pixels, 256")
    return size


def model_of(described: dict[str, Any]) -> Model:
    """The model that a config.json describes.

    Raises UserError for another architecture, a key too few or too many, or a value we do not have.
    """
    _check_known(described)
    feature = read_key(described, "vision_clip_feat")
    if feature not in _FEATURES.values():
        raise UserError(
            f"config.json has vision_clip_feat={feature!r}: only {' or '.join(_FEATURES.values())} are known; "
            f"{_ELSEWHERE}"
        )
    try:
        model = _model(described, next(ours for ours, public in _FEATURES.items() if public == feature))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"config.json describes no model of ours: {place} {first['input']!r}: {first['msg']}; {_ELSEWHERE}"
        ) from None
    _check_hidden(described, model)
    return model


def read_key(described: dict[str, Any], key: str) -> Any:
    """The value of `key`. Raises UserError where it is missing: its default may not be what the weights are."""
    if key not in described:
        raise UserError(
            f"config.json has no {key}: every key of the public layout must be there, as the official class writes "
            "them; add it with the value that the weights have"
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
            raise UserError(f"config.json has {key}={described[key]!r}: only {rule!r} can be imported; {_ELSEWHERE}")


def _check_hidden(described: dict[str, Any], model: Model) -> None:
    """Raises UserError for another MLP than SwiGLU, or one whose hidden width is aligned to another number.

    The layout knows swiglu32, swiglu64 and swiglu128 beside swiglu, which mostly are the same widths.
    """
    for part, vit in (("vision", model.trunk), ("decoder", model.decoder)):
        key = f"{part}_ffn_layer"
        found = described.get(key, _FIXED[key])
        align = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}.get(found)
        ours = swiglu_hidden(vit.width, vit.mlp_ratio)
        theirs = None if align is None else official_hidden(vit, align)
        if theirs != ours:
            width = "" if theirs is None else f" of {theirs} channels, of which ours has {ours}"
            raise UserError(f"config.json has {key}={found!r}{width}: only 'swiglu' can be imported; {_ELSEWHERE}")


def official_hidden(vit: Vit, align: int = 8) -> int:
    """The hidden width of the official SwiGLU: rounded down twice, then up to a multiple of `align`."""
    return -(-int(int(vit.width * vit.mlp_ratio) * 2 / 3) // align) * align


def _known_keys() -> Set[str]:
    vit = Vit(width=4, depth=1, heads=1)  # any model: its keys are those of all
    return public_config(Model(trunk=vit, decoder=vit), set(), False, 0).keys() | _BOOKKEEPING


def _model(described: dict[str, Any], feature: Literal["cls", "patch_mean"]) -> Model:
    vits = {
        part: {ours: read_key(described, f"{part}_{key}") for key, ours in _VIT_KEYS.items()}
        for part in ("vision", "decoder")
    }
    for vit in vits.values():
        vit["layer_scale"] = vit["layer_scale"] or None  # an initial 0 is no layer scale there
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
