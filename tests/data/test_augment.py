"""View parameters are pure functions of (seed, key, epoch, view) and follow the configured distributions.

Crops rendered on CPU threads equal those of DALI's operators, and their bytes depend on their own parameters alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from configs.data import Views
from data import augment
from data.augment import Renderer, ViewParams, gaussian_weights
from data.decode import Decoder
from tests.data.tar_shards import drawn_image


def centred(size: int, heights: ArrayLike, widths: ArrayLike) -> ViewParams:
    """One view of each image of these sides."""
    height, width = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
    side = np.minimum(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    no, zero, one = np.zeros(len(side), bool), np.zeros(len(side)), np.ones(len(side))
    windows = np.stack([top, left, top + side, left + side], axis=1)
    black = np.zeros((len(side), 3), np.uint8)
    return ViewParams(size, windows, no, no, one, one, one, zero, no, zero, no, black)


pytestmark = pytest.mark.L0

N = 20_000
KEYS = np.arange(N, dtype=np.uint64)


def draw(view: str, height: int = 300, width: int = 400, config: Views | None = None) -> augment.ViewParams:
    ones = np.ones(N, np.int64)
    return augment.draw_view(view, config or Views(), 0, KEYS, 0 * ones, height * ones, width * ones)


def sides(numbers: augment.ViewParams) -> tuple[np.ndarray, np.ndarray]:
    top, left, bottom, right = numbers.windows.T
    return bottom - top, right - left


def test_a_draw_does_not_depend_on_the_other_rows() -> None:
    whole = draw("local3")
    some = augment.draw_view("local3", Views(), 0, KEYS[7:9], [0, 0], [300, 300], [400, 400])
    for name in augment.ViewParams.__dataclass_fields__:
        if name != "size":
            assert (getattr(whole, name)[7:9] == getattr(some, name)).all()


@pytest.mark.parametrize("change", ["seed", "key", "epoch", "view"])
def test_seed_key_epoch_and_view_each_change_the_window(change: str) -> None:
    base = {"view": "global0", "seed": 0, "key": 5, "epoch": 2}
    other = base | {change: "global1" if change == "view" else 77}
    first, second = (
        augment.draw_view(
            str(d["view"]), Views(), int(d["seed"]), [int(d["key"])], [int(d["epoch"])], [300], [400]
        ).windows
        for d in (base, other)
    )
    assert (first != second).all()


@pytest.mark.parametrize(("height", "width"), [(300, 400), (64, 64), (1, 1), (40, 1000), (1000, 40)])
@pytest.mark.parametrize("view", ["image", "global0", "local0"])
def test_windows_lie_inside_the_image_with_an_allowed_aspect(view: str, height: int, width: int) -> None:
    numbers = draw(view, height, width)
    top, left, bottom, right = numbers.windows.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (bottom <= height + 1e-9).all()
    assert (right <= width + 1e-9).all()
    tall, wide = sides(numbers)
    assert (wide / tall >= 3 / 4 - 1e-9).all()
    assert (wide / tall <= 4 / 3 + 1e-9).all()


def test_local_windows_cover_the_configured_share_of_the_area_evenly() -> None:
    tall, wide = sides(draw("local0"))
    share = tall * wide / (300 * 400)
    assert share.min() >= 0.05
    assert share.max() <= 0.32
    assert abs(share.mean() - 0.185) < 0.003  # measured 0.0003; a standard error is 0.0006


def test_an_image_too_long_for_the_share_falls_back_to_the_centre() -> None:
    windows = draw("image", 40, 1000).windows  # 90 % of the area at an aspect below 4/3 does not fit
    assert np.allclose(windows, [0, 500 - 80 / 3, 40, 500 + 80 / 3])


def test_the_clip_view_keeps_left_right_and_colours() -> None:
    numbers = draw("image")
    flags = (numbers.flip, numbers.jitter, numbers.grey, numbers.solarise, numbers.blur_sigma > 0)
    assert not any(flag.any() for flag in flags)


@pytest.mark.parametrize(
    ("view", "blur", "solarise"), [("global0", 1.0, 0.0), ("global1", 0.1, 0.2), ("local5", 0.5, 0.0)]
)
def test_ssl_views_are_augmented_as_often_as_configured(view: str, blur: float, solarise: float) -> None:
    numbers = draw(view)
    rates = {
        "flip": (numbers.flip, 0.5), "jitter": (numbers.jitter, 0.8), "grey": (numbers.grey, 0.2),
        "blur": (numbers.blur_sigma > 0, blur), "solarise": (numbers.solarise, solarise),
    }  # fmt: skip
    for name, (flag, rate) in rates.items():
        assert abs(flag.mean() - rate) < 0.015, name  # measured worst 0.007; a standard error is 0.0035


def test_colour_numbers_stay_in_their_ranges() -> None:
    numbers = draw("global0")
    for values, low, high in [
        (numbers.brightness, 0.6, 1.4), (numbers.contrast, 0.6, 1.4), (numbers.saturation, 0.8, 1.2),
        (numbers.hue, -36, 36), (numbers.blur_sigma, 0.1, 2.0),
    ]:  # fmt: skip
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
    assert abs(np.corrcoef(numbers.brightness, numbers.contrast)[0, 1]) < 0.03  # measured 0.009


def test_views_are_named_in_crop_order_and_concatenate_view_major() -> None:
    names = augment.view_names(Views(num_locals=2))
    assert names == ["global0", "global1", "local0", "local1"]
    both = augment.concatenate_views([draw("local0"), draw("local1")])
    assert (both.windows[N:] == draw("local1").windows).all()
    assert len(both.flip) == 2 * N


def test_whole_pixels_are_the_nearest_and_at_least_one_inside_the_image() -> None:
    windows = np.array([[10.4, 0.0, 10.45, 7.6], [19.8, 7.9, 20.0, 8.0], [1.6, 2.4, 9.4, 5.6]])
    found = augment.round_windows(windows, [20, 20, 20], [8, 8, 8])
    assert found.tolist() == [[10, 0, 11, 8], [19, 7, 20, 8], [2, 2, 9, 6]]
    drawn = draw("local0", 3, 2)
    found = augment.round_windows(drawn.windows, np.full(N, 3), np.full(N, 2))
    assert (found[:, :2] >= 0).all()
    assert (found[:, 2:] > found[:, :2]).all()
    assert (found[:, 2:] <= [3, 2]).all()


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
    return torch.from_numpy(np.array(drawn_image(seed, height, width)))


def case(names: list[str], size: int, **config: object) -> tuple[list[Tensor], np.ndarray, augment.ViewParams]:
    """Images, windows and numbers of some views of an image of each of SIDES."""
    heights, widths = (np.array(side) for side in zip(*SIDES, strict=True))
    settings = Views(image_size=size, global_size=size, local_size=size, **{**NONE, **config})  # type: ignore[arg-type]
    keys = np.arange(len(SIDES))
    drawn = augment.concatenate_views(
        [augment.draw_view(n, settings, 3, keys, 0 * keys, heights, widths) for n in names]
    )
    shown = [pixels(seed, *side) for seed, side in enumerate(SIDES)] * len(names)
    windows = augment.round_windows(drawn.windows, np.tile(heights, len(names)), np.tile(widths, len(names)))
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
    fields = {name: getattr(numbers, name) for name in augment.ViewParams.__dataclass_fields__ if name != "size"}
    other = Renderer(threads=3)
    for row in range(len(shown)):
        alone = augment.ViewParams(size, **{name: value[row : row + 1] for name, value in fields.items()})
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
    weights = gaussian_weights(np.array([0.0, 0.1, 1.5]), longest=40)
    assert weights.shape == (3, 6)
    assert np.allclose(weights[:, 0] + 2 * weights[:, 1:].sum(1), 1)
    assert weights[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert weights[2, 3] / weights[2, 0] == pytest.approx(np.exp(-0.5 * (3 / 1.5) ** 2))
    assert gaussian_weights(np.array([9.0]), longest=7).shape == (1, 8)


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
