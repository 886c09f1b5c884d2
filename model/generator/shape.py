"""The shape of one latent: LatentShape(channels=64, height=16, width=16) of a 256-pixel image at f16d64."""

from __future__ import annotations

from dataclasses import dataclass

from configs import UserError


@dataclass(frozen=True)
class LatentShape:
    """Channels, rows and columns of what a tokenizer makes of one image."""

    channels: int
    height: int
    width: int

    @property
    def numel(self) -> int:
        """Numbers in one latent."""
        return self.channels * self.height * self.width

    def grid(self, patch: int) -> tuple[int, int]:
        """(rows, columns) of tokens of `patch` x `patch` latents. Raises UserError where they do not fit."""
        if self.height % patch or self.width % patch:
            raise UserError(
                f"generator.patch={patch} does not divide latents of {self.height}x{self.width}: a token holds a whole "
                "square of them; change generator.patch"
            )
        return self.height // patch, self.width // patch
