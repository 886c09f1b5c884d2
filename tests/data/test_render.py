"""Crops rendered on CPU threads are those of DALI's operators, and their bytes depend on their own numbers alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.data import Views
from data import views
from data.decode import Decoder
from data.render import Renderer, gaussian
from tests.data.plain_views import centred
from tests.data.tar_shards import picture

pytestmark = pytest.mark.L0

CHANGES = {"crop": {}, "jitter": {"jitter": 1.0}, "blur": {"blur": (1.0, 1.0, 1.0)}, "grey": {"grey": 1.0},
           "solarise": {"solarise": 1.0}, "all": {"jitter": 0.8, "blur": (1.0, 0.5, 0.5), "grey": 0.2, "solarise": 0.5},
           "wide": {"jitter": 1.0, "brightness": 0.9, "contrast": 0.9, "saturation": 0.9, "hue": 0.5}}  # fmt: skip
NONE = {"jitter": 0.0, "blur": (0.0, 0.0, 0.0), "grey": 0.0, "solarise": 0.0}
SIDES = [(24, 32), (97, 60), (150, 211), (31, 30), (64, 64), (300, 120)]


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    renderer = Renderer(threads=2)
    yield renderer
    renderer.close()


@pytest.fixture(scope="module")
def dali() -> Iterator[Decoder]:
    decoder = Decoder("cpu", threads=1)
    yield decoder
    decoder.close()


def pixels(seed: int, height: int, width: int) -> Tensor:
    return torch.from_numpy(np.array(picture(seed, height, width)))


def case(names: list[str], size: int, **config: object) -> tuple[list[Tensor], np.ndarray, views.ViewNumbers]:
    """Pictures, windows and numbers of some views of a picture of each of SIDES."""
    heights, widths = (np.array(side) for side in zip(*SIDES, strict=True))
    settings = Views(image_size=size, global_size=size, local_size=size, **{**NONE, **config})  # type: ignore[arg-type]
    keys = np.arange(len(SIDES))
    drawn = views.concatenate([views.draw(n, settings, 3, keys, 0 * keys, heights, widths) for n in names])
    shown = [pixels(seed, *side) for seed, side in enumerate(SIDES)] * len(names)
    windows = views.whole_pixels(drawn.windows, np.tile(heights, len(names)), np.tile(widths, len(names)))
    return shown, windows, drawn


@pytest.mark.parametrize("size", [32, 65, 224])
@pytest.mark.parametrize("change", CHANGES)
def test_crops_are_those_of_dali(renderer: Renderer, dali: Decoder, change: str, size: int) -> None:
    shown, windows, numbers = case(["global0", "global1", "local0"], size, **CHANGES[change])
    found = renderer.render(shown, windows, numbers).float()
    wanted = dali.render_with_dali(shown, windows, numbers).float()
    # measured worst 0.75 for a crop, the resize at its borders; a hue turned the other way is above 6
    assert (found - wanted).abs().flatten(1).mean(1).max() < 1.0


def test_crops_differ_from_dalis_at_the_border_only(renderer: Renderer, dali: Decoder) -> None:
    """There DALI's resize looks past the window and mirrors the last pixel; ours weighs what lies inside."""
    shown, windows, numbers = case(["global0", "local0"], 64)
    difference = (renderer.render(shown, windows, numbers).int() - dali.render_with_dali(shown, windows, numbers)).abs()
    assert difference[..., 3:-3, 3:-3].max() <= 1
    assert difference.max() > 1, "then this test needs no border"


def test_jitter_that_changes_nothing_leaves_every_byte(renderer: Renderer) -> None:
    shown, windows, numbers = case(["global0"], 32, jitter=1.0, brightness=0, contrast=0, saturation=0, hue=0)
    assert numbers.jitter.all()
    plain = replace(numbers, jitter=np.zeros_like(numbers.jitter))
    assert renderer.render(shown, windows, numbers).equal(renderer.render(shown, windows, plain))


@pytest.mark.parametrize("size", [16, 33, 224])
def test_bytes_depend_neither_on_the_batch_nor_on_the_threads(renderer: Renderer, size: int) -> None:
    shown, windows, numbers = case(["global0", "global1", "local0", "local1"], size, **CHANGES["all"])
    whole = renderer.render(shown, windows, numbers)
    fields = {name: getattr(numbers, name) for name in views.ViewNumbers.__dataclass_fields__ if name != "size"}
    other = Renderer(threads=3)
    for row in range(len(shown)):
        alone = views.ViewNumbers(size, **{name: value[row : row + 1] for name, value in fields.items()})
        assert other.render(shown[row : row + 1], windows[row : row + 1], alone)[0].equal(whole[row]), row
    other.close()


def test_a_window_of_one_pixel_fills_its_crop(renderer: Renderer) -> None:
    numbers = centred(16, [8], [8])
    shown = pixels(0, 8, 8)
    crop = renderer.render([shown], np.array([[2, 5, 3, 6]]), numbers)[0]
    assert crop.equal(shown[2, 5][:, None, None].expand(3, 16, 16))


def test_a_blur_wider_than_its_crop_averages_it(renderer: Renderer) -> None:
    numbers = replace(centred(4, [4], [4]), blur_sigma=np.array([100.0]))
    shown = torch.zeros(4, 4, 3, dtype=torch.uint8)
    shown[:2] = 200
    crop = renderer.render([shown], np.array([[0, 0, 4, 4]]), numbers).float()
    assert crop.min() >= 80
    assert crop.max() <= 120


def test_gaussian_weights_are_those_of_the_formula_and_sum_to_one() -> None:
    weights = gaussian(np.array([0.0, 0.1, 1.5]), longest=40)
    assert weights.shape == (3, 6)
    assert np.allclose(weights[:, 0] + 2 * weights[:, 1:].sum(1), 1)
    assert weights[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert weights[2, 3] / weights[2, 0] == pytest.approx(np.exp(-0.5 * (3 / 1.5) ** 2))
    assert gaussian(np.array([9.0]), longest=7).shape == (1, 8)


def test_the_threads_of_the_training_step_keep_their_number() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        running = threading.active_count()
        renderer = Renderer(threads=3)
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 2
        assert set(renderer._pool.map(lambda _: torch.get_num_threads(), range(9))) == {1}
        renderer.close()
        assert threading.active_count() == running
    finally:
        torch.set_num_threads(before)
