"""The README.md of saved weights: what is known of them and nothing that was not recorded.

    print(card_text(config.model, Origin(image_size=256, name="vtp_b", steps=100_000), {"trunk", "bottleneck"}))

model/hub.py adds the metadata above the text, by which the hub sorts and filters.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from configs.architecture import Model
from model.origin import Origin
from model.public_config import official_class_note

_METHODS = {"decoder": "decode", "text": "embed_captions", "clip": "embed_images"}
_CARD = """# {title}

A visual tokenizer of the VTP architecture ([arXiv 2512.13687](https://arxiv.org/abs/2512.13687)): a ViT turns an
image into latents with {channels} channels at 1/{patch} of the resolution.

| | |
|---|---|
{rows}

`config.json` and `model.safetensors` are in the public VTP layout.{note} With vtp-engine:

    from model.tokenizer import VisualTokenizer
    tokenizer = VisualTokenizer.from_pretrained("PATH OR NAME")
    latent = tokenizer.encode(images)    # (B, 3, H, W), uint8 or [0, 1] -> (B, {channels}, H/{patch}, W/{patch})
{decode}
What these weights reconstruct, classify or generate has not been recorded here.
"""
_DECODE = "    pixels = tokenizer.decode(latent)    # (B, 3, H, W) in [0, 1]\n"


def card_text(
    model: Model,
    origin: Origin,
    parts: Set[str],
    licence: str = "unknown",
    has_vocabulary: bool = False,
    links: Mapping[str, str] | None = None,
) -> str:
    """Write the card as Markdown without front matter.

    `parts` are those of model.parts.PARTS that the weights hold; `has_vocabulary`: tokenizer.json is saved with them.
    """
    rows = {
        "configuration": origin.name or "unknown",
        "training steps": "unknown" if origin.steps is None else f"{origin.steps:,}",
        "fingerprint of the settings": origin.fingerprint or "unknown",
        "trained at": f"{origin.image_size} pixels",
        "encoder": _vit(model.trunk.width, model.trunk.depth, model.trunk.heads),
        "methods": ", ".join(["encode", *(_METHODS[part] for part in _METHODS if part in parts)]),
        "licence": licence,
    }
    if "decoder" in parts:
        rows["decoder"] = _vit(model.decoder.width, model.decoder.depth, model.decoder.heads)
    if "text" in parts:
        rows["captions' vocabulary"] = "`tokenizer.json`" if has_vocabulary else "not in this directory"
    rows |= {key.removesuffix("_url"): url for key, url in (links or {}).items()}
    note = official_class_note(model, parts)
    return _CARD.format(
        title=origin.name or "Visual tokenizer",
        channels=model.latent_channels,
        patch=model.patch_size,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        decode=_DECODE if "decoder" in parts else "",
        note=f" But {note}." if note else "",
    )


def _vit(width: int, depth: int, heads: int) -> str:
    return f"width {width}, depth {depth}, {heads} heads"
