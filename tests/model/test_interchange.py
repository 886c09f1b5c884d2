"""Our weights to the public layout and back, on the command line: exact, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs import fingerprint
from model.interchange import main
from model.public_config import model_from_config, public_config
from model.public_layout import from_public, to_public
from model.tokenizer import VisualTokenizer
from model.weights import WeightsOrigin, read_origin, read_weights
from tests.model.tiny_weights import NO_REC, build, write_run
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0


def test_a_run_exports_to_the_public_layout_and_comes_back_the_same(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_config())
    assert main(["export", str(run), "--out", str(tmp_path / "public")]) == 0
    assert main(["import", str(tmp_path / "public"), "--out", str(tmp_path / "back.safetensors")]) == 0
    ours, _ = read_weights(run / "weights.safetensors")
    back, _ = read_weights(tmp_path / "back.safetensors")
    kept = {name for name in ours if name.split(".")[0] not in ("teacher", "prototypes")}
    assert back.keys() == kept
    assert all(torch.equal(back[name], ours[name]) for name in kept)
    images = torch.rand(1, 3, 32, 32)
    latents = [
        VisualTokenizer.from_run(run).encode(images),
        VisualTokenizer.from_file(tmp_path / "back.safetensors").encode(images),
    ]
    assert torch.equal(*latents)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.registers=2",), "model.registers=2"),
        (("model.clip_width=16",), "model.clip_width=16"),
        (("model.rope_dtype=fp32",), "model.rope_dtype=fp32 has no place in the public layout, only bf16"),
        (("model.latent_channels=32",), "model.latent_channels=32 is the trunk's width"),
        (("model.trunk.layer_scale=0.0",), "model.trunk.layer_scale=0.0 has no place"),
        (("model.trunk.mlp_ratio=7.171875",), "hidden channels=160 has no place in the public layout, only 152"),
        (NO_REC, "no bottleneck"),
    ],
)
def test_what_the_public_layout_cannot_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], message: str
) -> None:
    run = write_run(tmp_path / "run", tiny_config(*overrides))
    assert main(["export", str(run), "--out", str(tmp_path / "public")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "model.interchange programs" in error or "train with objectives.rec on" in error, "a way out"
    assert not (tmp_path / "public").exists()


@pytest.mark.parametrize(
    ("old", "changed", "message"),
    [
        ('"text_pool_type": "argmax"', '"text_pool_type": "last"', "text_pool_type='last'"),
        ('"vision_depth": 2', '"vision_depth": 3', "trunk.blocks.2.norm1.weight: found nothing"),
        ('"vision_depth": 2', '"vision_depth": 1', "tensors are not of the VTP layout"),
        (
            '"vision_patch_size": 8',
            '"vision_patch_size": 4',
            "trunk.patch_embed.proj.weight: found shape (32, 3, 8, 8)",
        ),
        (
            '"vision_num_heads": 2',
            '"vision_num_heads": 4',
            "another RoPE, which would change the latents of these weights",
        ),
        ('"text_depth": 1,', "", "no text_depth: every key of the public layout must be there"),
        ('"text_quick_gelu": false', '"text_quick_gelu": true', "such a model run in the public VTP code, not here"),
        ('"vision_ffn_layer": "swiglu"', '"vision_ffn_layer": "mlp"', "vision_ffn_layer='mlp': only 'swiglu' can be"),
        (
            '"vision_ffn_layer": "swiglu"',
            '"vision_ffn_layer": "swiglu64"',
            "'swiglu64' with 128 hidden channels, ours has",
        ),
        ('"vision_norm_layer": "rmsnorm"', '"vision_norm_layer": "layernormbf16"', "norm 'layernormbf16'"),
        (
            '"nonscalar_logit_scale": false',
            '"nonscalar_logit_scale": "no"',
            "nonscalar_logit_scale='no': it must be true",
        ),
        ('"nonscalar_logit_scale": false', '"nonscalar_logit_scale": true', "logit_scale: found shape ()"),
        ('"init_logit_bias": null', '"init_logit_bias": -10.0', "logit_bias: found nothing"),
        ('"model_type": "vtp"', '"model_type": "llama"', "model_type='llama': it describes no VTP tokenizer"),
        (
            '"text_depth": 1,',
            '"text_depth": 1, "text_rope": true,',
            "text_rope=True, which the VTP layout does not know",
        ),
        ('"vision_depth": 2', '"vision_depth": "deep"', "no model of ours: depth 'deep'"),
        ("{\n", "", "is not JSON"),
    ],
)
def test_a_public_directory_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, changed: str, message: str
) -> None:
    run = write_run(tmp_path / "run", tiny_config())
    main(["export", str(run), "--out", str(tmp_path / "public")])
    described = (tmp_path / "public" / "config.json").read_text()
    assert old in described
    (tmp_path / "public" / "config.json").write_text(described.replace(old, changed, 1))
    assert main(["import", str(tmp_path / "public"), "--out", str(tmp_path / "back.safetensors")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "back.safetensors").exists()


# Every argument of the official VTPConfig with its default; saves of the class write all of them.
OFFICIAL = {
    "image_size": 256, "train_clip": True, "train_reconstruction": True, "vision_patch_size": 16,
    "vision_embed_dim": 768, "vision_depth": 12, "vision_num_heads": 12, "vision_mlp_ratio": 4.0,
    "vision_ffn_layer": "swiglu", "vision_norm_layer": "rmsnorm", "vision_init_values": None,
    "vision_use_qk_norm": False, "vision_feature_bottleneck": 64, "vision_bottleneck_ae_only": True,
    "vision_clip_feat": "cls", "text_context_length": 77, "text_vocab_size": 49408, "text_embed_dim": 768,
    "text_num_heads": 12, "text_depth": 12, "text_mlp_ratio": 4.0, "text_ls_init_value": None,
    "text_embed_cls": False, "text_pad_id": 0, "text_no_causal_mask": False, "text_pool_type": "argmax",
    "text_proj_type": "linear", "text_proj_bias": False, "text_output_tokens": False, "text_quick_gelu": False,
    "decoder_embed_dim": 768, "decoder_num_heads": 12, "decoder_depth": 12, "decoder_ffn_layer": "swiglu",
    "decoder_norm_layer": "layernorm", "decoder_init_values": None, "decoder_use_qk_norm": False,
    "init_logit_scale": None, "init_logit_bias": None, "nonscalar_logit_scale": False,
}  # fmt: skip


def test_a_config_that_the_official_class_saved_is_read_key_by_key() -> None:
    model = model_from_config(OFFICIAL)
    parts = frozenset(("trunk", "bottleneck", "decoder", "text", "clip"))
    assert public_config(model, parts, has_bias=False, image_size=256) == {"model_type": "vtp", **OFFICIAL}
    assert (
        model_from_config(OFFICIAL | {"vision_init_values": 0, "text_pad_id": 7, "text_output_tokens": True}) == model
    )
    assert model_from_config(OFFICIAL | {"vision_ffn_layer": "swiglu64", "decoder_ffn_layer": "swiglu128"}) == model


@pytest.mark.parametrize(
    "added",
    [
        {"transformers_version": "4.50", "torch_dtype": "float32"},
        {"_attn_implementation_autoset": True, "architectures": ["VTPModel"], "use_cache": False},
        {"init_logit_scale": 2.6593, "text_pad_id": 5},
    ],
)
def test_keys_that_hugging_face_adds_and_keys_without_effect_are_accepted(
    tmp_path: Path, added: dict[str, object]
) -> None:
    main(["export", str(write_run(tmp_path / "run", tiny_config())), "--out", str(tmp_path / "public")])
    path = tmp_path / "public" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | added))
    assert main(["import", str(tmp_path / "public"), "--out", str(tmp_path / "back.safetensors")]) == 0


def test_a_logit_scale_of_shape_1_is_read_as_one_of_shape_0(tmp_path: Path) -> None:
    """nonscalar_logit_scale: the official class keeps scale and bias in the shape (1,) then."""
    config = tiny_config("objectives.clip.kind=sigmoid")
    state = build(config).state_dict()
    public, described = to_public(state, config.model, image_size=32)
    assert public["logit_scale"].shape == public["logit_bias"].shape == ()
    one = {name: public[name].reshape(1) for name in ("logit_scale", "logit_bias")}
    for tensors, keys in ((public, {}), (public | one, {"nonscalar_logit_scale": True})):
        back, _ = from_public(tensors, described | keys)
        for name in ("clip.logit_scale", "clip.logit_bias"):
            assert torch.equal(back[name], state[name])


def test_an_older_export_without_the_key_is_read_as_the_official_class_reads_it() -> None:
    config = tiny_config()
    state = build(config).state_dict()
    public, described = to_public(state, config.model, image_size=32)
    del described["nonscalar_logit_scale"]
    assert torch.equal(from_public(public, described)[0]["clip.logit_scale"], state["clip.logit_scale"])


@pytest.mark.parametrize(("patch", "announced"), [(8, False), (16, True)])
def test_a_decoder_that_the_official_class_cannot_build_is_exported_with_train_reconstruction_false(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], patch: int, announced: bool
) -> None:
    """It builds decoders for patches of 16 pixels whatever config.json says. With train_reconstruction=true the
    directory would not load there at all; with false the decoder's tensors are unused."""
    run = write_run(tmp_path / "run", tiny_config(f"model.patch_size={patch}"))
    assert main(["export", str(run), "--out", str(tmp_path / "public")]) == 0
    assert (
        "note: the official VTP class builds decoders only for patches of 16" in capsys.readouterr().err
    ) != announced
    described = json.loads((tmp_path / "public" / "config.json").read_text())
    assert described["train_reconstruction"] == announced
    assert ("train_reconstruction=false" in (tmp_path / "public" / "README.md").read_text()) != announced
    ours, back = VisualTokenizer.from_run(run), VisualTokenizer.from_pretrained(tmp_path / "public")
    latent = ours.encode(torch.rand(1, 3, 32, 32))
    assert torch.equal(back.decode(latent), ours.decode(latent))


@pytest.mark.parametrize("size", ["large", 0, True, [256, 256]])
def test_an_image_size_that_is_not_a_positive_integer_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: object
) -> None:
    """For directories that public code wrote; ours have it in the metadata of the weights too."""
    config = tiny_config()
    public, described = to_public(build(config).state_dict(), config.model, image_size=32)
    save_file({name: tensor.contiguous() for name, tensor in public.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(described | {"image_size": size}))
    assert main(["import", str(tmp_path), "--out", str(tmp_path / "back.safetensors")]) == 2
    assert f"config.json has image_size={size!r}: it must be the side" in capsys.readouterr().err


def test_what_is_known_of_the_weights_travels_along(tmp_path: Path) -> None:
    config = tiny_config("name=travels")
    run = write_run(tmp_path / "run", config)
    main(["export", str(run), "--out", str(tmp_path / "public")])
    main(["import", str(tmp_path / "public"), "--out", str(tmp_path / "back.safetensors")])
    found = read_origin(tmp_path / "back.safetensors")
    assert found == WeightsOrigin(image_size=32, name="travels", steps=None, fingerprint=fingerprint(config))
    assert json.loads((tmp_path / "public" / "config.json").read_text())["image_size"] == 32


def test_a_public_file_that_is_cut_off_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(write_run(tmp_path / "run", tiny_config())), "--out", str(tmp_path / "public")])
    weights = tmp_path / "public" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["import", str(tmp_path / "public"), "--out", str(tmp_path / "back.safetensors")]) == 2
    assert "model.safetensors is cut off or no safetensors file" in capsys.readouterr().err


def test_an_out_of_the_other_kind_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", tiny_config())
    assert main(["export", str(run), "--out", str(tmp_path / "public")]) == 0
    capsys.readouterr()
    for asked, kind in (
        (["export", run, "--out", run / "weights.safetensors"], "a file"),
        (["programs", run, "--out", run / "weights.safetensors"], "a file"),
        (["import", tmp_path / "public", "--out", tmp_path], "a directory"),
        (["import", tmp_path / "public", "--out", run / "weights.safetensors" / "x"], "File exists"),
    ):
        assert main([str(argument) for argument in asked]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert kind in line


def test_missing_files_are_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "public")]) == 2
    assert main(["import", str(tmp_path / "nowhere"), "--out", str(tmp_path / "back")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("nowhere" in error for error in errors)
