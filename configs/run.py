"""What every kind of run has: a name, a seed, an optimizer, and the half that must not change results.

A kind adds its own sections, as pre-training a tokenizer does (configs/schema.py). `kind:` in the YAML says which it is
(configs/load.py); the engine's loop knows this half only.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from configs.health import Health
from configs.learning import Optim
from configs.section import Section, Seed
from configs.system import Profile, System


class Run(Section):
    """`system` and `profile` must not change results; everything else is science."""

    # Where files lie that are pinned by a digest beside the place: no science. As pydantic's `exclude` takes it.
    places: ClassVar[dict[str, Any]] = {}
    # Key of a file's path -> key of its digest. The digest is science, so that the file may be moved; without a digest,
    # as in runs of earlier versions, the path is.
    digest_keys: ClassVar[dict[str, str]] = {}

    kind: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=128)]
    seed: Seed = 0
    optim: Optim
    health: Health = Health()
    system: System = System()
    profile: Profile = Profile()

    @property
    def samples_per_step(self) -> int:
        """Over all ranks; the learning rate scales with it, and DeepSpeed is told it as the batch."""
        raise NotImplementedError

    @property
    def streams(self) -> int:
        """Number of sample streams (data.streams); the first position of a step is a multiple of it."""
        return 1

    def check_world(self, world_size: int) -> None:
        """Raises UserError where so many ranks cannot share the batch."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _profiled_steps_are_taken(self) -> Run:
        if self.profile.steps is not None and self.profile.span[1] > self.optim.steps:
            raise ValueError(
                f"profile.steps={self.profile.steps} but optim.steps={self.optim.steps}: the run ends before the "
                "window does; lower profile.steps"
            )
        return self
