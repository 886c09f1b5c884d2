"""The tokenizer that is evaluated: where it is loaded from, and its outputs for a batch of images.

    source = open_tokenizer("runs/demo", device)                    # weights.safetensors and config.yaml
    source = open_tokenizer("vtp_l", device, crop=256, caption_tokenizer="openai/clip-vit-large-patch14")      # public
    source = open_tokenizer("hf://OWNER/NAME", device)              # from the hub; hf://OWNER/NAME@REVISION pins it

    batch = TokenizerOutputs(source.tokenizer, images, labels, positions)
    batch.embedding       # (B, clip_width), for zero-shot
    batch.latent          # (B, L, h, w)
    batch.recon           # (B, 3, H, W), decoded from `latent`
    batch.features        # {"latent": (B, L), "blocks": (B, 5 D)}, for linear probe and kNN

A run directory says which corpus, image size and captions' tokenizer it was trained with; a public directory or a
weights file holds the model only, so these are given as options. Outputs are computed when first read, all from one
pass through the trunk; what no task reads is not computed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import Config, DecoderGan, UserError, load_run
from configs.data import WHITE, Colour, ImageData, ImageTextData
from configs.run import System
from data.captions import CaptionEncoder, tokenizer_digest
from data.held_out import HeldOutImages
from engine import distributed
from model.conv import ConvEncoder
from model.imagenet import normalise
from model.latent import mode
from model.packing import PackedLayout
from model.pretrainer import image_feature
from model.tokenizer import VisualTokenizer

HUB_PREFIX = "hf://"  # tells hub names from paths
DEFAULT_CROP = 256  # pixels, without a run's config: the published models' resolution [P]
PROGRAM_SUFFIX = ".pt2"
PARTS_WITHOUT_LATENTS = ("decoder", "text", "clip")  # parts that do not affect latents


@dataclass(frozen=True)
class TokenizerSource:
    """A loaded tokenizer and what is known of its training; `config` is None without a run."""

    name: str  # as the user gave it
    tokenizer: VisualTokenizer
    folder: Path  # where results go unless another folder is named
    crop: int  # side of the square images in pixels
    config: Config | DecoderGan | None
    caption_tokenizer: str | None

    def caption_encoder(self) -> CaptionEncoder:
        """Open the tokenizer for class prompts. Raises UserError if it is unknown, or not the one used in training."""
        if self.caption_tokenizer is None:
            raise UserError(
                f"zero_shot embeds the classes' prompts, and {self.name} does not say with which tokenizer the text "
                "tower was trained: a run of pre-training does, and a public directory with a tokenizer.json; give "
                "--tokenizer, a tokenizer.json or a hub name"
            )
        if isinstance(self.config, Config) and self.caption_tokenizer == self.config.data.tokenizer:
            self._check_caption_tokenizer(self.config.data)
        text = self.tokenizer.model.text
        encoder = CaptionEncoder(self.caption_tokenizer, text.context, key="--tokenizer")
        if encoder.vocab_size > text.vocab:
            raise UserError(
                f"--tokenizer={self.caption_tokenizer} has {encoder.vocab_size} tokens, the text tower was trained "
                f"with {text.vocab} at most: give the one it was trained with"
            )
        return encoder

    def _check_caption_tokenizer(self, data: ImageTextData) -> None:
        """Raise UserError if the tokenizer file at the run's path has changed, as after making a corpus again."""
        if data.tokenizer_sha256 not in (None, tokenizer_digest(data.tokenizer)):
            raise UserError(
                f"data.tokenizer={data.tokenizer} is not the file the text tower was trained with (sha256 "
                f"{data.tokenizer_sha256}): its ids would mean other words; give that one with --tokenizer"
            )

    def open_images(
        self, patterns: Sequence[str], key: str, limit: int | None = None, classes: Path | None = None
    ) -> HeldOutImages:
        """Open this rank's part of the labelled images in the shards `patterns`, centre-cropped to `crop`.

        `key` names the option in errors, `classes` a class table other than the one beside the shards.
        Raises UserError for missing or empty shards.
        """
        system = self.config.system if self.config else System()
        return HeldOutImages(
            patterns, self.crop, system, _max_pixels(self.config), background=self.background, key=key, limit=limit,
            classes=classes,
            rank=distributed.rank(), world_size=distributed.world_size(),
        )  # fmt: skip

    @property
    def background(self) -> Colour:
        """Background of transparent images: the run's colour; white if it is random, or without a run."""
        return self.config.data.fixed_background if self.config else WHITE

    def digest(self) -> str:
        """Hash every tensor of the tokenizer (sha256); a run and its weights file alone have the same digest."""
        return self._digest(without=())

    def latent_digest(self) -> str:
        """Hash what latents come from (sha256): every tensor except those of decoder, text tower and clip head.

        Stage 2, which trains the decoder on the same latents, does not change it.
        """
        return self._digest(without=PARTS_WITHOUT_LATENTS)

    def _digest(self, without: Sequence[str]) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tokenizer.state_dict().items()):
            if name.split(".")[0] not in without:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def open_tokenizer(
    path: str | Path, device: torch.device, crop: int | None = None, caption_tokenizer: str | None = None
) -> TokenizerSource:
    """Load the tokenizer of a run directory, a public directory, a weights file or hf://OWNER/NAME.

    `crop` and `caption_tokenizer` override the run's. Raises UserError if weights are missing or damaged, or if the
    model cannot process images of that size.
    """
    name = str(path)
    tokenizer, folder, config = _from_hub(name) if name.startswith(HUB_PREFIX) else _from_disk(Path(path))
    tokenizer = tokenizer.to(device)
    check_finite(tokenizer, name)
    crop = crop or (config.views.image_size if config else DEFAULT_CROP)
    _check_crop(crop, tokenizer.model.patch_size, _max_pixels(config))
    captions = caption_tokenizer or tokenizer.vocabulary
    return TokenizerSource(name, tokenizer, folder, crop, config, captions)


def _max_pixels(config: Config | DecoderGan | None) -> int:
    max_pixels: int = config.data.max_pixels if config else ImageData.model_fields["max_pixels"].default
    return max_pixels


def _check_crop(crop: int, patch_size: int, max_pixels: int) -> None:
    """Raise UserError if the crop is not a multiple of the patch size, or larger than any image that is read."""
    largest = math.isqrt(max_pixels) // patch_size * patch_size
    if crop**2 > max_pixels:
        raise UserError(
            f"--crop {crop}: {crop**2:,} pixels, above data.max_pixels={max_pixels:,}, the most an image is read "
            f"with; give {largest} at most"
        )
    if crop % patch_size:
        raise UserError(
            f"--crop {crop}: sides must be multiples of the patch size {patch_size}; "
            f"give {max(crop // patch_size, 1) * patch_size}"
        )


def check_finite(module: nn.Module, path: str | Path) -> None:
    """Raise UserError for weights that hold infinite values or NaN."""
    for name, tensor in module.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} is not finite: the training diverged; go back to an earlier checkpoint")


def _read_config(path: Path) -> Config | DecoderGan | None:
    """Read the config of a run directory; None without one. Raises UserError for a run that trains no tokenizer."""
    if not (path / "config.yaml").is_file():
        return None
    config = load_run(path / "config.yaml")
    if not isinstance(config, Config | DecoderGan):
        raise UserError(f"{path} is a run of kind {config.kind}, which trains no tokenizer: name one that does")
    return config


LoadedTokenizer = tuple[VisualTokenizer, Path, Config | DecoderGan | None]  # with the folder for results


def _from_hub(name: str) -> LoadedTokenizer:
    """Load hf://OWNER/NAME or hf://OWNER/NAME@REVISION; results go into NAME under the current directory."""
    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    owner, _, short = repository.partition("/")
    if not owner or not short or "/" in short:
        raise UserError(f"{name} is no hub name: those are {HUB_PREFIX}OWNER/NAME or {HUB_PREFIX}OWNER/NAME@REVISION")
    if Path(repository).is_dir():
        raise UserError(
            f"{name}: there is a directory {repository} here, which would be taken for it; give its path without "
            f"{HUB_PREFIX}, or start somewhere else"
        )
    return VisualTokenizer.from_pretrained(repository, revision=revision or None), Path(short), None


def _from_disk(path: Path) -> LoadedTokenizer:
    """Load a run directory, a directory in the public layout, or a weights file."""
    config = _read_config(path)
    folder = path if path.is_dir() else path.parent
    is_published = (path / "config.json").is_file()
    if config is None and not is_published and (path.suffix == PROGRAM_SUFFIX or any(path.glob(f"*{PROGRAM_SUFFIX}"))):
        raise UserError(
            f"{path} holds programs of torch.export: loading one may run code from its file, so none is opened here; "
            "name the run, directory or weights file that `model.interchange programs` made it from"
        )
    if config is None and not is_published and not path.is_file():
        raise UserError(
            f"{path} is no run directory, which has a config.yaml, none in the public layout, which has a config.json, "
            "and no weights file: name runs/NAME, or what `model.interchange` wrote, or of the hub "
            f"{HUB_PREFIX}OWNER/NAME"
        )
    if config is None and is_published:
        return VisualTokenizer.from_pretrained(path), folder, None
    tokenizer = VisualTokenizer.from_run(path) if config is not None else VisualTokenizer.from_file(path)
    return tokenizer, folder, config


ModuleT = TypeVar("ModuleT", bound=nn.Module)
LAST_BLOCKS = 4  # whose CLS tokens are probed, as in the released table


class TokenizerOutputs:
    """Lazily computed outputs for one batch of images.

    `images` (B, 3, H, W) float in [0, 1]; `labels` (B,), -1 for none; `positions` (B,), indices in the corpus.
    """

    def __init__(self, tokenizer: VisualTokenizer, images: Tensor, labels: Tensor, positions: Tensor) -> None:
        self.tokenizer, self.images, self.labels, self.positions = tokenizer, images, labels, positions

    @cached_property
    @torch.no_grad()
    def embedding(self) -> Tensor:
        """Image embedding (B, clip_width) float32, L2-normed, as VisualTokenizer.embed_images."""
        model, x_TD = self.tokenizer.model, self._blocks[-1]
        if not model.bottleneck_ae_only:
            x_TD = mode(_require_part(self.tokenizer.bottleneck, "bottleneck")(x_TD), model)
        clip = _require_part(self.tokenizer.clip, "clip")
        return F.normalize(clip.visual_proj(image_feature(self._layout, x_TD, model.image_feature)).float(), dim=-1)

    @cached_property
    @torch.no_grad()
    def latent(self) -> Tensor:
        """Latents (B, L, h, w), as VisualTokenizer.encode."""
        bottleneck = _require_part(self.tokenizer.bottleneck, "bottleneck")
        latent_BPL = mode(bottleneck(self._layout.patches(self._blocks[-1], "clip")), self.tokenizer.model)
        return latent_BPL.transpose(1, 2).unflatten(2, self._layout.group("clip").grid).contiguous()

    @cached_property
    def recon(self) -> Tensor:
        """Reconstruction (B, 3, H, W) float32 in [0, 1]."""
        return self.tokenizer.decode(self.latent)

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """Features for linear probe and kNN: name -> (B, width) float32.

        latent: the bottleneck's output averaged over patches, of width L. blocks: CLS of the last 4 blocks (of all if
        there are fewer), then the mean patch of the last, each final-normed, as DINOv2's probes read them; absent for a
        convolutional encoder, which has neither blocks nor CLS.
        """
        if isinstance(self.tokenizer.trunk, ConvEncoder):
            return {"latent": self.latent.float().mean(dim=(2, 3))}
        cls = [self._layout.cls(x_TD, "clip") for x_TD in self._blocks]
        patch_BD = self._layout.patches(self._blocks[-1], "clip").float().mean(dim=1)
        features = {"blocks": torch.cat([*(x_BD.float() for x_BD in cls), patch_BD], dim=1)}
        if self.tokenizer.bottleneck is not None:
            features = {"latent": self.latent.float().mean(dim=(2, 3))} | features
        return features

    @cached_property
    @torch.no_grad()
    def _blocks(self) -> list[Tensor]:
        """Outputs of the last blocks, the deepest last; of a convolutional encoder, its one output."""
        trunk, crops = self.tokenizer.trunk, {"clip": normalise(self.images)}
        return [trunk(crops, {})] if isinstance(trunk, ConvEncoder) else trunk.intermediate(crops, LAST_BLOCKS)

    @cached_property
    def _layout(self) -> PackedLayout:
        return self.tokenizer.trunk.layout({"clip": self.images})


def _require_part(module: ModuleT | None, name: str) -> ModuleT:
    if module is None:
        raise UserError(
            f"these weights hold no {name}: train with its objective on, or leave out the tasks that need it"
        )
    return module
