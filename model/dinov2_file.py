"""DINOv2 from a public file: `model.safetensors` as Hugging Face's transformers or timm have it.

    shape_of(Path("dinov2-large/model.safetensors"))        # Shape(width=1024, depth=24, patch_size=14, ...)
    load(path, Vit(width=1024, depth=24, heads=16), patch_size=14, registers=0, attention="sdpa", dtype=torch.bfloat16)

Names here are those of the published code, which timm keeps; transformers has others, and queries, keys and values
apart. How many heads there are no file says.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from configs import UserError
from configs.architecture import Vit
from model.dinov2 import Dinov2
from model.weights import opened

_RENAMED = (  # transformers' or timm's, as patterns -> ours
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^(embeddings\.register_tokens|reg_token)$", "register_tokens"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^(embeddings\.patch_embeddings\.projection|patch_embed\.proj)\.", "patch_embed."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
_UNREAD = re.compile(r"mask_token$")  # of its training alone


class Shape(NamedTuple):
    """What the tensors of a file say of their model."""

    width: int
    depth: int
    patch_size: int
    registers: int
    places: int


def shape_of(path: Path) -> Shape:
    """Of the file at `path`, from shapes alone. Raises UserError for one that is missing, damaged or no DINOv2."""
    with opened(path) as stored:
        shapes = {_ours(key): stored.get_slice(key).get_shape() for key in stored.keys()}  # noqa: SIM118
    if any(".mlp.weights_in." in name or ".mlp.w12." in name for name in shapes):
        raise UserError(f"{path} is DINOv2's giant, whose blocks have SwiGLU: name small, base or large")
    needed = ("cls_token", "pos_embed", "patch_embed.weight", "blocks.0.ls1.gamma")
    if lacking := [name for name in needed if name not in shapes]:
        raise UserError(
            f"{path} is no DINOv2 as transformers or timm have it (nothing in it is {lacking[0]}): name the "
            "model.safetensors of facebook/dinov2-large, say"
        )
    positions, registers = shapes["pos_embed"][1], shapes.get("register_tokens", [1, 0, 0])[1]
    has_cls = math.isqrt(positions) ** 2 != positions  # timm's with registers adds that of CLS to CLS beforehand
    places = positions - has_cls
    if math.isqrt(places) ** 2 != places:
        raise UserError(f"{path} has {positions} positions: those of patches are a square, with one for CLS or without")
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    width, _, patch_size, _ = shapes["patch_embed.weight"]
    return Shape(width, depth, patch_size, registers, places)


def load(path: Path, vit: Vit, patch_size: int, registers: int, attention: str, dtype: torch.dtype) -> Dinov2:
    """The encoder at `path`, its numbers rounded to `dtype`. Raises UserError like `shape_of`, and where the tensors
    are not those of such an encoder."""
    places = shape_of(path).places
    with opened(path) as stored:
        state = _joined({_ours(key): stored.get_tensor(key) for key in stored.keys()})  # noqa: SIM118
    state.setdefault("register_tokens", torch.empty(1, 0, vit.width))
    if state["pos_embed"].shape[1] == places:
        state["pos_embed"] = torch.cat((torch.zeros(1, 1, vit.width), state["pos_embed"]), dim=1)
    with torch.device("meta"):  # no initialisation: every number is given
        encoder = Dinov2(vit, patch_size, registers, places, attention)
    kept = {name: tensor.to(dtype) for name, tensor in state.items() if not _UNREAD.search(name)}
    try:
        encoder.load_state_dict(kept, assign=True)
    except RuntimeError as error:  # torch's list of names and shapes that do not fit
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return encoder.requires_grad_(False).eval()


def _ours(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With queries, keys and values in one product, where the file has them apart."""
    joined = {name: tensor for name, tensor in state.items() if not re.search(r"\.attn\.(query|key|value)\.", name)}
    for name in [name for name in state if ".attn.query." in name]:
        parts = [state.get(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        if all(part is not None for part in parts):
            joined[name.replace(".query.", ".qkv.")] = torch.cat(parts)  # type: ignore[arg-type]
    return joined
