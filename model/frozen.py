"""Frozen encoders with which the latents are aligned (objectives.rec.align): a trunk of ours, or DINOv2.

    encoder = load_frozen(config.objectives.rec.align, attention="sdpa", dtype=torch.bfloat16)
    encoder(images, grid=(16, 16)).shape        # (R, 256, W) float32: its final-normed patch tokens

A trunk is read from any weights file of ours, a run's or an imported public one. The encoder is whole on every rank,
outside ZeRO, as the perceptual network is; nothing in it has a gradient, and no checkpoint holds it.

DINOv2 (arXiv 2304.07193), with which VA-VAE aligns its latents, is read from a public `model.safetensors`, with the
tensor names of Hugging Face's transformers or of timm:

    read_dinov2_shape(Path("dinov2-large/model.safetensors"))       # Dinov2Shape(width=1024, depth=24, ...)
    vit = Vit(width=1024, depth=24, heads=16)                       # the number of heads is not in the file
    load_dinov2(path, vit, patch_size=14, registers=0, attention="sdpa", dtype=torch.bfloat16)

Its blocks have LayerNorm, GELU, layer scale, and learned positions, added once and resized to the grid. Images are
resized so that one patch covers one latent: those of 256 pixels to 224, for latents of 16 x 16.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import UserError
from configs.model import Model, Vit
from configs.schema import AlignmentConfig
from kernels.attention import Segments
from model.block import Attention, LayerNorm, LayerScale
from model.trunk import PatchEmbed, Trunk
from model.weights import open_weights, read_model_section

ALIGN_KEY = "objectives.rec.align"
TRUNK_PREFIX = "trunk."
DINOV2_NUM_POSITIONS = 37 * 37  # learned positions of the published models, trained last at 518 pixels
DINOV2_MLP_RATIO = 4


class FrozenTrunk(nn.Module):
    """A frozen trunk of the shape that `model` describes. Build it outside DeepSpeed's `zero.Init`."""

    def __init__(self, model: Model, attention: str) -> None:
        super().__init__()
        self.trunk = Trunk(model, attention)
        self.requires_grad_(False)

    @classmethod
    def load(cls, align: AlignmentConfig, attention: str, dtype: torch.dtype) -> FrozenTrunk:
        """Load the trunk in `align.weights`, rounded to `dtype`.

        Raises UserError where the file is missing or damaged, or has no trunk or another one than `align` describes.
        """
        path = Path(align.weights)
        model = read_frozen_model(align)
        with open_weights(path) as stored:
            names = [name for name in stored.keys() if name.startswith(TRUNK_PREFIX)]  # noqa: SIM118 (not a mapping)
            state = {name: stored.get_tensor(name).to(dtype) for name in names}
        with torch.device("meta"):  # no initialisation: every value is loaded
            encoder = cls(model, attention)
        try:
            encoder.load_state_dict(state, assign=True)
        except RuntimeError as error:  # torch's list of names and shapes that do not fit
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{ALIGN_KEY}.weights={path}: its trunk does not have the shape in its description ({reason})"
            ) from None
        return encoder.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """(R, 3, H, W) ImageNet-normalised -> (R, P, W) float32 over `grid`, resized bilinearly from its own grid."""
        layout = self.trunk.layout({"clip": images})
        patch_RPW = layout.patches(self.trunk({"clip": images}, {}), "clip").float()
        own = layout.group("clip").grid
        if own == grid:
            return patch_RPW
        feature_RWhw = patch_RPW.transpose(1, 2).unflatten(2, own)
        resized = F.interpolate(feature_RWhw, grid, mode="bilinear", align_corners=False, antialias=True)
        return resized.flatten(2).transpose(1, 2)


class Dinov2(nn.Module):
    """DINOv2's ViT; `num_positions`, a square number, counts learned positions. Build it outside `zero.Init`."""

    def __init__(self, vit: Vit, patch_size: int, registers: int, num_positions: int, attention: str) -> None:
        super().__init__()
        self.patch_size, self.side = patch_size, math.isqrt(num_positions)
        self.patch_embed = PatchEmbed(vit.width, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, vit.width))
        self.register_tokens = nn.Parameter(torch.empty(1, registers, vit.width))
        self.pos_embed = nn.Parameter(
            torch.empty(1, 1 + num_positions, vit.width)
        )  # of CLS, then of patches row by row
        self.blocks = nn.ModuleList(Dinov2Block(vit, attention) for _ in range(vit.depth))
        self.norm = LayerNorm(vit.width)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """(R, 3, H, W) ImageNet-normalised -> (R, P, W) float32 over `grid`."""
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        [patches_RPD] = self.patch_embed(images)
        first_RKD = torch.cat((self.cls_token + self.pos_embed[:, :1], self.register_tokens), dim=1)
        x_RND = torch.cat((first_RKD.expand(len(images), -1, -1), patches_RPD + self._positions(grid)), dim=1)
        x_TD, segments = x_RND.flatten(0, 1), (x_RND.shape[:2],)
        for block in self.blocks:
            x_TD = block(x_TD, segments)
        return self.norm(x_TD).view(x_RND.shape)[:, first_RKD.shape[1] :].float()

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, P, D): the patches' positions, resized bicubically to `grid`; with registers antialiased [C]."""
        learned_1PD = self.pos_embed[:, 1:]
        if grid == (self.side, self.side):
            return learned_1PD
        learned_1Dhw = learned_1PD.float().transpose(1, 2).unflatten(2, (self.side, self.side))
        is_smooth = self.register_tokens.shape[1] > 0
        resized_1Dhw = F.interpolate(learned_1Dhw, grid, mode="bicubic", align_corners=False, antialias=is_smooth)
        return resized_1Dhw.flatten(2).transpose(1, 2).to(learned_1PD.dtype)


FrozenNetwork = FrozenTrunk | Dinov2


def load_frozen(align: AlignmentConfig, attention: str, dtype: torch.dtype) -> FrozenNetwork:
    """Load the frozen encoder that `align` describes, rounded to `dtype`.

    Raises UserError like `check_frozen_file`, and where tensors are missing.
    """
    if align.kind == "trunk":
        return FrozenTrunk.load(align, attention, dtype)
    check_frozen_file(align)
    try:
        return load_dinov2(Path(align.weights), align.encoder, align.patch_size, align.registers, attention, dtype)
    except UserError as error:
        raise UserError(f"{ALIGN_KEY}.weights: {error}") from None


def build_frozen_without_weights(align: AlignmentConfig, attention: str) -> FrozenNetwork:
    """Build the encoder from the config section alone, without weights: for counting and prediction."""
    if align.kind == "dinov2":
        return Dinov2(align.encoder, align.patch_size, align.registers, DINOV2_NUM_POSITIONS, attention)
    sizes = {"patch_size": align.patch_size, "registers": align.registers}
    return FrozenTrunk(Model(**sizes, trunk=align.encoder, decoder=align.encoder), attention)


def describe_alignment(align: AlignmentConfig | None) -> str:
    """Describe the alignment in one line, for the run's list of choices."""
    if align is None:
        return "off (objectives.rec.align is not set)"
    how = "gradients balanced" if align.adaptive else "fixed weight"
    return f"with the frozen {align.kind} of {align.weights}, weight {align.weight:g}, {how}"


def check_frozen_file(align: AlignmentConfig) -> None:
    """Raise UserError where the file is missing or damaged, or holds another encoder than `align` describes."""
    if align.kind == "trunk":
        read_frozen_model(align)
        return
    path = Path(align.weights)
    try:
        shape = read_dinov2_shape(path)
    except UserError as error:
        raise UserError(f"{ALIGN_KEY}.weights: {error}") from None
    _require_same({
        "encoder.width": (shape.width, align.encoder.width),
        "encoder.depth": (shape.depth, align.encoder.depth),
        "patch_size": (shape.patch_size, align.patch_size),
        "registers": (shape.registers, align.registers),
    }, path)  # fmt: skip


def read_frozen_model(align: AlignmentConfig) -> Model:
    """Read the model section of the file and check it against `align`. Raises UserError like FrozenTrunk.load."""
    path = Path(align.weights)
    try:
        with open_weights(path) as stored:
            has_trunk = any(name.startswith(TRUNK_PREFIX) for name in stored.keys())  # noqa: SIM118 (not a mapping)
            model = read_model_section(stored, path)
    except UserError as error:
        raise UserError(f"{ALIGN_KEY}.weights: {error}") from None
    if not has_trunk or model.conv is not None:
        raise UserError(
            f"{ALIGN_KEY}.weights={path} has no transformer trunk to align latents with; name a run's "
            "weights.safetensors, or what `python -m model.interchange import` wrote"
        )
    _require_same({
        "encoder": (_without_drop_path(model.trunk), _without_drop_path(align.encoder)),
        "patch_size": (model.patch_size, align.patch_size),
        "registers": (model.registers, align.registers),
    }, path)  # fmt: skip
    return model


def _require_same(pairs: dict[str, tuple[object, object]], path: Path) -> None:
    for key, (there, here) in pairs.items():
        if there != here:
            raise UserError(
                f"{ALIGN_KEY}.weights={path} has {key} {there}, but {ALIGN_KEY}.{key} is {here}: set it to the file's "
                "value"
            )


def _without_drop_path(vit: Vit) -> Vit:
    """Without stochastic depth, which a frozen trunk never applies, whatever it was trained with."""
    return vit.model_copy(update={"drop_path": 0.0})


class Dinov2Block(nn.Module):
    """DINOv2's block: x + ls1(attention(norm1(x))), then x + ls2(mlp(norm2(x))); one graph when compiled."""

    def __init__(self, vit: Vit, attention: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(vit.width), LayerNorm(vit.width)
        self.attn, self.mlp = Attention(vit, attention), Dinov2Mlp(vit.width)
        self.ls1, self.ls2 = LayerScale(vit.width, 1.0), LayerScale(vit.width, 1.0)

    def forward(self, x_TD: Tensor, segments: Segments) -> Tensor:
        """(T, D) -> (T, D)."""
        x_TD = x_TD + self.ls1(self.attn(self.norm1(x_TD), None, segments))
        return x_TD + self.ls2(self.mlp(self.norm2(x_TD)))


class Dinov2Mlp(nn.Module):
    """DINOv2's MLP: fc2(gelu(fc1 x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, DINOV2_MLP_RATIO * width)
        self.fc2 = nn.Linear(DINOV2_MLP_RATIO * width, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D), token by token."""
        return self.fc2(F.gelu(self.fc1(x_TD)))


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
_UNREAD = re.compile(r"mask_token$")  # used in its training only


class Dinov2Shape(NamedTuple):
    """Sizes of a DINOv2, as far as the shapes of its tensors show them."""

    width: int
    depth: int
    patch_size: int
    registers: int
    num_positions: int


def read_dinov2_shape(path: Path) -> Dinov2Shape:
    """Read the sizes of the DINOv2 at `path` from tensor shapes.

    Raises UserError where the file is missing, damaged or another model.
    """
    with open_weights(path) as stored:
        shapes = {_our_name(key): stored.get_slice(key).get_shape() for key in stored.keys()}  # noqa: SIM118
    if any(".mlp.weights_in." in name or ".mlp.w12." in name for name in shapes):
        raise UserError(f"{path} is DINOv2's giant, whose blocks have SwiGLU: name small, base or large")
    needed = ("cls_token", "pos_embed", "patch_embed.weight", "blocks.0.ls1.gamma")
    if missing := [name for name in needed if name not in shapes]:
        raise UserError(
            f"{path} is not a DINOv2 of transformers or timm (it has no {missing[0]}): name the "
            "model.safetensors of facebook/dinov2-large, say"
        )
    positions, registers = shapes["pos_embed"][1], shapes.get("register_tokens", [1, 0, 0])[1]
    has_cls = (
        math.isqrt(positions) ** 2 != positions
    )  # timm adds the position of CLS to CLS beforehand in models with registers
    num_positions = positions - has_cls
    if math.isqrt(num_positions) ** 2 != num_positions:
        raise UserError(f"{path} has {positions} positions: those of patches are a square, with one for CLS or without")
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    width, _, patch_size, _ = shapes["patch_embed.weight"]
    return Dinov2Shape(width, depth, patch_size, registers, num_positions)


def load_dinov2(path: Path, vit: Vit, patch_size: int, registers: int, attention: str, dtype: torch.dtype) -> Dinov2:
    """Load the DINOv2 at `path`, rounded to `dtype`.

    Raises UserError like `read_dinov2_shape`, and where tensors have other names or shapes.
    """
    num_positions = read_dinov2_shape(path).num_positions
    with open_weights(path) as stored:
        state = _with_joined_qkv({_our_name(key): stored.get_tensor(key) for key in stored.keys()})  # noqa: SIM118
    state.setdefault("register_tokens", torch.empty(1, 0, vit.width))
    if state["pos_embed"].shape[1] == num_positions:
        state["pos_embed"] = torch.cat((torch.zeros(1, 1, vit.width), state["pos_embed"]), dim=1)
    with torch.device("meta"):  # no initialisation: every value is loaded
        encoder = Dinov2(vit, patch_size, registers, num_positions, attention)
    kept = {name: tensor.to(dtype) for name, tensor in state.items() if not _UNREAD.search(name)}
    try:
        encoder.load_state_dict(kept, assign=True)
    except RuntimeError as error:  # torch's list of names and shapes that do not fit
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return encoder.requires_grad_(False).eval()


def _our_name(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _with_joined_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join queries, keys and values into one matrix, where the file has three."""
    joined = {name: tensor for name, tensor in state.items() if not re.search(r"\.attn\.(query|key|value)\.", name)}
    for name in [name for name in state if ".attn.query." in name]:
        parts = [state.get(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        if all(part is not None for part in parts):
            joined[name.replace(".query.", ".qkv.")] = torch.cat(parts)  # type: ignore[arg-type]
    return joined
