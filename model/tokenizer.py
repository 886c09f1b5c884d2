"""VisualTokenizer: images to latents and back with trained weights; the class that users import.

    tokenizer = VisualTokenizer.from_run("runs/demo")       # or .from_pretrained(a directory or a hub name)
    latent = tokenizer.encode(images)       # (B, 3, 256, 256), uint8 or float in [0, 1] -> (B, 64, 16, 16)
    pixels = tokenizer.decode(latent)       # (B, 3, 256, 256) float32 in [0, 1]
    scores = tokenizer.embed_images(images) @ tokenizer.embed_captions(captions).T

Any height and width that are multiples of the patch size work. The latent is deterministic: no sampling, no
noise [P]. With model.latent=gaussian `encode` returns the mode, `moments` the distribution.

Returned tensors are contiguous, as safetensors, `.view` and compiled programs need them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import Config, UserError, load_run
from configs.model import Model
from model.factory import Decoder, TokenizerModules, is_tokenizer_parameter
from model.hub import HubMixin
from model.imagenet import denormalise, normalise
from model.latent import DiagonalGaussian, mode
from model.packing import PackedLayout
from model.pretrainer import image_feature
from model.text import pack_captions
from model.weights import WeightsOrigin, read_origin, read_weights, weights_of_run

Part = TypeVar("Part", bound=nn.Module)


class VisualTokenizer(TokenizerModules, HubMixin):
    """The student's modules that `parts` lists. A method raises UserError where its module is not among them."""

    def __init__(
        self,
        model: Model,
        parts: frozenset[str],
        has_bias: bool = False,
        attention: str = "sdpa",
        origin: WeightsOrigin | None = None,
    ) -> None:
        super().__init__(model, parts, has_bias, attention)
        self.origin = origin
        self.vocabulary: str | None = None  # the captions' tokenizer.json: path, or hub name of a repository

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of latents."""
        return next(self.trunk.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.trunk.parameters()).device

    @classmethod
    def from_state(
        cls, model: Model, state: dict[str, Tensor], attention: str = "sdpa", origin: WeightsOrigin | None = None
    ) -> VisualTokenizer:
        """Build from weights under our names; those of teacher and prototypes are ignored."""
        kept = {name: tensor for name, tensor in state.items() if is_tokenizer_parameter(name)}
        parts = frozenset(name.split(".")[0] for name in kept)
        with torch.device("meta"):
            tokenizer = cls(model, parts, "clip.logit_bias" in kept, attention, origin)
        tokenizer.load_state_dict(kept, assign=True)
        return tokenizer.requires_grad_(False).eval()

    @classmethod
    def from_run(cls, run: str | Path, attention: str = "sdpa") -> VisualTokenizer:
        """Load the run directory's weights.safetensors.

        Raises UserError where there is none, or it is of another step than the run's latest checkpoint.
        """
        tokenizer = cls.from_file(weights_of_run(Path(run)), attention)
        tokenizer.vocabulary = _vocabulary_of(Path(run) / "config.yaml")
        return tokenizer

    @classmethod
    def from_file(cls, path: str | Path, attention: str = "sdpa") -> VisualTokenizer:
        """Load a weights file (model/weights.py). Raises UserError where it is unreadable or its tensors do not fit."""
        state, model = read_weights(path)
        try:
            return cls.from_state(model, state, attention, read_origin(path))
        except RuntimeError as error:  # load_state_dict's list of mismatched names and shapes
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{path}: the weights do not fit the model that describes them ({reason}); export them anew"
            ) from None

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, height, width), uint8 or float in [0, 1], to latents (B, L, height/p, width/p)."""
        return mode(self._encoded(images), self.model, dim=1).contiguous()

    @torch.no_grad()
    def moments(self, images: Tensor) -> DiagonalGaussian:
        """Mean and variance of the latent, of weights with model.latent=gaussian. Raises UserError for others."""
        if self.model.latent != "gaussian":
            raise UserError(
                f"these weights have model.latent={self.model.latent}: their latents are points, without a variance; "
                "call encode"
            )
        return DiagonalGaussian(*(half.contiguous() for half in DiagonalGaussian.of(self._encoded(images), dim=1)))

    def _encoded(self, images: Tensor) -> Tensor:
        x_TD, layout = self.features(images)
        y_BPM = _require_module(self.bottleneck, "encode", "bottleneck")(layout.patches(x_TD, "clip"))
        return y_BPM.transpose(1, 2).unflatten(2, layout.group("clip").grid)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Decode latents (B, L, h, w) to images (B, 3, h*p, w*p), float32 in [0, 1], clamped."""
        return decode_pixels(_require_module(self.decoder, "decode", "decoder"), latent)  # type: ignore[arg-type]

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, PackedLayout]:
        """Return the trunk's final-normed tokens of `images`, before the bottleneck, and their layout (group "clip").

        Raises UserError for a tensor that is not a batch of RGB images.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise UserError(
                f"images of shape {tuple(images.shape)} and type {images.dtype}: they must be (batch, 3, height, "
                "width), uint8 from 0 to 255 or float from 0 to 1; images[None] makes a batch of one image, "
                ".movedim(-1, 1) puts the channels second"
            )
        crops = {"clip": normalise(images)}
        return self.trunk(crops, {}).contiguous(), self.trunk.layout(crops)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images in the joint image-text space: (B, clip_width) float32, L2-normalised."""
        x_TD, layout = self.features(images)
        if not self.model.bottleneck_ae_only:
            x_TD = mode(_require_module(self.bottleneck, "embed_images", "bottleneck")(x_TD), self.model)
        clip = _require_module(self.clip, "embed_images", "clip")
        return F.normalize(clip.visual_proj(image_feature(layout, x_TD, self.model.image_feature)).float(), dim=-1)

    @torch.no_grad()
    def embed_captions(self, captions: Tensor) -> Tensor:
        """Embed captions, (B, C) token ids, in the joint image-text space: (B, clip_width) float32, L2-normalised."""
        packed = pack_captions(captions.cpu()).to(self.device)
        return F.normalize(_require_module(self.text, "embed_captions", "text")(packed).float(), dim=-1)


def decode_pixels(decoder: Decoder, latent: Tensor) -> Tensor:
    """Decode latents (B, L, h, w) with `decoder` to images (B, 3, h*p, w*p), float32 in [0, 1], clamped."""
    grid = (latent.shape[2], latent.shape[3])
    return denormalise(decoder(latent.flatten(2).transpose(1, 2), grid)).contiguous()


def _vocabulary_of(path: Path) -> str | None:
    """Return data.tokenizer of a pre-training run's config.yaml; None for another kind of run or an unreadable file."""
    try:
        config = load_run(path) if path.is_file() else None
    except UserError:  # a config of another version; the weights file has its own model section
        return None
    return config.data.tokenizer if isinstance(config, Config) else None


def _require_module(part: Part | None, method: str, name: str) -> Part:
    if part is None:
        raise UserError(f"{method} needs the {name}, which these weights do not hold: train with its objective on")
    return part
