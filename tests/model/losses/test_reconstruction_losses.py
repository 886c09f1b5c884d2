"""Pixels and perceptual: the space they live in, the published formula, honest errors about weight files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from configs import UserError
from model.losses.perceptual import (
    CONVS_PER_TAP,
    TORCHVISION_CONV_IDX,
    WEIGHT_KEYS,
    LpipsDistance,
    convert_public_weights,
    main,
)
from model.losses.pixels import IMAGENET_MEAN, IMAGENET_STD, l1_loss, to_signed

pytestmark = pytest.mark.L0
WIDTHS = (4, 4, 6, 6, 8, 8, 8, 10, 10, 10, 10, 10, 10)


def normalised(pixels: Tensor) -> Tensor:
    """uint8-valued RGB -> ImageNet-normalised, as the model's target is."""
    return (pixels / 255 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def public_weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A narrow VGG-16 and its LPIPS heads under their public names, with the classifier nobody uses."""
    draw = torch.Generator().manual_seed(0)
    into = (3, *WIDTHS[:-1])
    vgg16 = {"classifier.0.weight": torch.zeros(2, 2)}
    for n, i, o in zip(TORCHVISION_CONV_IDX, into, WIDTHS, strict=True):
        vgg16[f"features.{n}.weight"] = torch.randn(o, i, 3, 3, generator=draw) / (9 * i) ** 0.5
        vgg16[f"features.{n}.bias"] = 0.1 * torch.randn(o, generator=draw)
    taps = [WIDTHS[sum(CONVS_PER_TAP[: j + 1]) - 1] for j in range(5)]
    heads = {f"lin{j}.model.1.weight": torch.rand(1, c, 1, 1, generator=draw) for j, c in enumerate(taps)}
    return vgg16, heads


def images(seed: int, size: int = 32) -> Tensor:
    return 2 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 1


def published_lpips(a: Tensor, b: Tensor, vgg16: dict[str, Tensor], heads: dict[str, Tensor]) -> Tensor:
    """The metric written down from its paper over torchvision's layer numbers, in float64."""
    layers = "CRCRPCRCRPCRCRCRPCRCRCRPCRCRCR"  # convolution, ReLU, pool
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def features(x: Tensor) -> list[Tensor]:
        x, found = (x.double() - shift.view(3, 1, 1).double()) / scale.view(3, 1, 1).double(), []
        for n, layer in enumerate(layers):
            if layer == "C":
                x = F.conv2d(x, vgg16[f"features.{n}.weight"].double(), vgg16[f"features.{n}.bias"].double(), padding=1)
            x = x.clamp(min=0) if layer == "R" else x
            x = F.max_pool2d(x, 2) if layer == "P" else x
            if n in (3, 8, 15, 22, 29):
                found.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    distance = torch.zeros(len(a), dtype=torch.float64)
    for j, (fa, fb) in enumerate(zip(features(a), features(b), strict=True)):
        distance += ((fa - fb) ** 2 * heads[f"lin{j}.model.1.weight"].double()).sum(dim=1).mean(dim=(1, 2))
    return distance


def test_l1_counts_grey_levels_alike_in_every_channel() -> None:
    pixels = torch.randint(1, 200, (2, 3, 8, 8)).float()
    for channel in range(3):
        off = pixels.clone()
        off[:, channel] += 3
        assert float(l1_loss(normalised(off), normalised(pixels))) == pytest.approx(3 * 2 / 255 / 3, rel=1e-4)


def test_black_is_minus_one_and_white_is_one() -> None:
    for value, expected in ((0.0, -1.0), (255.0, 1.0)):
        found = to_signed(normalised(torch.full((1, 3, 2, 2), value)))
        torch.testing.assert_close(found, torch.full((1, 3, 2, 2), expected), rtol=0, atol=1e-6)


def test_lpips_equals_the_published_formula() -> None:
    vgg16, heads = public_weights()
    found = LpipsDistance(convert_public_weights(vgg16, heads))(images(1), images(2))
    expected = published_lpips(images(1), images(2), vgg16, heads)
    print("relative error", ((found - expected) / expected).abs().max())
    # Measured worst case 2e-7; a tap one layer off changes the value by percents.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_lpips_of_equal_images_is_zero_and_grows_with_the_difference() -> None:
    lpips, image = LpipsDistance(convert_public_weights(*public_weights())), images(1)
    near, far = (lpips((image + size * images(2)), image) for size in (0.05, 0.5))
    assert (lpips(image, image) == 0).all()
    assert (near < far).all()


def test_the_lpips_gradient_reaches_the_reconstruction_only() -> None:
    lpips = LpipsDistance(convert_public_weights(*public_weights()))
    recon, target = images(1).requires_grad_(), images(2).requires_grad_()
    lpips(recon, target).sum().backward()
    assert recon.grad is not None
    assert recon.grad.abs().max() > 0
    assert target.grad is None
    assert [p for p in lpips.parameters() if p.requires_grad or p.grad is not None] == []


def test_public_files_convert_to_one_file_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vgg16, heads = public_weights()
    torch.save(vgg16, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "heads.pth")
    out = tmp_path / "lpips.safetensors"
    assert main([str(tmp_path / "vgg16.pth"), str(tmp_path / "heads.pth"), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    expected = LpipsDistance(convert_public_weights(vgg16, heads))(images(1), images(2))
    assert torch.equal(LpipsDistance.load(out)(images(1), images(2)), expected)


def test_swapped_public_files_end_in_one_line_and_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / "other.pth")
    other = str(tmp_path / "other.pth")
    assert main([other, other, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "features.0.weight" in error
    assert "head.weight" in error
    assert main([str(tmp_path / "absent.pth"), other, "--out", str(tmp_path / "out")]) == 2
    assert "absent.pth" in capsys.readouterr().err


def test_a_wrong_weight_file_names_the_keys_it_has_and_should_have(tmp_path: Path) -> None:
    path = tmp_path / "wrong.safetensors"
    save_file({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"wrong\.safetensors.*convs\.0\.weight.*features\.0\.weight"):
        LpipsDistance.load(path)


def test_a_missing_or_garbled_weight_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "garbled.safetensors").write_bytes(b"<html>404</html>")
    for name in ("absent.safetensors", "garbled.safetensors"):
        with pytest.raises(UserError, match=r"lpips_weights=.*objectives\.rec\.perceptual=0"):
            LpipsDistance.load(tmp_path / name)


@pytest.mark.parametrize("key", ["convs.3.weight", "convs.3.bias", "heads.2.weight"])
def test_weights_that_do_not_fit_each_other_are_refused(key: str) -> None:
    weights = convert_public_weights(*public_weights())
    weights[key] = torch.zeros(5, *weights[key].shape[1:])
    with pytest.raises(UserError, match="must be"):
        LpipsDistance(weights)


def test_there_is_no_perceptual_distance_without_weights() -> None:
    with pytest.raises(UserError, match="missing"):
        LpipsDistance({})
    assert len(WEIGHT_KEYS) == 13 * 2 + 5
