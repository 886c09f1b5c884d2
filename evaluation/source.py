"""What is evaluated: the tokenizer of a run, of a public directory or hub name, or a weights file by itself.

    source = open_source("runs/demo", device)                       # weights.safetensors and config.yaml
    source = open_source("vtp_l", device, crop=256, caption_tokenizer="openai/clip-vit-large-patch14")      # public
    source = open_source("hf://OWNER/NAME", device)                 # of the hub; hf://OWNER/NAME@REVISION pins it

A run knows its corpus, its image size and its captions' tokenizer; the others know their model only, so the rest is
given.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from configs import Config, DecoderGan, UserError, load_run
from configs.data import WHITE, Colour, Data, Pictures
from configs.system import System
from data.captions import CaptionEncoder, tokenizer_digest
from data.held_out import HeldOutImages
from engine import world
from model.tokenizer import VisualTokenizer

HUB = "hf://"  # before a hub name, which a path would be taken for
CROP = 256  # pixels, of a weights file: the published models' resolution [P]
PROGRAM = ".pt2"
NO_LATENTS = ("decoder", "text", "clip")  # parts that latents do not come from


@dataclass(frozen=True)
class Source:
    """`name` is what the user called it, `crop` the side of the square pictures in pixels, `config` that of the run, or
    None where there is none."""

    name: str
    tokenizer: VisualTokenizer
    folder: Path  # where results go unless another folder is named
    crop: int
    config: Config | DecoderGan | None
    caption_tokenizer: str | None

    def encoder(self) -> CaptionEncoder:
        """Class prompts -> token ids. Raises UserError where nothing says which tokenizer it was, or it was another."""
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

    def _check_caption_tokenizer(self, data: Data) -> None:
        """Raise UserError where the tokenizer file at the run's path has changed, as after making a corpus again."""
        if data.tokenizer_sha256 not in (None, tokenizer_digest(data.tokenizer)):
            raise UserError(
                f"data.tokenizer={data.tokenizer} is not the file the text tower was trained with (sha256 "
                f"{data.tokenizer_sha256}): its ids would mean other words; give that one with --tokenizer"
            )

    def pictures(
        self, patterns: Sequence[str], key: str, limit: int | None = None, classes: Path | None = None
    ) -> HeldOutImages:
        """This rank's share of the labelled pictures of `patterns`, cropped as the tokenizer sees them.

        `key` is the name of the patterns in errors, `classes` a class table other than the one beside the shards.
        Raises UserError for missing shards or none.
        """
        system = self.config.system if self.config else System()
        return HeldOutImages(
            patterns, self.crop, system, _max_pixels(self.config), background=self.background, key=key, limit=limit,
            classes=classes,
            rank=world.rank(), world_size=world.world_size(),
        )  # fmt: skip

    @property
    def background(self) -> Colour:
        """Background of transparent pictures: the run's colour; white where it is random, or without a run."""
        return self.config.data.fixed_background if self.config else WHITE

    def digest(self) -> str:
        """sha256 of every tensor of the tokenizer: the same of a run and of its weights file by itself."""
        return self._digest(without=())

    def latent_digest(self) -> str:
        """sha256 of what latents come from: every tensor of the tokenizer but the decoder's, text's and clip's.

        A decoder trained further on the same latents (stage 2) leaves it as it is.
        """
        return self._digest(without=NO_LATENTS)

    def _digest(self, without: Sequence[str]) -> str:
        found = hashlib.sha256()
        for name, tensor in sorted(self.tokenizer.state_dict().items()):
            if name.split(".")[0] not in without:
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def open_source(
    path: str | Path, device: torch.device, crop: int | None = None, caption_tokenizer: str | None = None
) -> Source:
    """Opens a run directory, a public one, a weights file or hf://OWNER/NAME; `crop` and `caption_tokenizer` go before
    what a run says.

    Raises UserError where there are no weights, where they are damaged, or where the model cannot see such pictures.
    """
    name = str(path)
    tokenizer, folder, config = _from_hub(name) if name.startswith(HUB) else _from_disk(Path(path))
    tokenizer = tokenizer.to(device)
    check_finite(tokenizer, name)
    crop = crop or (config.views.image_size if config else CROP)
    _check_crop(crop, tokenizer.model.patch_size, _max_pixels(config))
    captions = caption_tokenizer or tokenizer.vocabulary
    return Source(name, tokenizer, folder, crop, config, captions)


def _max_pixels(config: Config | DecoderGan | None) -> int:
    found: int = config.data.max_pixels if config else Pictures.model_fields["max_pixels"].default
    return found


def _check_crop(crop: int, patch_size: int, max_pixels: int) -> None:
    """Raises UserError where no such picture can be encoded, or it is larger than any that is read."""
    largest = math.isqrt(max_pixels) // patch_size * patch_size
    if crop**2 > max_pixels:
        raise UserError(
            f"--crop {crop}: {crop**2:,} pixels, above data.max_pixels={max_pixels:,}, the most a picture is read "
            f"with; give {largest} at most"
        )
    if crop % patch_size:
        raise UserError(
            f"--crop {crop}: sides must be multiples of the patch size {patch_size}; "
            f"give {max(crop // patch_size, 1) * patch_size}"
        )


def check_finite(module: nn.Module, path: str | Path) -> None:
    """Raises UserError for weights whose every figure would be none."""
    for name, tensor in module.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} is not finite: the training went astray; go back to an earlier checkpoint")


def _config_of(path: Path) -> Config | DecoderGan | None:
    """Of a run directory; its run has a tokenizer to show."""
    if not (path / "config.yaml").is_file():
        return None
    config = load_run(path / "config.yaml")
    if not isinstance(config, Config | DecoderGan):
        raise UserError(f"{path} is a run of kind {config.kind}, which trains no tokenizer: name one that does")
    return config


Opened = tuple[VisualTokenizer, Path, Config | DecoderGan | None]  # with the folder for results


def _from_hub(name: str) -> Opened:
    """Of hf://OWNER/NAME or hf://OWNER/NAME@REVISION; results go into NAME under the current directory."""
    repository, _, revision = name.removeprefix(HUB).partition("@")
    owner, _, short = repository.partition("/")
    if not owner or not short or "/" in short:
        raise UserError(f"{name} is no hub name: those are {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION")
    if Path(repository).is_dir():
        raise UserError(
            f"{name}: here is a directory {repository}, which would be taken for it; give its path without {HUB}, or "
            "start somewhere else"
        )
    return VisualTokenizer.from_pretrained(repository, revision=revision or None), Path(short), None


def _from_disk(path: Path) -> Opened:
    """The one place that knows in which forms a tokenizer lies on a disk."""
    config = _config_of(path)
    folder = path if path.is_dir() else path.parent
    is_published = (path / "config.json").is_file()
    if config is None and not is_published and (path.suffix == PROGRAM or any(path.glob(f"*{PROGRAM}"))):
        raise UserError(
            f"{path} holds programs of torch.export: to load one may run what its file holds, so none is opened here; "
            "name the run, directory or weights file that `model.interchange programs` made it from"
        )
    if config is None and not is_published and not path.is_file():
        raise UserError(
            f"{path} is no run directory, which has a config.yaml, none in the public layout, which has a config.json, "
            f"and no weights file: name runs/NAME, or what `model.interchange` wrote, or of the hub {HUB}OWNER/NAME"
        )
    if config is None and is_published:
        return VisualTokenizer.from_pretrained(path), folder, None
    tokenizer = VisualTokenizer.from_run(path) if config is not None else VisualTokenizer.from_file(path)
    return tokenizer, folder, config
