"""What turns pixels into features and latents into pixels: transformers, or with `model.conv` convolutions.

encoder_of(config.model, "sdpa")        # Trunk or ConvEncoder: layout(crops), forward(crops, masks) -> (T, D)
decoder_of(config.model, "sdpa")        # PixelDecoder or ConvDecoder: forward(latent_RPL, grid) -> (R, 3, H, W)
"""

from __future__ import annotations

from configs.architecture import Model
from model.conv import ConvDecoder, ConvEncoder
from model.decoder import PixelDecoder
from model.pack import ALIGN
from model.trunk import Trunk

Encoder = Trunk | ConvEncoder
Decoder = PixelDecoder | ConvDecoder


def encoder_of(model: Model, attention: str, align: int = ALIGN) -> Encoder:
    """`align` is Trunk's: tokens of which the sequence is a multiple."""
    return Trunk(model, attention, align) if model.conv is None else ConvEncoder(model, attention)


def decoder_of(model: Model, attention: str, fills_in: bool = False) -> Decoder:
    """`fills_in` is PixelDecoder's: whether it stands in for latents that are not there."""
    return PixelDecoder(model, attention, fills_in) if model.conv is None else ConvDecoder(model, attention)
