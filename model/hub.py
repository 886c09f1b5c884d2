"""Saving to and loading from the Hugging Face hub: huggingface_hub's own mixin, in the public VTP layout.

    tokenizer = VisualTokenizer.from_pretrained("OWNER/NAME", revision="main")     # or a directory
    tokenizer.save_pretrained("DIR")                        # config.json, model.safetensors, README.md
    tokenizer.push_to_hub("OWNER/NAME", private=True)       # the same three files

Where to look, tokens, caches and commits are the mixin's affair; what the files are is model/public_directory.py's.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Tensor

from configs import UserError
from configs.architecture import Model
from model.model_card import card_text
from model.origin import Origin
from model.public_directory import CONFIG, read_config, read_public, write_public
from model.public_layout import check_exportable
from model.public_weights import INDEX, WEIGHTS, read_index

T = TypeVar("T", bound="OnHub")


class OnHub(ModelHubMixin, library_name="vtp-engine", tags=["visual-tokenizer", "vtp"]):
    """What VisualTokenizer gets from the hub. It brings `model`, `origin`, `state_dict` and `from_state`."""

    model: Model
    origin: Origin | None

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

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes config.json, model.safetensors and, where there is none, README.md. Options: the mixin's.

        Raises UserError, before anything is written, for a model that the public layout cannot describe.
        """
        check_exportable(self.state_dict(), self.model)
        self._known_origin()
        return super().save_pretrained(save_directory, **options)

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """README.md: what the weights are, as far as it is known, and how to use them."""
        data, parts = self._hub_mixin_info.model_card_data, {name.split(".")[0] for name in self.state_dict()}
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(self.model, self._known_origin(), parts)}")

    def _save_pretrained(self, save_directory: Path) -> None:
        write_public(save_directory, self.state_dict(), self.model, self._known_origin())

    @classmethod
    def _from_pretrained(cls: type[T], *, model_id: str, attention: str = "sdpa", **hub: Any) -> T:
        directory = Path(model_id)
        if not directory.is_dir():
            directory = Path(hf_hub_download(model_id, CONFIG, **hub)).parent
            _fetch_weights(model_id, directory, {**hub, "revision": directory.name})  # the commit of the first
        state, model, origin = read_public(directory)
        return cls.from_state(model, state, attention, origin)

    def _known_origin(self) -> Origin:
        if self.origin is None:
            raise UserError(
                "config.json wants the image size these weights were trained at, which nothing has said: give "
                "VisualTokenizer.from_state an origin=Origin(image_size=...)"
            )
        return self.origin


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
