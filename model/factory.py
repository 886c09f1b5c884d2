"""Build the modules that a config describes: encoder, decoder, and the set that a tokenizer keeps after training.

build_encoder(config.model, "sdpa")     # Trunk or ConvEncoder: layout(crops), forward(crops, masks) -> (T, D)
build_decoder(config.model, "sdpa")     # PixelDecoder or ConvDecoder: forward(latent_RPL, grid) -> (R, 3, H, W)
with torch.device("meta"):
    TokenizerModules(config.model, frozenset({"trunk", "bottleneck"})).state_dict()     # names and shapes of tensors
"""

from __future__ import annotations

from torch import nn

from configs.model import Model
from model.conv import ConvDecoder, ConvEncoder
from model.decoder import PixelDecoder
from model.heads import ClipHeads
from model.latent import build_bottleneck, head_width
from model.packing import ALIGN
from model.text import TextTower
from model.trunk import Trunk

Encoder = Trunk | ConvEncoder
Decoder = PixelDecoder | ConvDecoder
TOKENIZER_PARTS = ("trunk", "bottleneck", "decoder", "text", "clip")  # modules of a Pretrainer that a tokenizer keeps
TRAINING_ONLY = "decoder.mask_token"  # replaces patches that objectives.rec.mask hides


def build_encoder(model: Model, attention: str, align: int = ALIGN) -> Encoder:
    """Build the transformer trunk or, with `model.conv`, the convolutional encoder; `align` as of Trunk."""
    return Trunk(model, attention, align) if model.conv is None else ConvEncoder(model, attention)


def build_decoder(model: Model, attention: str, has_mask_token: bool = False) -> Decoder:
    """Build the transformer or convolutional decoder; `has_mask_token`: a learned token replaces hidden latents."""
    return PixelDecoder(model, attention, has_mask_token) if model.conv is None else ConvDecoder(model, attention)


class TokenizerModules(nn.Module):
    """The student's modules that `parts` lists, under the Pretrainer's names; the trunk is always there."""

    def __init__(self, model: Model, parts: frozenset[str], has_bias: bool = False, attention: str = "sdpa") -> None:
        super().__init__()
        self.model = model
        self.trunk = build_encoder(model, attention, align=1)  # no padding: one exported program for any batch
        self.bottleneck = build_bottleneck(model) if "bottleneck" in parts else None
        self.decoder = build_decoder(model, attention) if "decoder" in parts else None
        self.text = TextTower(model.text, model.clip_width, attention) if "text" in parts else None
        self.clip = ClipHeads(head_width(model), model.clip_width, has_bias) if "clip" in parts else None


def is_tokenizer_parameter(name: str) -> bool:
    """Whether the Pretrainer's tensor `name` belongs to a tokenizer: to one of TOKENIZER_PARTS."""
    return name.split(".")[0] in TOKENIZER_PARTS and name != TRAINING_ONLY
