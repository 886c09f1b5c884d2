"""MAR's transformer (arXiv 2406.11838): an encoder of the tokens that are known, a decoder of all places.

    backbone = MaskedBackbone(section, channels=16, tokens=256, num_classes=1000, backend="sdpa")
    z_BND = backbone(known_BKC, order_BN, visible_B, labels_B)      # (B, 256, 768), in the order of the tokens

Of K tokens a sample knows its first visible_B; the others fill up to a shape that does not change from step to step,
and nobody sees them: in the encoder they are a span of their own, in the decoder mask tokens take their place. At
ratios from 0.7 the encoder of MAR-B has 64 + 76 of 320 tokens. With each step's own number it would have 64 + 34 on
average, another shape every step, and 5 % fewer FLOPs in all; with a mask over all 320, 23 % more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from configs.autoregressive import Autoregressive
from kernels.dense_attention import Spans
from model.block import LayerNorm
from model.generator.conditioning import ClassEmbedding
from model.generator.token_block import TokenBlock
from model.generator.token_embedding import Conditions, DecoderEmbedding, TokenEmbedding


class MaskedBackbone(nn.Module):
    """Known tokens and the class -> what the head is given of every token."""

    def __init__(self, section: Autoregressive, channels: int, tokens: int, num_classes: int, backend: str) -> None:
        super().__init__()
        half = section.depth // 2
        self.label = ClassEmbedding(num_classes, section.width)
        self.embed = TokenEmbedding(section, channels, tokens)
        self.encoder = nn.ModuleList(TokenBlock(section, False, backend) for _ in range(half))
        self.norm = LayerNorm(section.width)
        self.decoder_embed = DecoderEmbedding(section, tokens)
        self.decoder = nn.ModuleList(TokenBlock(section, False, backend) for _ in range(half))
        self.end = Conditions(section, tokens)

    def forward(self, known_BKC: Tensor, order_BN: Tensor, visible_B: Tensor, labels_B: Tensor) -> Tensor:
        """(B, K, C), (B, N), (B,) of 0 .. K, (B,) -> (B, N, D)."""
        buffer, most = self.embed.buffer, known_BKC.shape[1]
        x_BND = self.embed(known_BKC, order_BN[:, :most], self.label(labels_B))
        x_BND = self.norm(_through(self.encoder, x_BND, known_spans(buffer + visible_B, buffer + most)))
        x_BND = self.decoder_embed(x_BND, order_BN, visible_B)
        return self.end(_through(self.decoder, x_BND)[:, buffer:], order_BN)


def known_spans(known_B: Tensor, length: int) -> Spans:
    """Two spans of each row of `length` slots: its first `known_B`, and those after them.

    known_spans([2, 3], 3): ids [[0, 0, 1], [0, 0, 0]], offsets [0, 2, 3, 6, 6]: the second of row 1 is empty.
    """
    rows = known_B.shape[0]
    is_filling_RC = torch.arange(length, device=known_B.device) >= known_B.unsqueeze(1)
    starts_B = torch.arange(rows, device=known_B.device) * length
    begins = torch.stack((starts_B, starts_B + known_B), dim=1).flatten()
    return Spans(is_filling_RC.int(), torch.cat((begins, begins.new_full((1,), rows * length))).int())


def _through(blocks: nn.ModuleList, x_BND: Tensor, spans: Spans | None = None) -> Tensor:
    samples, length = x_BND.shape[:2]
    x_TD = x_BND.flatten(0, 1)
    for block in blocks:
        x_TD = block(x_TD, ((samples, length),), spans)
    return x_TD.unflatten(0, (samples, length))
