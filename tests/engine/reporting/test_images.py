"""Pictures: what they show is what was given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.reporting.images import latent_colours, png, reconstructions

pytestmark = pytest.mark.L0


def test_reconstructions_stand_under_their_originals() -> None:
    target, recon = torch.rand(3, 3, 4, 4), torch.rand(3, 3, 4, 4)
    picture = reconstructions(target, recon, columns=2)
    assert picture.shape == (3, 8, 8)
    assert torch.equal(picture[:, :4, 4:], target[1])
    assert torch.equal(picture[:, 4:, :4], recon[0])


def test_latent_colours_tell_apart_what_differs_and_keep_alike_what_does_not() -> None:
    latent = torch.zeros(2, 5, 2, 2)
    latent[0, 1, 0, 0], latent[1, 3, 1, 1], latent[1, 4, 0, 1] = 3.0, -2.0, 1.0
    picture = latent_colours(latent, scale=3)
    assert picture.shape == (3, 6, 12)
    assert torch.equal(picture[:, 0, 0], picture[:, 2, 2])  # one latent fills a square
    assert not torch.allclose(picture[:, 0, 0], picture[:, 0, 3])
    assert picture.min() == 0
    assert picture.max() == 1


@pytest.mark.parametrize(("channels", "num_grey", "blue"), [(1, 4, None), (2, 0, 0.0)])
def test_one_latent_channel_is_grey_and_two_are_red_and_green(channels: int, num_grey: int, blue: float | None) -> None:
    picture = latent_colours(torch.randn(1, channels, 2, 2, generator=torch.Generator().manual_seed(0)), scale=1)
    assert picture.shape == (3, 2, 2)
    assert (picture.amin(), picture.amax()) == (0, 1)
    grey = (picture == picture[:1]).all(dim=0)
    assert int(grey.sum()) >= num_grey
    assert blue is None or (picture[2] == blue).all()


def test_a_latent_of_one_position_has_a_picture() -> None:
    assert torch.equal(latent_colours(torch.ones(1, 16, 1, 1), scale=2), torch.zeros(3, 2, 2))


def test_non_finite_values_are_black_and_do_not_change_other_colours(tmp_path: Path) -> None:
    latent = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    latent[1, 2, 0, 1] = torch.nan
    picture = latent_colours(latent, scale=1)
    assert (picture[:, 0, 3] == 0).all()
    assert picture.amax() == 1
    assert torch.equal(latent_colours(torch.full((1, 4, 2, 2), torch.inf), scale=1), torch.zeros(3, 2, 2))
    nan = torch.full((1, 3, 2, 2), torch.nan)
    assert torch.equal(reconstructions(torch.ones(1, 3, 2, 2), nan)[:, 2:], torch.zeros(3, 2, 2))
    (tmp_path / "p.png").write_bytes(png(nan[0]))
    assert not np.asarray(Image.open(tmp_path / "p.png")).any()


def test_a_png_holds_the_pixels(tmp_path: Path) -> None:
    picture = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1).expand(3, 2, 2)
    (tmp_path / "p.png").write_bytes(png(picture))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "p.png"))[0, 0], [0, 128, 255])
