"""Whose features an FID compares: Inception as the published graph has it, a corpus's own network, refusals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from configs import UserError
from evaluation import features
from evaluation.fid import open_network
from evaluation.inception import ConvNormRelu, ConvTable, Inception, resize_as_tensorflow
from tests.data.tar_shards import encoded, write_tar

pytestmark = pytest.mark.L0


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[Inception, Path]:
    """Random weights under the published names, with a classifier and without batch norm's counters, as published."""
    torch.manual_seed(0)
    network = Inception().eval()
    state = {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return network, path


def test_inception_has_the_layers_and_parameters_that_inception_v3_has(inception: tuple[Inception, Path]) -> None:
    network, _ = inception
    assert sum(isinstance(module, ConvNormRelu) for module in network.modules()) == 94
    # Inception-v3 without classifiers: 21,768,352 in Keras, whose batch norms have no scale, and 17,216 scales.
    assert sum(parameter.numel() for parameter in network.parameters()) == 21_768_352 + 17_216
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes["Mixed_5b.branch_pool.conv.weight"] == (32, 192, 1, 1)
    assert shapes["Mixed_6c.branch7x7dbl_5.conv.weight"] == (192, 160, 1, 7)
    assert shapes["Mixed_6e.branch7x7_3.conv.weight"] == (192, 192, 7, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)


def test_its_stages_have_the_published_sizes(inception: tuple[Inception, Path]) -> None:
    network, _ = inception
    seen = {}
    stages = {name: module for name, module in network.named_children() if isinstance(module, ConvTable)}
    hooks = [
        module.register_forward_hook(lambda _, __, x, name=name: seen.update({name: tuple(x.shape[1:])}))
        for name, module in stages.items()
    ]
    with torch.no_grad():
        assert network(torch.rand(1, 3, 40, 40)).shape == (1, 2048)
    for hook in hooks:
        hook.remove()
    assert seen == {
        "Mixed_5b": (256, 35, 35), "Mixed_5c": (288, 35, 35), "Mixed_5d": (288, 35, 35), "Mixed_6a": (768, 17, 17),
        "Mixed_6b": (768, 17, 17), "Mixed_6c": (768, 17, 17), "Mixed_6d": (768, 17, 17), "Mixed_6e": (768, 17, 17),
        "Mixed_7a": (1280, 8, 8), "Mixed_7b": (2048, 8, 8), "Mixed_7c": (2048, 8, 8),
    }  # fmt: skip


def test_a_state_dict_is_loaded_and_named_by_its_hash(inception: tuple[Inception, Path]) -> None:
    network, path = inception
    opened = open_network(path)
    assert opened.name == f"inception:{hashlib.sha256(path.read_bytes()).hexdigest()[:6]}, not the published file"
    assert opened.num_features == 2048
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert opened(image).equal(network(image))


def test_images_are_resized_as_tensorflow_1_did() -> None:
    """Output i at input i * length / side, neighbours weighted by nearness, the last pixel repeated."""
    ramp = torch.tensor([0.0, 10.0, 40.0]).expand(1, 1, 2, 3)
    assert resize_as_tensorflow(ramp, 6)[0, 0, 0].tolist() == pytest.approx([0, 5, 10, 25, 40, 40])
    image = torch.rand(2, 3, 13, 13)
    assert resize_as_tensorflow(image, 13).equal(image)
    twice = F.interpolate(image, (25, 25), mode="bilinear", align_corners=True)  # another grid
    assert not torch.allclose(resize_as_tensorflow(image, 25), twice, atol=0.01)


def test_average_pools_do_not_count_padding(inception: tuple[Inception, Path]) -> None:
    """With a constant input, a pool that counted the padding would darken the border."""
    block = inception[0].Mixed_5b
    with torch.no_grad():
        out = block(torch.ones(1, 192, 9, 9))[0, -32:]  # the pooled branch: 1 x 1 convolutions
    assert torch.allclose(out, out[:, 4:5, 4:5].expand_as(out), atol=1e-5)


def test_the_last_block_alone_pools_by_maximum(inception: tuple[Inception, Path]) -> None:
    x = torch.rand(1, 2048, 4, 4)
    last = inception[0].Mixed_7c
    with torch.no_grad():
        pooled = last(x)[:, -192:]
        assert torch.allclose(pooled, last.branch_pool(F.max_pool2d(x, 3, 1, 1)))
    assert (last.is_last, inception[0].Mixed_7b.is_last) == (True, False)


def test_damaged_and_foreign_files_are_one_error_each(inception: tuple[Inception, Path], tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    path.write_bytes(inception[1].read_bytes()[:5000])
    with pytest.raises(UserError, match="not a readable torch state dict"):
        open_network(path)
    torch.save({"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="470 of 470 tensors are missing, Conv2d_1a_3x3"):
        open_network(path)
    stored = torch.load(inception[1], weights_only=True)
    torch.save(stored | {"Mixed_7a.branch3x3_1.conv.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"branch3x3_1.conv.weight is \(1,\) and must be \(192, 768, 1, 1\)"):
        open_network(path)
    path.write_bytes(b"no torch file")
    with pytest.raises(UserError, match=r"dict \(it is no torch file, or holds more than tensors\); fetch it anew$"):
        open_network(path)
    torch.save([1], path)
    with pytest.raises(UserError, match="holds a list"):
        open_network(path)
    with pytest.raises(UserError, match="does not exist"):
        open_network(tmp_path / "nothing.pth")
    for content in (b"", b"no safetensors"):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="is no feature network"):
            open_network(tmp_path / "bad.safetensors")


def write_two_tone_corpus(folder: Path) -> Path:
    """Dark images of class 0 and light ones of class 1."""
    from PIL import Image

    def png(light: int, seed: int) -> bytes:
        import io

        file = io.BytesIO()
        Image.new("RGB", (16, 16), (light + seed,) * 3).save(file, "PNG")
        return file.getvalue()

    for split, count in (("train", 32), ("held_out", 8)):
        members: dict[str, bytes] = {}
        for i in range(count):
            members |= {f"{i}.png": png((20, 200)[i % 2], i), f"{i}.json": json.dumps({"label": i % 2}).encode()}
        write_tar(folder / f"{split}-0.tar", members)
    return folder


def test_a_network_learns_a_corpus_and_says_how_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, out = write_two_tone_corpus(tmp_path), tmp_path / "net.safetensors"
    asked = ["--data", str(corpus), "--out", str(out), "--size", "16", "--epochs", "30"]
    assert features.main(asked) == 0
    assert "100.0% of the held-out images" in capsys.readouterr().out
    opened, first = open_network(out), out.read_bytes()
    assert opened.name == f"corpus:{hashlib.sha256(first).hexdigest()[:6]}, 64-d, 100 % acc"
    assert opened(torch.rand(3, 3, 16, 16)).shape == (3, 64)
    assert opened(torch.rand(3, 3, 48, 48)).shape == (3, 64)  # pictures of another size are resized
    assert features.main(asked) == 0
    assert out.read_bytes() == first


def test_a_corpus_that_teaches_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "held_out"):
        write_tar(tmp_path / f"{split}-0.tar", {"0.jpg": encoded(0), "0.txt": b"no label"})
    asked = ["--data", str(tmp_path), "--out", str(tmp_path / "net.safetensors")]
    assert features.main(asked) == 2
    assert "has a label, which is what the network learns from" in capsys.readouterr().err
    assert features.main([*asked, "--size", "4"]) == 2
    assert "16 pixels and 1 epoch or more" in capsys.readouterr().err
    assert features.main([*asked, "--out", str(tmp_path / "net.pth")]) == 2
    assert "name it" in capsys.readouterr().err
    for split in ("train", "held_out"):
        write_tar(tmp_path / f"{split}-0.tar", {"0.jpg": encoded(0), "0.json": b'{"label": 0}'})
    assert features.main(asked) == 2
    assert "has one class" in capsys.readouterr().err
    write_tar(tmp_path / "train-0.tar", {"0.jpg": encoded(0), "0.json": b'{"label": 123456789012}'})
    assert features.main(asked) == 2
    assert "has label 123456789012: labels number the classes" in capsys.readouterr().err
