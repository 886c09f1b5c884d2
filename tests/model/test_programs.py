"""Exported programs compute what the tokenizer computes, in a process that has torch and nothing of ours."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs import UserError
from model.interchange import main
from model.programs import decode_program, encode_program, write_onnx, write_programs
from model.tokenizer import VisualTokenizer
from tests.model.tiny_weights import NO_REC, tokenizer_of, write_run
from tests.tiny import tiny_config

# Isolated (-I): neither the working directory nor PYTHONPATH is searched; what is installed of ours is barred.
ALONE = """
import sys
for package in ("configs", "data", "engine", "evaluation", "kernels", "model", "profiling"):
    sys.modules[package] = None  # importing it, or a module in it, raises
import torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
folder = sys.argv[1]
encode, decode = (torch.export.load(f"{folder}/{name}.pt2").module() for name in ("encode", "decode"))
found = {}
for key, images in load_file(f"{folder}/in.safetensors").items():
    found[f"{key}.latent"] = encode(images)
    found[f"{key}.pixels"] = decode(found[f"{key}.latent"])
save_file(found, f"{folder}/out.safetensors")  # refuses what is not contiguous
"""
SIZES = {
    "aligned": (16, 3, 16, 16),
    "one": (1, 3, 32, 32),
    "batch": (5, 3, 32, 32),
    "wide": (2, 3, 16, 72),
    "large": (1, 3, 96, 64),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    run, public = write_run(folder / "run", tiny_config("model.trunk.depth=1")), folder / "public"
    assert main(["export", str(run), "--out", str(public)]) == 0
    assert main(["programs", str(public), "--out", str(folder)]) == 0
    return folder


@pytest.mark.L2
def test_a_gaussian_tokenizers_program_gives_the_mode_where_the_public_layout_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tiny_config("model.latent=gaussian", "model.trunk.depth=1"))
    images = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    latent = encode_program(tokenizer).module()(images)
    torch.testing.assert_close(latent, tokenizer.encode(images), rtol=0, atol=1e-6)
    run = write_run(tmp_path / "run", tiny_config("model.latent=gaussian"))
    assert main(["export", str(run), "--out", str(tmp_path / "public")]) == 2
    assert not (tmp_path / "public").exists()


@pytest.mark.L0
def test_without_our_code_the_programs_give_the_tokenizers_latents_and_pixels_at_every_size(programs: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = {key: torch.rand(shape, generator=generator) for key, shape in SIZES.items()}
    save_file(images, programs / "in.safetensors")
    alone = subprocess.run([sys.executable, "-I", "-c", ALONE, str(programs)], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    found, tokenizer = load_file(programs / "out.safetensors"), VisualTokenizer.from_run(programs / "run")
    for key, pixels in images.items():
        latent = tokenizer.encode(pixels)
        assert torch.equal(found[f"{key}.latent"], latent), key  # the same operations in the same order
        assert torch.equal(found[f"{key}.pixels"], tokenizer.decode(latent)), key


@pytest.mark.L0
def test_the_conventions_lie_beside_the_programs_and_inside_them(programs: Path) -> None:
    said = json.loads((programs / "conventions.json").read_text())
    inside = {"conventions.json": ""}
    torch.export.load(programs / "decode.pt2", extra_files=inside)
    assert json.loads(inside["conventions.json"]) == said
    assert said["encode"]["images"] == {
        "shape": ["batch", 3, "height", "width"], "dtype": "float32", "range": [0, 1], "colour": "RGB"
    }  # fmt: skip
    assert said["decode"]["latent"]["shape"] == ["batch", 8, "height / 8", "width / 8"]
    assert said["strides"] == "contiguous, of inputs and outputs"
    assert said["origin"]["name"] == "tiny"


@pytest.mark.L0
def test_a_size_that_does_not_hold_whole_patches_is_refused(programs: Path) -> None:
    encode = torch.export.load(programs / "encode.pt2").module()
    with pytest.raises(AssertionError, match=" % 8"):
        encode(torch.rand(1, 3, 32, 36))


@pytest.mark.L0
def test_weights_without_a_bottleneck_have_no_programs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="encode needs the bottleneck"):
        write_programs(tokenizer_of(tiny_config(*NO_REC)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.L2  # two C++ compilations, as users of AOTInductor run them
@pytest.mark.filterwarnings(  # torch's own, of its own code
    "ignore:.isinstance.treespec, LeafSpec.*:FutureWarning", "ignore:.torch.jit.*is deprecated:DeprecationWarning"
)
def test_compiled_ahead_of_time_decode_reads_the_latent_of_encode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AOTInductor reads inputs in the strides of its example without a check: a latent that is not contiguous would be
    decoded as another one, without an error."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    tokenizer = tokenizer_of(tiny_config("model.trunk.depth=1", "model.decoder.depth=1"))
    assert tokenizer.decoder is not None
    tokenizer.decoder.proj_out.weight.mul_(100)  # untrained decoders hardly leave grey
    exported = {"encode": encode_program(tokenizer), "decode": decode_program(tokenizer.decoder)}
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "compile_threads": 1, "cpp.simdlen": 1}
    encode, decode = (
        torch._inductor.aoti_load_package(
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(tmp_path / f"{name}.pt2"), inductor_configs=quick
            )
        )
        for name, program in exported.items()
    )
    images = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    latent = encode(images)
    assert latent.is_contiguous()
    # Worst seen 2.4e-6 and 1.2e-4 (RoPE's bf16 rounds queries the other way, and the weights are a hundredfold); a
    # latent in other strides was off by 0.5 in the mean.
    torch.testing.assert_close(latent, tokenizer.encode(images), rtol=0, atol=2e-5)
    torch.testing.assert_close(decode(latent), tokenizer.decode(tokenizer.encode(images)), rtol=0, atol=2e-3)


@pytest.mark.L2
@pytest.mark.L1  # twenty seconds of one core: torch's exporter, not ours
def test_onnxruntime_gives_the_tokenizers_latents_and_pixels_at_every_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """bf16 RoPE and all: onnxruntime has no bf16 Sin, so the program computes in float32 and rounds to bf16."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install onnx onnxscript onnxruntime")
    import onnxruntime

    tokenizer, generator = tokenizer_of(tiny_config("model.trunk.depth=1")), torch.Generator().manual_seed(0)
    assert tokenizer.decoder is not None
    for part in (tokenizer.trunk, tokenizer.decoder):  # with its first values it hardly attends
        for matrix in (parameter for parameter in part.blocks.parameters() if parameter.ndim == 2):
            matrix.normal_(std=matrix.shape[1] ** -0.5, generator=generator)
    exporter = logging.getLogger("torch.onnx._internal.exporter._registration")
    exporter.addHandler(caplog.handler)
    write_onnx(tokenizer, tmp_path)
    exporter.removeHandler(caplog.handler)
    assert "torchvision" not in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conventions.json", "decode.onnx", "encode.onnx"]
    encode, decode = (onnxruntime.InferenceSession(tmp_path / f"{name}.onnx") for name in ("encode", "decode"))
    for shape in SIZES.values():
        images = torch.rand(shape, generator=generator)
        [latent] = encode.run(["latent"], {"images": images.numpy()})
        [pixels] = decode.run(["pixels"], {"latent": latent})
        expected = tokenizer.encode(images)
        # Worst seen 1.4e-6 and 2.7e-7. A query that another machine rounds the other way is off by some 1e-4; without
        # the rounding latents were off by 4e-2.
        torch.testing.assert_close(torch.from_numpy(latent), expected, rtol=0, atol=1e-3)
        expected = tokenizer.decode(torch.from_numpy(latent))
        torch.testing.assert_close(torch.from_numpy(pixels), expected, rtol=0, atol=1e-3)


@pytest.mark.L0
def test_missing_packages_and_other_dtypes_are_one_clear_error_of_the_onnx_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, run = tokenizer_of(tiny_config()), write_run(tmp_path / "run", tiny_config())
    monkeypatch.setattr("model.programs.ONNX_PACKAGES", ("torch", "no_such_package"))
    assert main(["programs", str(run), "--out", str(tmp_path / "out"), "--onnx"]) == 2
    assert "no_such_package not installed: torch needs them to write ONNX; pip install onnx" in capsys.readouterr().err
    monkeypatch.setattr("model.programs.ONNX_PACKAGES", ())
    with pytest.raises(UserError, match=r"torch.bfloat16, ONNX programs need float32: call tokenizer.float"):
        write_onnx(tokenizer.to(torch.bfloat16), tmp_path / "out")
    assert not (tmp_path / "out").exists()
