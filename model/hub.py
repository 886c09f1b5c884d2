"""Saving to and loading from the Hugging Face hub: huggingface_hub's own mixin, in the public VTP layout.

    tokenizer = VisualTokenizer.from_pretrained("OWNER/NAME", revision="main")     # or a directory
    tokenizer.save_pretrained("DIR", model_card_kwargs={"license": "mit"})
    tokenizer.push_to_hub("OWNER/NAME", private=True)       # the same files

    DIR/config.json, model.safetensors      the public VTP layout
    DIR/tokenizer.json                      the captions' vocabulary, where there is a text tower and it is available
    DIR/README.md                           the model card

Where to look, tokens, caches and commits are the mixin's affair; what the files are is model/public_directory.py's.
"""

from __future__ import annotations

import inspect
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Tensor

from configs import UserError
from configs.architecture import Model
from model.model_card import card_text
from model.origin import Origin
from model.public_config import read_key
from model.public_directory import CONFIG, VOCABULARY, read_config, read_public, write_public
from model.public_layout import check_exportable
from model.public_weights import INDEX, WEIGHTS, read_index

T = TypeVar("T", bound="OnHub")
CARD = "README.md"
_LINK_FIELDS = ("repo_url", "paper_url", "docs_url")  # fields of the mixin's template that are not metadata
_METADATA_FIELDS = frozenset(inspect.signature(ModelCardData.__init__).parameters) - {
    "self",
    "ignore_metadata_errors",
    "kwargs",
}
_DOWNLOAD_ERRORS = (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError)


class OnHub(
    ModelHubMixin,
    library_name="vtp-engine",
    tags=["visual-tokenizer", "vtp"],
    pipeline_tag="image-feature-extraction",
):
    """Hub mixin of VisualTokenizer, which provides `model`, `origin`, `vocabulary`, `state_dict`, `from_state`."""

    model: Model
    origin: Origin | None
    vocabulary: str | None  # the captions' tokenizer.json: its path, or the hub name of a repository with one

    @classmethod
    @abstractmethod
    def from_state(
        cls: type[T], model: Model, state: dict[str, Tensor], attention: str = "sdpa", origin: Origin | None = None
    ) -> T:
        """A tokenizer of weights under our names, with a resolved backend; `origin` is what saving says of them."""
        ...

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The weights under our names."""
        ...

    @classmethod
    def from_pretrained(cls: type[T], pretrained_model_name_or_path: str | Path, **options: Any) -> T:
        """From a directory or a hub name. Options: revision, token, cache_dir, local_files_only, force_download of the
        hub, and `attention`, a backend's name. Raises UserError for what is neither, or cannot be read.
        """
        name = str(pretrained_model_name_or_path)
        if Path(name).is_dir():
            read_config(Path(name))  # here with our words for what is wrong with it, in the mixin with json's
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
        self.generate_model_card(**(model_card_kwargs or {}))  # raises where they are wrong, before anything is written
        return super().save_pretrained(save_directory, model_card_kwargs=model_card_kwargs, **options)

    def generate_model_card(self, *_: Any, **given: Any) -> ModelCard:
        """Make README.md: recorded facts about the weights, and how to use them; `given` are model_card_kwargs."""
        data, links = card_metadata(self._hub_mixin_info.model_card_data, given)
        text = card_text(
            self.model,
            self._known_origin(),
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
        write_public(save_directory, self.state_dict(), self.model, self._known_origin())
        source, target = self.vocabulary_file(), save_directory / VOCABULARY
        if source is not None and source.resolve() != target.resolve():
            shutil.copyfile(source, target)

    @classmethod
    def _from_pretrained(cls: type[T], *, model_id: str, attention: str = "sdpa", **hub: Any) -> T:
        directory = Path(model_id)
        if not directory.is_dir():
            directory = Path(hf_hub_download(model_id, CONFIG, **hub)).parent
            hub |= {"revision": directory.name}  # the commit that config.json came from
            _fetch_weights(model_id, directory, hub)
            _fetch_vocabulary(model_id, directory, hub)
        state, model, origin = read_public(directory)
        tokenizer = cls.from_state(model, state, attention, origin)
        if (directory / VOCABULARY).is_file():
            tokenizer.vocabulary = str(directory / VOCABULARY)
        return tokenizer

    def _known_origin(self) -> Origin:
        if self.origin is None:
            raise UserError(
                "config.json wants the image size these weights were trained at, which nothing has said: give "
                "VisualTokenizer.from_state an origin=Origin(image_size=...)"
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
    """Into the cache's `directory`: the file of weights, or, where the hub has none, the index and what it names."""
    try:
        hf_hub_download(name, WEIGHTS, **hub)
    except EntryNotFoundError as none:
        try:
            hf_hub_download(name, INDEX, **hub)
        except EntryNotFoundError:
            raise none from None
        for file in sorted(set(read_index(directory / INDEX).values())):
            hf_hub_download(name, file, **hub)


def _fetch_vocabulary(name: str, directory: Path, hub: dict[str, Any]) -> None:
    """Download tokenizer.json into the cache's `directory`, where there is a text tower and the hub has the file."""
    if read_key(read_config(directory), "train_clip"):
        with suppress(EntryNotFoundError):
            hf_hub_download(name, VOCABULARY, **hub)
