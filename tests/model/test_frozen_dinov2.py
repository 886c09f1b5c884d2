"""DINOv2 as its public files have it: the features of the reference, and which files are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

from configs import Config, UserError
from configs.schema import AlignmentConfig
from model.frozen import Dinov2Shape, check_frozen_file, load_frozen, read_dinov2_shape
from tests.model.dinov2_files import DEPTH, HEADS, PATCH, SIDE, WIDTH, images, write_timm, write_transformers
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0
WRITERS = {"transformers": write_transformers, "timm": write_timm}
# What transformers 5.23 gives for the files of dinov2_files.py: (registers, height, width) -> four numbers of a patch
# of the second image, two of the first's last patch, and the mean square of all.
REFERENCE = {
    (0, 28, 28): ([0.0939, -0.00698, 0.65788, -0.22325], [-0.02825, -0.31226], 0.109836),
    (0, 16, 24): ([0.09981, -0.01053, 0.72789, 0.56886], [-0.03927, 0.09135], 0.105295),
    (4, 28, 28): ([0.09389, -0.007, 0.65743, -0.22335], [-0.02825, -0.31306], 0.109872),
    (4, 16, 24): ([0.10054, -0.00993, 0.73084, 0.56454], [-0.03965, 0.09625], 0.105508),
}


def align_of(path: Path, *overrides: str) -> AlignmentConfig:
    vit = f"{{width: {WIDTH}, depth: {DEPTH}, heads: {HEADS}}}"
    section = f"{{kind: dinov2, weights: {path}, encoder: {vit}, patch_size: {PATCH}}}"
    config: Config = tiny_config(f"objectives.rec.align={section}", *overrides)
    assert config.objectives.rec.align is not None
    return config.objectives.rec.align


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("library", WRITERS)
def test_features_are_the_references(library: str, registers: int, tmp_path: Path) -> None:
    path = WRITERS[library](tmp_path / "model.safetensors", registers)
    encoder = load_frozen(align_of(path, f"objectives.rec.align.registers={registers}"), "sdpa", torch.float32)
    for (count, height, width), (second, last, square) in REFERENCE.items():
        if count != registers:
            continue
        features = encoder(images(height, width), (height // PATCH, width // PATCH))
        assert features.shape == (2, height * width // PATCH**2, WIDTH)
        assert features[1, 3, :4].tolist() == pytest.approx(second, abs=1e-5)
        assert features[0, -1, -2:].tolist() == pytest.approx(last, abs=1e-5)
        assert features.square().mean().item() == pytest.approx(square, abs=2e-6)
        assert not features.requires_grad


def test_pictures_are_resized_so_that_a_patch_is_a_latent(tmp_path: Path) -> None:
    encoder = load_frozen(align_of(write_transformers(tmp_path / "model.safetensors")), "sdpa", torch.float32)
    coarse = images(5, 5)
    small, large = (F.interpolate(coarse, (side, side), mode="bicubic") for side in (28, 64))
    found, asked = encoder(large, (SIDE, SIDE)), encoder(small, (SIDE, SIDE))
    assert found.shape == (2, SIDE**2, WIDTH)
    assert F.cosine_similarity(found, asked, dim=2).min() > 0.995
    assert F.cosine_similarity(found.flip(1), asked, dim=2).mean() < 0.97, "other patches look otherwise"


def test_its_numbers_are_rounded_to_the_runs_precision(tmp_path: Path) -> None:
    path = write_transformers(tmp_path / "model.safetensors")
    whole, half = (load_frozen(align_of(path), "sdpa", dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    close, exact = (encoder(images(16, 24), (4, 6)) for encoder in (half, whole))
    assert close.dtype == torch.float32
    assert 0 < (close - exact).abs().mean() < 0.02


def test_a_block_is_one_graph_for_all_blocks(tmp_path: Path) -> None:
    encoder = load_frozen(align_of(write_transformers(tmp_path / "model.safetensors")), "sdpa", torch.float32)
    expected = encoder(images(16, 24), (4, 6))
    counter = CompileCounter()
    for block in encoder.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=counter)
    torch.testing.assert_close(encoder(images(16, 24), (4, 6)), expected)
    assert counter.frame_count == 1


def test_a_file_says_its_sizes(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        for registers in (0, 4):
            found = read_dinov2_shape(write(tmp_path / f"{name}{registers}.safetensors", registers))
            assert found == Dinov2Shape(WIDTH, DEPTH, PATCH, registers, SIDE**2)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("encoder.width=48", "has encoder.width 32, but objectives.rec.align.encoder.width is 48"),
        ("encoder.depth=3", "has encoder.depth 2, but objectives.rec.align.encoder.depth is 3"),
        ("patch_size=14", "has patch_size 4, but objectives.rec.align.patch_size is 14"),
        ("registers=4", "has registers 0, but objectives.rec.align.registers is 4"),
    ],
)
def test_another_encoder_than_described_is_one_clear_error(override: str, says: str, tmp_path: Path) -> None:
    align = align_of(write_transformers(tmp_path / "model.safetensors"), f"objectives.rec.align.{override}")
    with pytest.raises(UserError, match=says):
        check_frozen_file(align)


def _changed(path: Path, drop: str = "", **more: torch.Tensor) -> None:
    state = {name: tensor for name, tensor in load_file(path).items() if not drop or drop not in name}
    save_file(state | more, path)


BAD: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing": ("does not exist", lambda path: path.unlink()),
    "cut off": ("is cut off", lambda path: path.write_bytes(path.read_bytes()[:-10])),
    "something else": (r"is not a DINOv2 .*it has no cls_token", lambda path: _changed(path, "embeddings")),
    "without factors": (r"is not a DINOv2 .*it has no blocks.0.ls1", lambda path: _changed(path, "layer_scale")),
    "giant": (
        "giant, whose blocks have SwiGLU",
        lambda path: _changed(path, **{"encoder.layer.0.mlp.weights_in.weight": torch.zeros(1)}),
    ),
    "positions of no square": (
        "has 51 positions: those of patches are a square",
        lambda path: _changed(path, **{"embeddings.position_embeddings": torch.zeros(1, 51, WIDTH)}),
    ),
    "without a tensor": (r"Missing key.*blocks\.1\.norm2\.bias", lambda path: _changed(path, "layer.1.norm2.bias")),
    "without keys": (r"Missing key.*attn\.qkv", lambda path: _changed(path, "attention.key")),
    "with more": (r"Unexpected key.*head\.weight", lambda path: _changed(path, **{"head.weight": torch.zeros(1)})),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_no_such_encoder_is_one_clear_error(what: str, tmp_path: Path) -> None:
    message, spoil = BAD[what]
    path = write_transformers(tmp_path / "model.safetensors")
    spoil(path)
    with pytest.raises(UserError, match=f"^objectives.rec.align.weights: .*{message}"):
        load_frozen(align_of(path), "sdpa", torch.float32)


def test_more_said_of_its_blocks_than_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises((UserError, ValidationError), match="kind=dinov2 with more in encoder than width"):
        align_of(tmp_path, "objectives.rec.align.encoder.norm=layernorm")


def test_its_patches_need_not_divide_the_picture(tmp_path: Path) -> None:
    """32 pixels are no multiple of 14: they are resized. A trunk's would have to be."""
    assert align_of(tmp_path, "objectives.rec.align.patch_size=14").patch_size == 14
    with pytest.raises(UserError, match=r"is not a multiple of objectives\.rec\.align\.patch_size=14"):
        align_of(tmp_path, "objectives.rec.align.patch_size=14", "objectives.rec.align.kind=trunk")
