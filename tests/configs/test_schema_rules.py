"""Every rule between settings, each with a config that breaks it alone."""

from __future__ import annotations

import pytest

from configs import UserError
from tests.tiny import tiny_config

pytestmark = pytest.mark.L0

NO_SSL = ("batch.ssl=0", "objectives.ssl.weight=0")
NO_REC = ("batch.rec=0", "objectives.rec.weight=0")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("batch.ssl=18",),
            "batch: ssl=18 and rec=6 (nested) need 18 rows but clip=12: ssl and rec images are rows of the "
            "clip batch; lower batch.ssl or batch.rec, or raise batch.clip",
        ),
        (
            ("batch.rec=12", "batch.layout=disjoint"),
            "batch: ssl=6 and rec=12 (disjoint) need 18 rows but clip=12",
        ),
        (
            ("views.image_size=30",),
            "views.image_size=30 is not a multiple of model.patch_size=8: a crop holds whole patches; change "
            "views.image_size",
        ),
        (("views.global_size=36",), "views.global_size=36 is not a multiple of model.patch_size=8"),
        (("views.local_size=12",), "views.local_size=12 is not a multiple of model.patch_size=8"),
        (("views.local_scale=[0.5,0.2]",), "views.local_scale: [0.5, 0.2] is not a range [low, high]"),
        (("views.global_scale=[0,1]",), "views.global_scale.0=0: input should be greater than 0"),
        (
            ("views.image_scale=[0.5,1.5]",),
            "views.image_scale.1=1.5: input should be less than or equal to 1",
        ),
        (("views.blur_sigma=[2,1]",), "views.blur_sigma: [2.0, 1.0] is not a range [low, high]"),
        (("masks.ratio=[0.6,0.1]",), "masks.ratio: [0.6, 0.1] is not a range [low, high]"),
        (
            ("system.linear=fp8_torchao",),
            "system.linear=fp8_torchao but optim.precision=fp32: FP8 products take and give bf16; set "
            "optim.precision=bf16, or system.linear=bf16",
        ),
        (
            ("system.linear=fp8_te", "system.compile=on", "optim.precision=bf16"),
            "system: linear=fp8_te but compile=on: Transformer Engine's modules cannot be traced into a block's graph",
        ),
        (("views.hue=0.6",), "views.hue=0.6: input should be less than or equal to 0.5"),
        (
            ("batch.ssl=0",),
            "batch.ssl=0 but objectives.ssl.weight=1: an objective has both rows and weight or neither; set "
            "both or neither to 0",
        ),
        (("objectives.rec.weight=0",), "batch.rec=6 but objectives.rec.weight=0: an objective has both"),
        (
            ("batch.clip=16",),
            "batch.clip=16 is not a multiple of data.streams=6: every step takes the same number of rows "
            "from each stream; change batch.clip or data.streams",
        ),
        (("batch.ssl=4",), "batch.ssl=4 is not a multiple of data.streams=6"),
        (("batch.rec=4",), "batch.rec=4 is not a multiple of data.streams=6"),
        (
            (*NO_SSL, *NO_REC, "objectives.clip.weight=0"),
            "all three objective weights are 0: there is nothing to learn; set one of objectives.*.weight",
        ),
        (
            ("objectives.rec.perceptual=1",),
            "objectives.rec: perceptual=1 but lpips_weights is not set: the perceptual term is never dropped "
            "silently; give objectives.rec.lpips_weights=FILE, or switch it off with "
            "objectives.rec.perceptual=0",
        ),
        (
            ("objectives.rec.l1=0",),
            "objectives.rec: weight=0.5 but l1, l2 and perceptual are 0: the reconstruction is compared with nothing; "
            "set one of objectives.rec.l1, l2, perceptual",
        ),
        (
            (*NO_REC, "objectives.rec.noise.kind=additive"),
            "objectives.rec: noise.kind is set but weight=0: it changes what rec learns from; set objectives.rec."
            "weight and batch.rec, or remove objectives.rec.noise.kind",
        ),
        ((*NO_REC, "objectives.rec.mask=[0,0.5]"), "objectives.rec: mask is set but weight=0"),
        ((*NO_REC, "objectives.rec.kl=1", "model.latent=gaussian"), "objectives.rec: kl is set but weight=0"),
        (
            ("objectives.rec.noise.scale=2",),
            "objectives.rec.noise: scale=2 but kind=none: there is no noise to scale; set objectives.rec.noise.kind, "
            "or remove the scale",
        ),
        (
            ("objectives.rec.kl=1e-6",),
            "objectives.rec.kl=1e-06 but model.latent=deterministic: a point has no divergence; set model.latent="
            "gaussian, or remove objectives.rec.kl",
        ),
        (
            (*NO_REC, "model.latent=gaussian"),
            "model.latent=gaussian but objectives.rec.weight=0: only rec reads a variance",
        ),
        (("objectives.rec.mask=[0.5,0.1]",), "objectives.rec.mask: [0.5, 0.1] is not a range [low, high]"),
        (("objectives.rec.mask=[0.5,1]",), "objectives.rec.mask.1=1: input should be less than 1"),
        (("objectives.rec.noise.scale=0",), "objectives.rec.noise.scale=0: input should be greater than 0"),
        (
            ("model.trunk.heads=5",),
            "model.trunk: width=32 over heads=5: the head width must be a multiple of 4 (axial RoPE turns "
            "pairs on two axes); change width or heads",
        ),
        (("model.decoder.heads=16",), "model.decoder: width=32 over heads=16: the head width must be"),
        (("model.text.heads=5",), "model.text: width=32 over heads=5: heads share the width evenly"),
        (
            ("system.clip.micro_batches=5",),
            "system.clip.micro_batches=5 does not divide batch.clip=12: parts are equal",
        ),
        (
            ("system.clip.micro_batches=3",),
            "system.clip.micro_batches=3 cuts batch.clip=12 into parts of 4 rows, and the rec rows 0 to 5 lie in more "
            "than one: rec reads the features of one part; lower system.clip.micro_batches or batch.rec",
        ),
        (
            ("system.clip.micro_batches=2", "batch.layout=disjoint", "data.streams=2", "batch.ssl=4", "batch.rec=4"),
            "into parts of 6 rows, and the rec rows 4 to 7 lie in more than one",
        ),
        (
            ("system.clip.micro_batches=2", "model.trunk.drop_path=0.3"),
            "system.clip.micro_batches=2 but model.trunk.drop_path=0.3: each part would drop segments of its own",
        ),
        (
            ("data.caption=jpg",),
            "data.caption: 'jpg': a .jpg member holds an image or an array, and a caption is text; write the extension",
        ),
        (("data.caption=json",), "data.caption: 'json' names no field: a .json member holds a record; write json:KEY"),
        (("data.caption='json:'",), "data.caption: 'json:' names no field"),
        (
            ("data.caption=txt:en",),
            "data.caption: 'txt:en': only .json members have fields; write 'txt' or json:en",
        ),
        (
            ("data.caption=.TXT",),
            "data.caption: '.TXT' is not a member extension: those are in lower case, without a dot",
        ),
        (
            ("system.clip.micro_batches=2", "objectives.clip.weight=0"),
            "system.clip.micro_batches=2 but objectives.clip.weight=0: there is no clip batch to cut",
        ),
    ],
)
def test_a_broken_rule_says_what_was_found_the_rule_and_the_remedy(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_config(*overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        NO_SSL,
        NO_REC,
        (*NO_SSL, *NO_REC),
        ("objectives.clip.weight=0",),
        ("batch.layout=disjoint",),
        ("batch.clip=6",),
        ("objectives.rec.perceptual=1", "objectives.rec.lpips_weights=w.safetensors"),
        (*NO_REC, "objectives.rec.perceptual=1"),
        ("objectives.rec.l1=0", "objectives.rec.l2=1"),
        ("objectives.rec.noise.kind=additive", "objectives.rec.noise.scale=0.5", "objectives.rec.mask=[-0.1,0.7]"),
        ("model.latent=gaussian",),
        ("objectives.rec.mask=[0,0.5]", "model.trunk.drop_path=0.2"),
        ("model.latent=gaussian", "objectives.rec.kl=1e-6", "system.clip.micro_batches=2"),
        ("views.num_locals=0",),
        ("views.local_scale=[0.2,0.2]",),
        ("model.text.heads=16",),
        ("system.clip.micro_batches=2",),
        ("system.clip.micro_batches=2", "batch.layout=disjoint"),  # the rec rows are the second part
        ("system.clip.micro_batches=12", *NO_REC),
    ],
)
def test_what_keeps_the_rules_loads(overrides: tuple[str, ...]) -> None:
    tiny_config(*overrides)
