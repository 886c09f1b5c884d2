"""View numbers are pure functions of (seed, key, epoch, view) and follow the configured distributions."""

import numpy as np
import pytest

from configs.data import Views
from data import views

pytestmark = pytest.mark.L0

N = 20_000
KEYS = np.arange(N, dtype=np.uint64)


def draw(view: str, height: int = 300, width: int = 400, config: Views | None = None) -> views.ViewNumbers:
    ones = np.ones(N, np.int64)
    return views.draw(view, config or Views(), 0, KEYS, 0 * ones, height * ones, width * ones)


def sides(numbers: views.ViewNumbers) -> tuple[np.ndarray, np.ndarray]:
    top, left, bottom, right = numbers.windows.T
    return bottom - top, right - left


def test_a_draw_does_not_depend_on_the_other_rows() -> None:
    whole = draw("local3")
    some = views.draw("local3", Views(), 0, KEYS[7:9], [0, 0], [300, 300], [400, 400])
    for name in views.ViewNumbers.__dataclass_fields__:
        if name != "size":
            assert (getattr(whole, name)[7:9] == getattr(some, name)).all()


@pytest.mark.parametrize("change", ["seed", "key", "epoch", "view"])
def test_seed_key_epoch_and_view_each_change_the_window(change: str) -> None:
    base = {"view": "global0", "seed": 0, "key": 5, "epoch": 2}
    other = base | {change: "global1" if change == "view" else 77}
    first, second = (
        views.draw(str(d["view"]), Views(), int(d["seed"]), [int(d["key"])], [int(d["epoch"])], [300], [400]).windows
        for d in (base, other)
    )
    assert (first != second).all()


@pytest.mark.parametrize(("height", "width"), [(300, 400), (64, 64), (1, 1), (40, 1000), (1000, 40)])
@pytest.mark.parametrize("view", ["image", "global0", "local0"])
def test_windows_lie_inside_the_picture_with_an_allowed_aspect(view: str, height: int, width: int) -> None:
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


def test_a_picture_too_long_for_the_share_falls_back_to_the_centre() -> None:
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
    names = views.names(Views(num_locals=2))
    assert names == ["global0", "global1", "local0", "local1"]
    both = views.concatenate([draw("local0"), draw("local1")])
    assert (both.windows[N:] == draw("local1").windows).all()
    assert len(both.flip) == 2 * N


def test_whole_pixels_are_the_nearest_and_at_least_one_inside_the_picture() -> None:
    windows = np.array([[10.4, 0.0, 10.45, 7.6], [19.8, 7.9, 20.0, 8.0], [1.6, 2.4, 9.4, 5.6]])
    found = views.whole_pixels(windows, [20, 20, 20], [8, 8, 8])
    assert found.tolist() == [[10, 0, 11, 8], [19, 7, 20, 8], [2, 2, 9, 6]]
    drawn = draw("local0", 3, 2)
    found = views.whole_pixels(drawn.windows, np.full(N, 3), np.full(N, 2))
    assert (found[:, :2] >= 0).all()
    assert (found[:, 2:] > found[:, :2]).all()
    assert (found[:, 2:] <= [3, 2]).all()
