"""DINOv2's files at a size for tests, as transformers and as timm write them: names and shapes, any numbers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, DEPTH, HEADS, PATCH, SIDE = 32, 2, 2, 4, 7


def shapes(registers: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape, as transformers has them."""
    of_block = {
        "norm1.weight": (WIDTH,), "norm1.bias": (WIDTH,),
        "attention.attention.query.weight": (WIDTH, WIDTH), "attention.attention.query.bias": (WIDTH,),
        "attention.attention.key.weight": (WIDTH, WIDTH), "attention.attention.key.bias": (WIDTH,),
        "attention.attention.value.weight": (WIDTH, WIDTH), "attention.attention.value.bias": (WIDTH,),
        "attention.output.dense.weight": (WIDTH, WIDTH), "attention.output.dense.bias": (WIDTH,),
        "layer_scale1.lambda1": (WIDTH,), "norm2.weight": (WIDTH,), "norm2.bias": (WIDTH,),
        "mlp.fc1.weight": (4 * WIDTH, WIDTH), "mlp.fc1.bias": (4 * WIDTH,),
        "mlp.fc2.weight": (WIDTH, 4 * WIDTH), "mlp.fc2.bias": (WIDTH,), "layer_scale2.lambda1": (WIDTH,),
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.mask_token": (1, WIDTH),
        "embeddings.position_embeddings": (1, 1 + SIDE**2, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    if registers:
        found["embeddings.register_tokens"] = (1, registers, WIDTH)
    return found | {f"encoder.layer.{n}.{name}": shape for n in range(DEPTH) for name, shape in of_block.items()}


def state(registers: int) -> dict[str, Tensor]:
    """Numbers that depend on a tensor's name alone."""
    drawn = {}
    for name, shape in shapes(registers).items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        drawn[name] = 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn


def write_transformers(path: Path, registers: int = 0) -> Path:
    """As transformers saves it."""
    save_file(state(registers), path, {"format": "pt"})
    return path


def write_timm(path: Path, registers: int = 0) -> Path:
    """As timm has it: queries, keys and values in one; with registers CLS has its position in it already."""
    theirs, ours = state(registers), {}
    for n in range(DEPTH):
        block = {name.split(f"layer.{n}.")[1]: x for name, x in theirs.items() if f"layer.{n}." in name}
        for kind in ("weight", "bias"):
            qkv = [block.pop(f"attention.attention.{part}.{kind}") for part in ("query", "key", "value")]
            ours[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat(qkv)
            ours[f"blocks.{n}.attn.proj.{kind}"] = block.pop(f"attention.output.dense.{kind}")
        for number in (1, 2):
            ours[f"blocks.{n}.ls{number}.gamma"] = block.pop(f"layer_scale{number}.lambda1")
        ours |= {f"blocks.{n}.{name}": x for name, x in block.items()}
    for kind in ("weight", "bias"):
        ours[f"patch_embed.proj.{kind}"] = theirs[f"embeddings.patch_embeddings.projection.{kind}"]
        ours[f"norm.{kind}"] = theirs[f"layernorm.{kind}"]
    ours["cls_token"], ours["pos_embed"] = theirs["embeddings.cls_token"], theirs["embeddings.position_embeddings"]
    if registers:
        ours["reg_token"] = theirs["embeddings.register_tokens"]
        ours["cls_token"] = ours["cls_token"] + ours["pos_embed"][:, :1]
        ours["pos_embed"] = ours["pos_embed"][:, 1:].contiguous()
    save_file(ours, path)
    return path


def images(height: int, width: int) -> Tensor:
    """(2, 3, height, width)."""
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height * 100 + width))
