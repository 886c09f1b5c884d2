"""The causal transformer of RandomAR and RasterAR: every token from those before it, in whatever order they come.

    order of a sample     2 0 1
    what goes in          class ... class  token 2  token 0          the last token is only predicted
    told the next place               2        0        1
    what comes out                    z of 2   z of 0   z of 1       (B, 3, D)

In a random order a token cannot know whom it precedes, so the embedding of the next place is added to each (as RAR
does, arXiv 2411.00776). In the raster order it says nothing new, and is kept: the two differ in the order alone.

    z_BND = backbone(tokens_BMC, order_BN, labels_B)                # M = N - 1 tokens
    pasts = backbone.pasts(samples=B)
    z_B1D = backbone(tokens_BMC[:, :0], order_BN[:, :1], labels_B, pasts)           # one token at a time: with the
    z_B1D = backbone(tokens_BMC[:, :1], order_BN[:, :2], None, pasts)               # keys and values of those before
"""

from __future__ import annotations

from torch import Tensor, nn

from configs.autoregressive import Autoregressive
from model.generator.conditioning import ClassEmbedding
from model.generator.token_block import Past, TokenBlock
from model.generator.token_embedding import Conditions, TokenEmbedding


class CausalBackbone(nn.Module):
    """Tokens and the class -> what the head is given of each token, from those before it."""

    def __init__(self, section: Autoregressive, channels: int, tokens: int, num_classes: int, backend: str) -> None:
        super().__init__()
        self.tokens = tokens
        self.label = ClassEmbedding(num_classes, section.width)
        self.embed = TokenEmbedding(section, channels, tokens)
        self.blocks = nn.ModuleList(TokenBlock(section, True, backend) for _ in range(section.depth))
        self.end = Conditions(section, tokens)

    def forward(
        self, tokens_BKC: Tensor, order_BJ: Tensor, labels_B: Tensor | None, pasts: list[Past] | None = None
    ) -> Tensor:
        """(B, J, D) for the tokens at the last J places of the order.

        With a class K = J - 1: the sequence from its beginning. Without, after `pasts`, K = 1 token and the order
        (B, 2) of it and the one it predicts: (B, 1, D).
        """
        count = tokens_BKC.shape[1]
        class_BD = None if labels_B is None else self.label(labels_B)
        next_BJ = order_BJ if labels_B is not None else order_BJ[:, 1:]
        x_BND = self.embed(tokens_BKC, order_BJ[:, :count], class_BD, next_BJ)
        samples, length = x_BND.shape[:2]
        x_TD = x_BND.flatten(0, 1)
        for idx, block in enumerate(self.blocks):
            x_TD = block(x_TD, ((samples, length),), None, None if pasts is None else pasts[idx])
        return self.end(x_TD.unflatten(0, (samples, length))[:, -next_BJ.shape[1] :], next_BJ)

    def pasts(self, samples: int) -> list[Past]:
        """Room for the keys and values of each block."""
        return [Past(samples, self.embed.buffer + self.tokens) for _ in self.blocks]
