"""Where weights come from, as far as it is known; kept in the metadata of every safetensors file written here.

    Origin(image_size=256, name="vtp_b", steps=100_000, fingerprint="3f0c5a1be0d2f9a7")
    Origin(image_size=256)      # a public directory: its config.json says the size and nothing else

The public layout's config.json has the image size alone, and stays as public code wrote it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from configs import Config, fingerprint

METADATA = "vtp_engine.origin"  # the key of a safetensors file's metadata


@dataclass(frozen=True)
class Origin:
    """`image_size` in pixels: what clip and rec were trained at. `fingerprint` is that of the science settings."""

    image_size: int
    name: str | None = None
    steps: int | None = None
    fingerprint: str | None = None

    @classmethod
    def of(cls, config: Config, steps: int | None = None) -> Origin:
        """What a run's config says, and how many steps it took if that is known."""
        return cls(config.views.image_size, config.name, steps, fingerprint(config))

    @classmethod
    def from_json(cls, text: str) -> Origin:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))
