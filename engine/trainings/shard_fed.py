"""The half of a Training (engine/training.py) that its data is: batches from shards, and what is known of them.

class Pretraining(ShardFed[Batch]):
    def __init__(self, config, loader, ...):
        super().__init__(loader)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Generic, Protocol, TypeVar

from data.bad_samples import BadSampleTracker
from data.durable_files import AppendOnlyFile
from data.order import CorpusFacts, sum_key_hashes
from data.sample_reader import SampleReader
from engine.training import renumbered
from engine.trainings.bad_samples import bad_samples


class Keyed(Protocol):
    """A batch that knows which samples it is of."""

    @property
    def keys(self) -> tuple[str, ...]:
        """One a row, "shard/sample", after bad samples were replaced."""
        ...

    @property
    def step(self) -> int:
        """The loader's: its place in the data. Once `renumbered`: the step that takes the batch."""
        ...


B = TypeVar("B", bound=Keyed)
Made = TypeVar("Made", bound=Keyed, covariant=True)


class ShardLoader(Protocol[Made]):
    """data.loader.BatchLoader and data.loader.ImageLoader."""

    reader: SampleReader
    bad_samples: BadSampleTracker

    @property
    def wait_seconds(self) -> float:
        """Seconds waited for batches of `iterate` since this was last read."""
        ...

    def iterate(self, start_step: int, offset: int) -> Iterator[Made]:
        """Iterate over batches from `start_step` of the data on, without end; an iteration before this one ends.

        Step s starts at position offset + s * (samples per step).
        """
        ...

    def close(self) -> None:
        """Ends its threads."""
        ...


class ShardFed(Generic[B]):
    """Owns the loader, and ends it."""

    def __init__(self, loader: ShardLoader[B]) -> None:
        self.loader = loader

    def batches(self, first_step: int, skipped_steps: int = 0, offset: int = 0) -> Iterator[B]:
        """Iterate over batches from the corpus that a thread makes ahead."""
        return renumbered(self.loader.iterate(first_step + skipped_steps, offset), skipped_steps)

    def samples(self, batch: B) -> int:
        """By their keys."""
        return sum_key_hashes(batch.keys)

    def corpus(self, position: int) -> dict[str, str]:
        """Return the facts of the corpus's order from `position` on."""
        return self._facts.at(position)

    def describe_corpus(self) -> str:
        """Describe the corpus: shards, samples, and samples left out by reason."""
        return self.loader.reader.summary()

    @property
    def logs(self) -> Sequence[AppendOnlyFile]:
        """Of bad samples and lost shards."""
        return self.loader.reader.logs

    def wait_seconds(self) -> float:
        """The loader's."""
        return self.loader.wait_seconds

    def health(self) -> dict[str, float]:
        """Bad samples. A collective."""
        return bad_samples(self.loader.bad_samples)

    def close(self) -> None:
        """Ends the loader."""
        self.loader.close()

    @cached_property
    def _facts(self) -> CorpusFacts:
        return CorpusFacts(self.loader.reader.shards.names, self.loader.reader.order)
