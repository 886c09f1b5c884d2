"""What the autoregressive transformers meet: tokens in their order, after copies of the class, at learnt places.

Tokens come arranged by the order in which they are drawn (model/generator/token_order.py), and the order says where in
the latent each one is. The copies of the class, MAR's buffer, come first: a class alone would be one token among
hundreds, and the first token drawn has nothing else to be drawn from.

    embed = TokenEmbedding(section, channels=16, tokens=256)
    x_BND = embed(known_BKC, order_BK, class_BD)        # (B, 64 + K, D)

Each part holds its own table of places, as MAR does [C]: ZeRO-3 has a parameter in the forward of its module only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.autoregressive import Autoregressive
from model.block import LayerNorm


class TokenEmbedding(nn.Module):
    """Linear over a token's numbers, the place of each, a norm; causal ones are told the next place, too."""

    def __init__(self, section: Autoregressive, channels: int, tokens: int) -> None:
        super().__init__()
        self.buffer, is_causal = section.buffer, section.order != "masked"
        self.linear = nn.Linear(channels, section.width)
        self.positions = nn.Parameter(torch.empty(section.buffer + tokens, section.width))
        self.next_positions = nn.Parameter(torch.empty(tokens, section.width)) if is_causal else None
        self.norm = LayerNorm(section.width)

    def forward(
        self, tokens_BKC: Tensor, order_BK: Tensor, class_BD: Tensor | None, next_BJ: Tensor | None = None
    ) -> Tensor:
        """(B, buffer + K, D), or without a class (B, K, D): K tokens at the places `order_BK`.

        `next_BJ` are the places of the tokens that the last J of the sequence are to predict.
        """
        x_BND = self.linear(tokens_BKC.to(self.linear.weight.dtype))
        x_BND = x_BND + F.embedding(order_BK + self.buffer, self.positions)
        if class_BD is not None:
            x_BND = torch.cat((class_BD.unsqueeze(1) + self.positions[: self.buffer], x_BND), dim=1)
        if next_BJ is not None and self.next_positions is not None:
            next_BJD = F.embedding(next_BJ, self.next_positions)
            x_BND = x_BND + F.pad(next_BJD, (0, 0, x_BND.shape[1] - next_BJ.shape[1], 0))
        return self.norm(x_BND)


class DecoderEmbedding(nn.Module):
    """What the encoder made of the known tokens, mask tokens for the others, the place of each."""

    def __init__(self, section: Autoregressive, tokens: int) -> None:
        super().__init__()
        self.buffer = section.buffer
        self.linear = nn.Linear(section.width, section.width)
        self.mask_token = nn.Parameter(torch.empty(section.width))
        self.positions = nn.Parameter(torch.empty(section.buffer + tokens, section.width))

    def forward(self, encoded_BKD: Tensor, order_BN: Tensor, visible_B: Tensor) -> Tensor:
        """(B, buffer + some, D), of which each sample's first buffer + visible are known -> (B, buffer + N, D)."""
        samples, held, length = *encoded_BKD.shape[:2], self.buffer + order_BN.shape[1]
        x_BND = F.pad(self.linear(encoded_BKD), (0, 0, 0, length - held))
        slot_N = torch.arange(length, device=order_BN.device)
        is_known_BN1 = (slot_N < self.buffer + visible_B.unsqueeze(1)).unsqueeze(-1)
        places_BN = torch.cat((slot_N[: self.buffer].expand(samples, -1), order_BN + self.buffer), dim=1)
        return torch.where(is_known_BN1, x_BND, self.mask_token) + F.embedding(places_BN, self.positions)


class Conditions(nn.Module):
    """Norm, then the place once more: what the head is given of a token."""

    def __init__(self, section: Autoregressive, tokens: int) -> None:
        super().__init__()
        self.norm = LayerNorm(section.width)
        self.positions = nn.Parameter(torch.empty(tokens, section.width))

    def forward(self, x_BND: Tensor, order_BN: Tensor) -> Tensor:
        """(B, N, D) for the tokens at the places `order_BN` -> the same shape."""
        return self.norm(x_BND) + F.embedding(order_BN, self.positions)
