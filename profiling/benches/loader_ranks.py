"""Loaders in processes of their own, one a rank, as in a run: each has Python's lock for itself.

with loader_ranks(config, world_size=2) as ranks:
    ranks.make(steps=4)           # returns when every rank has its rows of so many further steps
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from multiprocessing.connection import Connection

import torch

from configs import Config
from data.captions import CaptionEncoder
from data.loader import Loader

Kind = tuple[torch.dtype, tuple[int, ...]]


class LoaderRanks:
    """What the processes were asked for last is theirs to keep: ranks use their batches where they were made."""

    def __init__(self, pipes: list[Connection]) -> None:
        self._pipes = pipes

    def make(self, steps: int) -> list[list[Kind]]:
        """Dtype and shape of the clip view, global and local crops and token ids of every batch, in rank order."""
        for pipe in self._pipes:
            pipe.send(steps)
        return [kinds for pipe in self._pipes for kinds in pipe.recv()]


@contextmanager
def loader_ranks(config: Config, world_size: int) -> Iterator[LoaderRanks]:
    """Starts a process a rank, each with one torch thread, and ends them."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit locks of the parent's threads
    pipes, processes = [], []
    for rank in range(world_size):
        here, there = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(there, config, rank, world_size), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        yield LoaderRanks(pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


def _serve(pipe: Connection, config: Config, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    encoder = CaptionEncoder(config.data.tokenizer, config.model.text.context)
    with closing(Loader(config, encoder, rank=rank, world_size=world_size)) as loader:
        steps = count()
        try:
            while True:
                batches = [loader.batch(next(steps)) for _ in range(pipe.recv())]
                tensors = [(b.images, b.global_crops, b.local_crops, b.captions) for b in batches]
                pipe.send([[(t.dtype, tuple(t.shape)) for t in batch] for batch in tensors])
        except EOFError:  # the other end is closed: nothing more is asked
            return
