"""Data source of the tasks that read tar shards: batches from a loader, and what is known of its samples.

task.data = ShardData(Loader(config, ...))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Generic, Protocol, TypeVar

from data.bad_samples import BadSampleTracker
from data.durable_files import AppendOnlyFile
from data.order import CorpusFacts, sum_key_hashes
from data.sample_reader import SampleReader
from engine import distributed
from engine.tasks.task import number_by_step


class KeyedBatch(Protocol):
    """A batch with the keys of its samples."""

    @property
    def keys(self) -> tuple[str, ...]:
        """One a row, "shard/sample", after bad samples were replaced."""
        ...

    @property
    def step(self) -> int:
        """The loader's index in the data; after `number_by_step` the step that takes the batch."""
        ...


BatchT = TypeVar("BatchT", bound=KeyedBatch)
LoadedT = TypeVar("LoadedT", bound=KeyedBatch, covariant=True)


class ShardLoader(Protocol[LoadedT]):
    """Interface of data.loader.BatchLoader and ImageLoader."""

    reader: SampleReader
    bad_samples: BadSampleTracker

    @property
    def wait_seconds(self) -> float:
        """Seconds waited for batches of `iterate` since this was last read."""
        ...

    def iterate(self, start_step: int, offset: int) -> Iterator[LoadedT]:
        """Iterate over batches from `start_step` of the data on, without end; an iteration before this one ends.

        Step s starts at position offset + s * (samples per step).
        """
        ...

    def close(self) -> None:
        """End its threads."""
        ...


class ShardData(Generic[BatchT]):
    """DataSource over the loader of a corpus of tar shards; `close` ends the loader."""

    def __init__(self, loader: ShardLoader[BatchT]) -> None:
        self.loader = loader

    def describe(self) -> str:
        """Describe the corpus: shards, samples, and samples left out by reason."""
        return self.loader.reader.summary()

    def batches(self, first_step: int, skipped_steps: int = 0, offset: int = 0) -> Iterator[BatchT]:
        """Iterate over batches that a thread prepares ahead."""
        return number_by_step(self.loader.iterate(first_step + skipped_steps, offset), skipped_steps)

    def sample_hash(self, batch: BatchT) -> int:
        """Sum of the hashes of the batch's keys."""
        return sum_key_hashes(batch.keys)

    def order_facts(self, position: int) -> dict[str, str]:
        """Return facts on the corpus and its order from `position` on."""
        return self._facts.at(position)

    @property
    def logs(self) -> Sequence[AppendOnlyFile]:
        """Files of bad samples and lost shards."""
        return self.loader.reader.logs

    def wait_seconds(self) -> float:
        """Return the seconds that steps waited for the loader since the last call."""
        return self.loader.wait_seconds

    def metrics(self) -> dict[str, float]:
        """Return `data/bad/*`: bad samples so far by reason, left out by the index or met by a rank since it started.

        A collective. A sample that two ranks met in two epochs counts for both; `bad_samples.jsonl` has each once.
        """
        health = self.loader.bad_samples
        met = distributed.gather_objects(health.counts - health.left_out)
        counts = sum(met, health.left_out)
        return {f"data/bad/{reason}": float(count) for reason, count in sorted(counts.items())}

    def close(self) -> None:
        """End the loader's threads."""
        self.loader.close()

    @cached_property
    def _facts(self) -> CorpusFacts:
        return CorpusFacts(self.loader.reader.shards.names, self.loader.reader.order)
