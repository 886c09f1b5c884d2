"""Networks of the autoregressive generators: MAR's and the causal backbone, their embeddings, the diffusion head.

Tokens are permuted into the order in which they are drawn (model/generator/tokens.py); the order gives each one's
position in the latent. Copies of the class, MAR's buffer, come first: a single class token would be one among hundreds,
and the first token drawn has nothing else to depend on.

MaskedBackbone, MAR's (arXiv 2406.11838): an encoder of the known tokens, a decoder of all positions.

    backbone = MaskedBackbone(section, channels=16, tokens=256, num_classes=1000, backend="sdpa")
    z_BND = backbone(known_BKC, order_BN, visible_B, labels_B)      # (B, 256, 768), in the order of the tokens

Of K tokens a sample knows its first visible_B; the rest pads to a shape that is the same in every step, and no known
token sees the padding: in the encoder it is a span of its own, in the decoder mask tokens replace it. At ratios from
0.7 the encoder of MAR-B has 64 + 76 of 320 tokens. With each step's own number it would have 64 + 34 on average,
another shape every step, and 5 % fewer FLOPs in all; with a mask over all 320, 23 % more.

CausalBackbone, of RandomAR and RasterAR: every token from those before it, in any order.

    order of a sample     2 0 1
    input                 class ... class  token 2  token 0          the last token is only predicted
    next position                     2        0        1
    output                            z of 2   z of 0   z of 1       (B, 3, D)

In a random order a token does not determine which one follows, so an embedding of the next position is added to each
(as in RAR, arXiv 2411.00776). In raster order it is redundant, and is kept: the two differ in the order alone.

    z_BND = backbone(tokens_BMC, order_BN, labels_B)                # M = N - 1 tokens
    caches = backbone.caches(samples=B)
    z_B1D = backbone(tokens_BMC[:, :0], order_BN[:, :1], labels_B, caches)          # one token at a time: with the
    z_B1D = backbone(tokens_BMC[:, :1], order_BN[:, :2], None, caches)              # keys and values of those before

DiffusionHead: a residual MLP that denoises one token, given the backbone's vector z for its position. It is small and
runs once for every noise level of a token: on rows, not sequences. Time and condition, summed, modulate every block
(AdaLN) and gate its branch; gates start at 0.

    head = DiffusionHead(Head(width=1024, depth=6), channels=16, condition=768)
    head(noisy_RC, thousandths_R, z_ND, row_idx_R)      # (R, 16) float32; row r is denoised given z_ND[row_idx_R[r]]

The head is called once a step, however many levels a token has: a block is a leaf of ZeRO-3, and runs once. The
condition is projected before rows repeat it. The learned variance of MAR's code is left out: the paper's loss has none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.generator import Autoregressive, DiffusionHeadConfig
from kernels.attention import Spans
from model.block import LayerNorm
from model.generator.blocks import ClassEmbedding, KeyValueCache, PlainLayerNorm, TimeEmbedding, TokenBlock


class MaskedBackbone(nn.Module):
    """MAR's encoder-decoder: known tokens and the class -> the head's condition z of every token."""

    def __init__(self, section: Autoregressive, channels: int, tokens: int, num_classes: int, backend: str) -> None:
        super().__init__()
        half = section.depth // 2
        self.label = ClassEmbedding(num_classes, section.width)
        self.embed = TokenEmbedding(section, channels, tokens)
        self.encoder = nn.ModuleList(TokenBlock(section, False, backend) for _ in range(half))
        self.norm = LayerNorm(section.width)
        self.decoder_embed = DecoderEmbedding(section, tokens)
        self.decoder = nn.ModuleList(TokenBlock(section, False, backend) for _ in range(half))
        self.end = HeadConditions(section, tokens)

    def forward(self, known_BKC: Tensor, order_BN: Tensor, visible_B: Tensor, labels_B: Tensor) -> Tensor:
        """(B, K, C), (B, N), (B,) of 0 .. K, (B,) -> (B, N, D)."""
        buffer, most = self.embed.buffer, known_BKC.shape[1]
        x_BND = self.embed(known_BKC, order_BN[:, :most], self.label(labels_B))
        x_BND = self.norm(_run_blocks(self.encoder, x_BND, known_spans(buffer + visible_B, buffer + most)))
        x_BND = self.decoder_embed(x_BND, order_BN, visible_B)
        return self.end(_run_blocks(self.decoder, x_BND)[:, buffer:], order_BN)


def known_spans(known_B: Tensor, length: int) -> Spans:
    """Divide each row of `length` slots into two spans: its first `known_B` slots, and the rest.

    known_spans([2, 3], 3): ids [[0, 0, 1], [0, 0, 0]], offsets [0, 2, 3, 6, 6]: the second of row 1 is empty.
    """
    rows = known_B.shape[0]
    is_padding_RC = torch.arange(length, device=known_B.device) >= known_B.unsqueeze(1)
    starts_B = torch.arange(rows, device=known_B.device) * length
    begins = torch.stack((starts_B, starts_B + known_B), dim=1).flatten()
    return Spans(is_padding_RC.int(), torch.cat((begins, begins.new_full((1,), rows * length))).int())


def _run_blocks(blocks: nn.ModuleList, x_BND: Tensor, spans: Spans | None = None) -> Tensor:
    samples, length = x_BND.shape[:2]
    x_TD = x_BND.flatten(0, 1)
    for block in blocks:
        x_TD = block(x_TD, ((samples, length),), spans)
    return x_TD.unflatten(0, (samples, length))


class CausalBackbone(nn.Module):
    """Causal transformer: tokens and the class -> the head's condition z of each token, from those before it."""

    def __init__(self, section: Autoregressive, channels: int, tokens: int, num_classes: int, backend: str) -> None:
        super().__init__()
        self.tokens = tokens
        self.label = ClassEmbedding(num_classes, section.width)
        self.embed = TokenEmbedding(section, channels, tokens)
        self.blocks = nn.ModuleList(TokenBlock(section, True, backend) for _ in range(section.depth))
        self.end = HeadConditions(section, tokens)

    def forward(
        self, tokens_BKC: Tensor, order_BJ: Tensor, labels_B: Tensor | None, caches: list[KeyValueCache] | None = None
    ) -> Tensor:
        """(B, J, D) for the tokens at the last J positions of the order.

        With a class K = J - 1: the sequence from its beginning. Without, after `caches`, K = 1 token and the order
        (B, 2) of it and the one it predicts: (B, 1, D).
        """
        count = tokens_BKC.shape[1]
        class_BD = None if labels_B is None else self.label(labels_B)
        next_BJ = order_BJ if labels_B is not None else order_BJ[:, 1:]
        x_BND = self.embed(tokens_BKC, order_BJ[:, :count], class_BD, next_BJ)
        samples, length = x_BND.shape[:2]
        x_TD = x_BND.flatten(0, 1)
        for idx, block in enumerate(self.blocks):
            x_TD = block(x_TD, ((samples, length),), None, None if caches is None else caches[idx])
        return self.end(x_TD.unflatten(0, (samples, length))[:, -next_BJ.shape[1] :], next_BJ)

    def caches(self, samples: int) -> list[KeyValueCache]:
        """Empty key-value caches, one a block."""
        return [KeyValueCache(samples, self.embed.buffer + self.tokens) for _ in self.blocks]


class TokenEmbedding(nn.Module):
    """Linear over a token's numbers, plus its position, and in causal backbones the next position; then a norm.

    Each embedding has its own table of positions, as in MAR [C]: under ZeRO-3 a parameter exists in the forward of its
    module only.
    """

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
        """(B, buffer + K, D), or without a class (B, K, D): K tokens at the positions `order_BK`.

        `next_BJ` are the positions of the tokens that the last J of the sequence predict.
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
    """Input of MAR's decoder: encoded known tokens, mask tokens for the others, plus positions."""

    def __init__(self, section: Autoregressive, tokens: int) -> None:
        super().__init__()
        self.buffer = section.buffer
        self.linear = nn.Linear(section.width, section.width)
        self.mask_token = nn.Parameter(torch.empty(section.width))
        self.positions = nn.Parameter(torch.empty(section.buffer + tokens, section.width))

    def forward(self, encoded_BKD: Tensor, order_BN: Tensor, visible_B: Tensor) -> Tensor:
        """(B, buffer + K, D), of which each sample's first buffer + visible are known -> (B, buffer + N, D)."""
        samples, num_encoded, length = *encoded_BKD.shape[:2], self.buffer + order_BN.shape[1]
        x_BND = F.pad(self.linear(encoded_BKD), (0, 0, 0, length - num_encoded))
        slot_N = torch.arange(length, device=order_BN.device)
        is_known_BN1 = (slot_N < self.buffer + visible_B.unsqueeze(1)).unsqueeze(-1)
        position_BN = torch.cat((slot_N[: self.buffer].expand(samples, -1), order_BN + self.buffer), dim=1)
        return torch.where(is_known_BN1, x_BND, self.mask_token) + F.embedding(position_BN, self.positions)


class HeadConditions(nn.Module):
    """Output layer of a backbone: norm, plus the position once more; the head's condition z."""

    def __init__(self, section: Autoregressive, tokens: int) -> None:
        super().__init__()
        self.norm = LayerNorm(section.width)
        self.positions = nn.Parameter(torch.empty(tokens, section.width))

    def forward(self, x_BND: Tensor, order_BN: Tensor) -> Tensor:
        """(B, N, D) for the tokens at the positions `order_BN` -> the same shape."""
        return self.norm(x_BND) + F.embedding(order_BN, self.positions)


class DiffusionHead(nn.Module):
    """Denoising MLP: (noisy token, time, condition) -> the prediction of noise or velocity."""

    def __init__(self, head: DiffusionHeadConfig, channels: int, condition: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, head.width)
        self.time = TimeEmbedding(head.width)
        self.condition = nn.Linear(condition, head.width)
        self.blocks = nn.ModuleList(HeadBlock(head.width) for _ in range(head.depth))
        self.end = HeadFinalLayer(head.width, channels)

    def forward(self, noisy_RC: Tensor, thousandths_R: Tensor, z_ND: Tensor, row_idx_R: Tensor | None = None) -> Tensor:
        """(R, C) float32. `row_idx_R` is the index of each row's condition in z_ND; without it they are row by row."""
        condition_RW = self.condition(z_ND)
        if row_idx_R is not None:
            condition_RW = condition_RW.index_select(0, row_idx_R)
        condition_RW = F.silu(self.time(thousandths_R, z_ND.dtype) + condition_RW)
        x_RW = self.linear(noisy_RC.to(z_ND.dtype))
        for block in self.blocks:
            x_RW = block(x_RW, condition_RW)
        return self.end(x_RW, condition_RW).float()


class HeadBlock(nn.Module):
    """Modulated residual MLP block: x + gate * mlp(norm(x) * (1 + scale) + shift); one ZeRO-3 leaf, one graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.w1 = nn.Linear(width, width)
        self.w2 = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x_RW: Tensor, condition_RW: Tensor) -> Tensor:
        """(R, W) rows and their conditions, already through a SiLU -> (R, W)."""
        shift_RW, scale_RW, gate_RW = self.modulation(condition_RW).chunk(3, dim=1)
        inner_RW = self.norm(x_RW) * (1 + scale_RW) + shift_RW
        return x_RW + gate_RW * self.w2(F.silu(self.w1(inner_RW)))


class HeadFinalLayer(nn.Module):
    """Modulated norm, then a linear layer; its output is zero before the first step."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = PlainLayerNorm()
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, channels)

    def forward(self, x_RW: Tensor, condition_RW: Tensor) -> Tensor:
        """(R, W) -> (R, C)."""
        shift_RW, scale_RW = self.modulation(condition_RW).chunk(2, dim=1)
        return self.linear(self.norm(x_RW) * (1 + scale_RW) + shift_RW)
