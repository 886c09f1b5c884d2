"""The last MLP computes what is read and nothing else, and that changes no value and no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from configs import Config
from model.initialise import initialise
from model.outputs import Outputs
from model.packing import RankBatchSizes, TokenSubset
from model.pretrainer import Pretrainer
from model.trunk import Trunk
from tests.tiny import model_inputs, random_batch, tiny_config

pytestmark = pytest.mark.L0
KINDS = {
    "all": (),
    "mean patch": ("model.image_feature=patch_mean",),
    "no clip": ("objectives.clip.weight=0",),
    "no ssl": ("objectives.ssl.weight=0", "batch.ssl=0"),
    "no rec": ("objectives.rec.weight=0", "batch.rec=0"),
    "heads on latents": ("model.bottleneck_ae_only=false",),
    "disjoint": ("batch.layout=disjoint",),
}


class Full(Trunk):
    """Finishes every token."""

    def forward(self, crops: dict[str, Tensor], masks: dict[str, Tensor], **_: Any) -> Tensor:
        return super().forward(crops, masks)


class Poisoned(Trunk):
    """Finishes what is read, and puts 1000 into the rest: not nan, which a gradient of 0 would keep."""

    def forward(self, *inputs: Any, read_tokens: TokenSubset, **others: Any) -> Tensor:
        idx_N = read_tokens.idx_N[: read_tokens.used]
        assert len(idx_N.unique()) == read_tokens.used, "a token named twice would be added twice"
        x_TD = super().forward(*inputs, read_tokens=read_tokens, **others)
        return torch.full_like(x_TD, 1000).index_copy(0, idx_N, x_TD[idx_N])


def learn(config: Config, kind: type[Trunk]) -> tuple[list[Tensor], list[Tensor]]:
    """Every output, and every gradient of a sum that weighs each of their numbers differently."""
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1))
    initialise(model, config)
    model.trunk.__class__ = kind
    if model.teacher is not None:
        model.teacher.trunk.__class__ = kind
    return evaluate(model, model(**model_inputs(random_batch(config, step=0))))


def evaluate(model: Pretrainer, outputs: Outputs) -> tuple[list[Tensor], list[Tensor]]:
    parts = [part for part in (outputs.clip, outputs.ssl, outputs.rec) if part is not None]
    values = [value for part in parts for value in vars(part).values() if value is not None]
    weighed = [(v.float() * torch.linspace(1, 2, v.numel()).view_as(v)).sum() for v in values if v.requires_grad]
    torch.stack(weighed).sum().backward()
    return values, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_and_what_it_teaches_do_not_depend_on_the_rest(kind: str) -> None:
    config = tiny_config("model.rope_dtype=fp32", *KINDS[kind])
    expected, expected_grads = learn(config, Full)
    values, grads = learn(config, Poisoned)
    for ours, theirs in zip(values, expected, strict=True):
        # float32: a product over fewer rows may sum in another order. Without its MLP a token is off by 0.01.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1e-6)


def test_few_tokens_pass_the_last_mlp() -> None:
    config = tiny_config()
    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1))
    initialise(model, config)
    seen: list[int] = []
    for block in model.trunk.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model(**model_inputs(random_batch(config, step=0)))
    # All: 24 crops of 17 tokens and 12 of 5. Read: 12 CLS of clip, 6 x 16 patches of rec, 24 CLS and 24 hidden patches
    # of ssl. Both in sixteens.
    assert seen == [480, 160]
