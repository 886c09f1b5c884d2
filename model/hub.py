"""Saving to and loading from the Hugging Face hub: huggingface_hub's own mixin, in the public VTP layout.

    tokenizer = VisualTokenizer.from_pretrained("OWNER/NAME", revision="main")     # or a directory
    tokenizer.save_pretrained("DIR", model_card_kwargs={"license": "mit"})
    tokenizer.push_to_hub("OWNER/NAME", private=True)       # the same files

    DIR/config.json, model.safetensors      the public VTP layout
    DIR/tokenizer.json                      the captions' vocabulary, where there is a text tower and it is available
    DIR/README.md                           the model card: recorded facts, and metadata for the hub

The mixin handles paths, tokens, caches and commits; model/public_layout.py defines the files.
"""

from __future__ import annotations

import inspect
import shutil
from abc import abstractmethod
from collections.abc import Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Tensor

from configs import UserError
from configs.model import Model
from model.public_config import official_class_note, read_key
from model.public_layout import (
    PUBLIC_CONFIG,
    PUBLIC_WEIGHTS,
    SHARD_INDEX,
    VOCABULARY,
    check_exportable,
    read_config,
    read_public,
    read_shard_index,
    write_public,
)
from model.weights import WeightsOrigin

T = TypeVar("T", bound="HubMixin")
CARD = "README.md"
_LINK_FIELDS = ("repo_url", "paper_url", "docs_url")  # fields of the mixin's template that are not metadata
_METADATA_FIELDS = frozenset(inspect.signature(ModelCardData.__init__).parameters) - {
    "self",
    "ignore_metadata_errors",
    "kwargs",
}
_DOWNLOAD_ERRORS = (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError)


class HubMixin(
    ModelHubMixin,
    library_name="vtp-engine",
    tags=["visual-tokenizer", "vtp"],
    pipeline_tag="image-feature-extraction",
):
    """Hub mixin of VisualTokenizer, which provides `model`, `origin`, `vocabulary`, `state_dict`, `from_state`."""

    model: Model
    origin: WeightsOrigin | None
    vocabulary: str | None  # the captions' tokenizer.json: its path, or the hub name of a repository with one

    @classmethod
    @abstractmethod
    def from_state(
        cls: type[T],
        model: Model,
        state: dict[str, Tensor],
        attention: str = "sdpa",
        origin: WeightsOrigin | None = None,
    ) -> T:
        """Build a tokenizer from weights under our names, with a resolved backend; `origin` is written when saving."""
        ...

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The weights under our names."""
        ...

    @classmethod
    def from_pretrained(cls: type[T], pretrained_model_name_or_path: str | Path, **options: Any) -> T:
        """Load from a directory or a hub name. Raises UserError where it is neither, or cannot be read.

        Options: revision, token, cache_dir, local_files_only, force_download of the hub, and `attention`, a backend.
        """
        name = str(pretrained_model_name_or_path)
        if Path(name).is_dir():
            read_config(Path(name))  # raises UserError; the mixin would raise json's error
        try:
            return super().from_pretrained(name, **options)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"{name} is no directory and the hub did not deliver it ({reason}); check the name and the network, or "
                "download it once and give its path"
            ) from None

    def save_pretrained(
        self, save_directory: str | Path, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> str | None:
        """Write config.json, model.safetensors, the captions' tokenizer.json and, unless it exists, README.md.

        `model_card_kwargs` are fields of the card's metadata, such as license, datasets, base_model; tags are added to
        ours; repo_url, paper_url and docs_url go into its table. Other options are the mixin's. Raises UserError,
        before anything is written, for a model that the public layout cannot describe, for unknown fields, and for
        fields where README.md exists already.
        """
        check_exportable(self.state_dict(), self.model)
        card = Path(save_directory) / CARD
        if model_card_kwargs and card.exists():
            raise UserError(
                f"{card} exists and is not overwritten: model_card_kwargs would have no effect; edit that file, or "
                "remove it"
            )
        self.generate_model_card(**(model_card_kwargs or {}))  # raises for unknown fields, before anything is written
        return super().save_pretrained(save_directory, model_card_kwargs=model_card_kwargs, **options)

    def generate_model_card(self, *_: Any, **given: Any) -> ModelCard:
        """Make README.md: recorded facts about the weights, and how to use them; `given` are model_card_kwargs."""
        data, links = card_metadata(self._hub_mixin_info.model_card_data, given)
        text = model_card_text(
            self.model,
            self._require_origin(),
            self._parts(),
            str(data.license),
            self.vocabulary_file() is not None,
            links,
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")

    def vocabulary_file(self) -> Path | None:
        """Return the path of the captions' tokenizer.json, downloaded where `vocabulary` is a hub name.

        None where it is not available, or the weights hold no text tower.
        """
        if self.vocabulary is None or "text" not in self._parts():
            return None
        path = Path(self.vocabulary)
        if path.is_file() or path.suffix == ".json":
            return path if path.is_file() else None
        repository, _, revision = self.vocabulary.partition("@")
        try:
            return Path(hf_hub_download(repository, VOCABULARY, revision=revision or None))
        except _DOWNLOAD_ERRORS:
            return None

    def _parts(self) -> set[str]:
        return {name.split(".")[0] for name in self.state_dict()}

    def _save_pretrained(self, save_directory: Path) -> None:
        write_public(save_directory, self.state_dict(), self.model, self._require_origin())
        source, target = self.vocabulary_file(), save_directory / VOCABULARY
        if source is not None and source.resolve() != target.resolve():
            shutil.copyfile(source, target)

    @classmethod
    def _from_pretrained(cls: type[T], *, model_id: str, attention: str = "sdpa", **hub: Any) -> T:
        directory = Path(model_id)
        if not directory.is_dir():
            directory = Path(hf_hub_download(model_id, PUBLIC_CONFIG, **hub)).parent
            hub |= {"revision": directory.name}  # the commit that config.json came from
            _fetch_weights(model_id, directory, hub)
            _fetch_vocabulary(model_id, directory, hub)
        state, model, origin = read_public(directory)
        tokenizer = cls.from_state(model, state, attention, origin)
        if (directory / VOCABULARY).is_file():
            tokenizer.vocabulary = str(directory / VOCABULARY)
        return tokenizer

    def _require_origin(self) -> WeightsOrigin:
        if self.origin is None:
            raise UserError(
                "config.json wants the image size these weights were trained at, which is not known: give "
                "VisualTokenizer.from_state an origin=WeightsOrigin(image_size=...)"
            )
        return self.origin


def card_metadata(ours: ModelCardData, given: Mapping[str, Any]) -> tuple[ModelCardData, dict[str, str]]:
    """Merge a user's model_card_kwargs over our metadata; return the card's metadata and its links.

    Tags of both are kept. The licence is `unknown` unless one is given: it is not recorded with the weights. Raises
    UserError for a name that is neither a metadata field nor a link.
    """
    unknown = sorted(given.keys() - _METADATA_FIELDS - set(_LINK_FIELDS))
    if unknown:
        raise UserError(
            f"model_card_kwargs has {unknown[0]}={given[unknown[0]]!r}, which is no field of a model card; the "
            f"fields are {', '.join(sorted(_METADATA_FIELDS))} and {', '.join(_LINK_FIELDS)}"
        )
    metadata = {"license": "unknown", **ours.to_dict()} | {key: given[key] for key in given if key not in _LINK_FIELDS}
    metadata["tags"] = sorted({*(ours.tags or ()), *(given.get("tags") or ())})
    return ModelCardData(**metadata), {key: str(given[key]) for key in _LINK_FIELDS if given.get(key)}


def _fetch_weights(name: str, directory: Path, hub: dict[str, Any]) -> None:
    """Download into the cache's `directory`: the weights file or, where the hub has none, the index and its shards."""
    try:
        hf_hub_download(name, PUBLIC_WEIGHTS, **hub)
    except EntryNotFoundError as none:
        try:
            hf_hub_download(name, SHARD_INDEX, **hub)
        except EntryNotFoundError:
            raise none from None
        for file in sorted(set(read_shard_index(directory / SHARD_INDEX).values())):
            hf_hub_download(name, file, **hub)


def _fetch_vocabulary(name: str, directory: Path, hub: dict[str, Any]) -> None:
    """Download tokenizer.json into the cache's `directory`, where there is a text tower and the hub has the file."""
    if read_key(read_config(directory), "train_clip"):
        with suppress(EntryNotFoundError):
            hf_hub_download(name, VOCABULARY, **hub)


_METHODS = {"decoder": "decode", "text": "embed_captions", "clip": "embed_images"}
_CARD = """# {title}

A visual tokenizer of the VTP architecture ([arXiv 2512.13687](https://arxiv.org/abs/2512.13687)): a ViT turns an
image into latents with {channels} channels at 1/{patch} of the resolution.

| | |
|---|---|
{rows}

`config.json` and `model.safetensors` are in the public VTP layout.{note} With vtp-engine:

    from model.tokenizer import VisualTokenizer
    tokenizer = VisualTokenizer.from_pretrained("PATH OR NAME")
    latent = tokenizer.encode(images)    # (B, 3, H, W), uint8 or [0, 1] -> (B, {channels}, H/{patch}, W/{patch})
{decode}
What these weights reconstruct, classify or generate has not been recorded here.
"""
_DECODE = "    pixels = tokenizer.decode(latent)    # (B, 3, H, W) in [0, 1]\n"


def model_card_text(
    model: Model,
    origin: WeightsOrigin,
    parts: Set[str],
    licence: str = "unknown",
    has_vocabulary: bool = False,
    links: Mapping[str, str] | None = None,
) -> str:
    """Write the card as Markdown without front matter.

    `parts` are those of model.factory.TOKENIZER_PARTS that the weights hold; `has_vocabulary`: tokenizer.json is saved
    with them.
    """
    rows = {
        "configuration": origin.name or "unknown",
        "training steps": "unknown" if origin.steps is None else f"{origin.steps:,}",
        "fingerprint of the settings": origin.fingerprint or "unknown",
        "trained at": f"{origin.image_size} pixels",
        "encoder": _vit(model.trunk.width, model.trunk.depth, model.trunk.heads),
        "methods": ", ".join(["encode", *(_METHODS[part] for part in _METHODS if part in parts)]),
        "licence": licence,
    }
    if "decoder" in parts:
        rows["decoder"] = _vit(model.decoder.width, model.decoder.depth, model.decoder.heads)
    if "text" in parts:
        rows["captions' vocabulary"] = "`tokenizer.json`" if has_vocabulary else "not in this directory"
    rows |= {key.removesuffix("_url"): url for key, url in (links or {}).items()}
    note = official_class_note(model, parts)
    return _CARD.format(
        title=origin.name or "Visual tokenizer",
        channels=model.latent_channels,
        patch=model.patch_size,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        decode=_DECODE if "decoder" in parts else "",
        note=f" But {note}." if note else "",
    )


def _vit(width: int, depth: int, heads: int) -> str:
    return f"width {width}, depth {depth}, {heads} heads"
