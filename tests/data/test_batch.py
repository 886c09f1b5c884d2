"""Batches are made ahead in order, errors reach the consumer, threads end; moving them to a GPU blocks nothing.

Without a GPU, stand-ins for copies and streams record what would block.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from configs.data import Views
from data import augment
from data.batch import Prefetcher, to_device, wait_for_event
from data.decode import DecodedImage, Decoder
from engine.random_draws import drop_path_draws, rec_noise_draws
from engine.step import model_inputs
from tests.data.tar_shards import encoded
from tests.stream_stand_in import Stream, stand_in_for_cuda
from tests.tiny import random_batch, tiny_config

pytestmark = pytest.mark.L0


def test_items_come_in_order_and_no_more_than_depth_ahead() -> None:
    made: list[int] = []
    items = Prefetcher(lambda n: made.append(n) or n * n, start=3, depth=2)  # type: ignore[func-returns-value]
    assert [next(items) for _ in range(4)] == [9, 16, 25, 36]
    time.sleep(0.1)
    assert made == [3, 4, 5, 6, 7, 8]
    items.close()


def test_making_overlaps_with_consuming_and_waiting_is_measured() -> None:
    def slow(n: int) -> int:
        time.sleep(0.05)
        return n

    items = Prefetcher(slow, 0, depth=2)
    next(items)
    waited = items.wait_seconds
    assert waited > 0.02  # nothing was ready
    time.sleep(0.3)
    next(items), next(items)
    assert items.wait_seconds - waited < 0.04  # both were ready
    items.close()


def test_an_error_arrives_in_its_place_and_again() -> None:
    def fails_at_two(n: int) -> int:
        if n == 2:
            raise ValueError("two")
        return n

    items = Prefetcher(fails_at_two, 0, depth=4)
    assert [next(items), next(items)] == [0, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="two"):
            next(items)
    items.close()


def test_closing_ends_the_thread_and_the_iteration() -> None:
    before = threading.active_count()
    items = Prefetcher(lambda n: n, 0, depth=2)
    next(items)
    items.close()
    items.close()
    assert threading.active_count() == before
    assert len(list(items)) <= 2


CUDA = torch.device("cuda")


class Copies:
    """Page-locked memory and copies to a GPU, noted instead of made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_pinned, self.page_locked, self.holding = 0, set[int](), 0
        self.kept: list[torch.Tensor] = []  # so that no address is used again
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self._pin(tensor))
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in self.page_locked)
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: self._to(tensor, *where, **how))
        self._clone = torch.Tensor.clone

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = self._clone(tensor)
        self.kept.append(pinned)
        self.page_locked.add(pinned.data_ptr())
        self.num_pinned += 1
        return pinned

    def _to(self, tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        self.holding += tensor.numel() > 0 and not (non_blocking and tensor.data_ptr() in self.page_locked)
        return tensor


def test_all_that_a_step_moves_goes_out_of_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("model.trunk.drop_path=0.4", "objectives.rec.noise={kind: additive, scale: 0.1}")
    batch, drops, disturbs = random_batch(config, 0), drop_path_draws(config, 0, 1), rec_noise_draws(config, 0, 1)
    assert drops is not None
    assert disturbs is not None
    copies = Copies(monkeypatch)
    batch = batch.pinned()
    copies.num_pinned = 0
    inputs = model_inputs(batch, CUDA)
    assert copies.num_pinned == 5, "captions are packed anew: ids, positions, two of spans, ends; the rest is locked"
    to_device((drops.draw(0), disturbs.draw(0)), CUDA)
    assert copies.holding == 0
    assert torch.equal(inputs["images"], batch.images)


def test_tuples_keep_their_kind_and_none_stays_none() -> None:
    config = tiny_config("objectives.rec.noise={kind: additive, scale: 0.1}")
    disturbs = rec_noise_draws(config, 0, 1)
    assert disturbs is not None
    drawn = disturbs.draw(0)
    found = to_device(drawn, torch.device("cpu"))
    assert type(found) is type(drawn)
    assert found.visible_idx_RV is None
    assert found.level_R is drawn.level_R
    assert to_device((None, drawn.level_R), torch.device("cpu"))[0] is None


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """Of the CPU, queueing what it does on a stream of its own."""
    decoder = Decoder("cpu", threads=1)
    stand_in_for_cuda(monkeypatch)
    decoder._stream = Stream()  # type: ignore[assignment]
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: tensor)
    return decoder


def rendered(decoder: Decoder) -> torch.Tensor:
    [image] = [found for found in decoder.decode([encoded(0)]) if isinstance(found, DecodedImage)]
    numbers = augment.draw_view("global1", Views(global_size=16), 0, [5], [0], [image.height], [image.width])
    windows = augment.round_windows(numbers.windows, [image.height], [image.width])
    return decoder.render_with_dali([image.pixels], windows, numbers)


def test_whoever_asks_for_crops_queues_behind_them(decoder: Decoder) -> None:
    caller, own = Stream(), decoder._stream
    with torch.cuda.stream(caller):  # type: ignore[arg-type]
        rendered(decoder)
        assert caller.seen[own] == own.seen[own] > 0


def test_crops_made_ahead_hold_up_the_stream_of_the_event_s_consumer_alone(decoder: Decoder) -> None:
    caller, consumer, own = Stream(), Stream(), decoder._stream
    with torch.cuda.stream(caller):  # type: ignore[arg-type]
        with decoder.on_own_stream():
            rendered(decoder)
        ready: Any = decoder.record_event()
        assert caller.seen[own] == 0
    with torch.cuda.stream(consumer):  # type: ignore[arg-type]
        wait_for_event(ready)
    assert consumer.seen[own] == own.seen[own] > 0


def test_a_decoder_of_the_cpu_has_no_stream_and_no_event() -> None:
    decoder = Decoder("cpu", threads=1)
    with decoder.on_own_stream():
        assert rendered(decoder).shape == (1, 3, 16, 16)
    assert decoder.record_event() is None
    wait_for_event(None)
    assert np.array_equal(rendered(decoder).numpy(), rendered(decoder).numpy())
