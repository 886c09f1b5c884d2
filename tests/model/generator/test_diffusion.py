"""The diffusion generator: its parts, its loss, and that it learns what it is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.generator import Diffusion
from engine.block_transforms import checkpoint_activations
from model.generator.blocks import ModulatedBlock
from model.generator.diffusion import DiffusionBackbone, grid_sinusoids
from model.generator.draws import RandomDraws, draw
from model.generator.factory import block_classes
from model.generator.sampling import Sampling
from model.generator.tokens import LatentShape
from tests.model.generator.tiny_generator import KINDS, NUM_CLASSES, SHAPE, alive, fresh, rows, section

pytestmark = pytest.mark.L0
VARIANTS = {
    **KINDS,
    "qk norm": {"qk_norm": True},
    "patch 2": {"patch": 2},
    "rope without learnt norms": {"norm": "layernorm"},
    "both positions": {"positions": "both"},
}


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    latents = torch.randn(count, SHAPE.channels, SHAPE.height, SHAPE.width, generator=random)
    return latents, torch.arange(count) % NUM_CLASSES


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_backbone_keeps_the_latents_shape_and_a_fresh_one_gives_zeros(variant: str) -> None:
    latents, labels = batch()
    backbone = fresh(section(**VARIANTS[variant])).backbone
    out = backbone(latents, torch.rand(6), labels)
    assert out.shape == (6, SHAPE.channels * (2 if variant == "dit" else 1), SHAPE.height, SHAPE.width)
    assert out.dtype == torch.float32
    assert not out.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    generator = alive(section(**VARIANTS[variant]))
    latents, labels = batch()
    generator(latents, labels, rows(generator.draw_counts))["total"].backward()
    still = [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_time_class_and_place_each_change_what_is_predicted(variant: str) -> None:
    backbone = alive(section(**VARIANTS[variant])).backbone
    latents, labels = batch()
    time = torch.full((6,), 0.3)
    out = backbone(latents, time, labels)
    assert not torch.allclose(out, backbone(latents, time + 0.3, labels))
    assert not torch.allclose(out, backbone(latents, time, (labels + 1) % NUM_CLASSES))
    assert not torch.allclose(out, backbone(latents, time, torch.full_like(labels, NUM_CLASSES)))
    turned = backbone(latents.flip(2), time, labels).flip(2)
    assert not torch.allclose(out, turned), "rows upside down would be predicted upside down: no positions"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rows_prediction_does_not_depend_on_the_other_rows(variant: str) -> None:
    backbone = alive(section(**VARIANTS[variant])).backbone
    latents, labels = batch()
    time = torch.rand(6)
    alone = [backbone(latents[i : i + 1], time[i : i + 1], labels[i : i + 1]) for i in range(6)]
    # Products of other sizes round otherwise: 9e-7 at most.
    torch.testing.assert_close(backbone(latents, time, labels), torch.cat(alone), atol=5e-6, rtol=1e-5)


def test_patches_are_taken_apart_and_put_together_at_their_places() -> None:
    """With linear maps that copy, and blocks that do nothing, the output is the input, here tokens of 2 x 2."""
    shape = LatentShape(1, 4, 6)
    plain = section(width=4, heads=1, patch=2, norm="layernorm", positions="sincos")
    backbone = fresh(plain, shape).backbone
    backbone.embed.linear.weight.data = torch.eye(4)
    backbone.final.linear.weight.data = torch.eye(4)
    backbone.final.norm = nn.Identity()
    latents = torch.arange(24.0).view(1, 1, 4, 6)
    out = backbone(latents, torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    added_N22 = grid_sinusoids((2, 3), 4).view(6, 2, 2)
    for row, column in np.ndindex(4, 6):
        token = row // 2 * 3 + column // 2
        expected = latents[0, 0, row, column] + added_N22[token, row % 2, column % 2]
        assert out[0, 0, row, column] == expected, (row, column)


def test_a_block_is_the_published_formula() -> None:
    """Sample by sample and head by head, with GELU and without RoPE, as the paper's figure 3 draws it."""
    generator = alive(section(**KINDS["dit"]))
    block, heads = generator.backbone.blocks[0], generator.section.heads
    x_BND, condition_BD = torch.randn(3, 5, 16), torch.randn(3, 16)
    found = block(x_BND.flatten(0, 1), condition_BD, None).unflatten(0, (3, 5))
    for x, condition, own in zip(x_BND, condition_BD, found, strict=True):
        numbers = block.modulation.weight @ nn.functional.silu(condition) + block.modulation.bias
        shift1, scale1, gate1, shift2, scale2, gate2 = numbers.split(16)
        q, k, v = (
            (nn.functional.layer_norm(x, (16,), eps=1e-6) * (1 + scale1) + shift1)
            .matmul(block.attn.qkv.weight.T)
            .add(block.attn.qkv.bias)
            .split(16, dim=1)
        )
        parts = []
        for head in range(heads):
            at = slice(head * 16 // heads, (head + 1) * 16 // heads)
            scores = q[:, at] @ k[:, at].T / (16 / heads) ** 0.5
            parts.append(scores.softmax(1) @ v[:, at])
        x = x + gate1 * block.attn.proj(torch.cat(parts, dim=1))
        x = x + gate2 * block.mlp(nn.functional.layer_norm(x, (16,), eps=1e-6) * (1 + scale2) + shift2)
        torch.testing.assert_close(own, x, atol=1e-5, rtol=1e-5)  # measured 5e-7


def test_fixed_positions_tell_rows_from_columns() -> None:
    waves = grid_sinusoids((3, 4), 8)
    assert waves.shape == (12, 8)
    assert len(waves.unique(dim=0)) == 12
    torch.testing.assert_close(waves[0], torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0]))  # cos 0, sin 0 of both axes
    torch.testing.assert_close(waves[4, 4:], waves[0, 4:])  # the next row's first: its column's half is the same


def test_positions_are_turned_added_or_both() -> None:
    latents, _ = batch()
    tokens, turns = zip(
        *(fresh(section(positions=kind)).backbone._tokens(latents) for kind in ("rope", "sincos", "both")), strict=True
    )
    assert turns[1] is None
    assert torch.equal(turns[2], turns[0])
    assert torch.equal(tokens[2], tokens[1])
    torch.testing.assert_close(tokens[1] - tokens[0], grid_sinusoids((4, 2), 16).repeat(6, 1))


def test_the_time_is_scaled_alike_in_training_and_in_sampling() -> None:
    """What 1000 does to a model that multiplies by 1, a model that multiplies by 1000 does by itself."""
    times: list[Tensor] = []
    for scale in (1.0, 1000.0):
        generator = fresh(section(time_scale=scale))
        generator.backbone.time.register_forward_pre_hook(lambda _, given: times.append(given[0]))
        latents, labels = batch()
        generator(latents, labels, rows(generator.draw_counts))
        generator.sample(labels, Sampling("euler", steps=2), rows(generator.draw_counts))
    torch.testing.assert_close(torch.stack(times[3:]), 1000 * torch.stack(times[:3]))
    assert times[5].tolist() == [500.0] * 6


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_a_function_of_its_arguments_and_a_mean_over_rows(kind: str) -> None:
    generator = alive(section(**KINDS[kind]))
    latents, labels = batch()
    draws = rows(generator.draw_counts)
    whole = generator(latents, labels, draws)
    assert torch.equal(generator(latents, labels, draws)["total"], whole["total"])
    halves = [
        generator(latents[own], labels[own], RandomDraws(draws.normal_BN[own], draws.uniform_BU[own]))
        for own in (slice(0, 6, 2), slice(1, 6, 2))
    ]
    for name, term in whole.items():
        torch.testing.assert_close(term, (halves[0][name] + halves[1][name]) / 2)


def test_classes_are_hidden_as_often_as_asked() -> None:
    """3,000 rows: 0.1 and 0.9 within four standard errors; and none where the share is 0."""
    for share in (0.0, 0.1, 0.9):
        generator = fresh(section(class_dropout=share), LatentShape(1, 1, 1))
        seen: list[Tensor] = []
        generator.backbone.label.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        labels = torch.arange(3_000) % NUM_CLASSES
        generator(torch.zeros(3_000, 1, 1, 1), labels, rows(generator.draw_counts, 3_000))
        hidden = seen[0] == NUM_CLASSES
        assert abs(hidden.float().mean() - share) <= 4 * (share * (1 - share) / 3_000) ** 0.5
        assert torch.equal(seen[0][~hidden], labels[~hidden])


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_used_only_while_their_module_runs(kind: str) -> None:
    """As under ZeRO-3: outside of the forward of its owner, or of the block it is in, a parameter is empty."""
    generator = alive(section(**KINDS[kind]))
    latents, labels = batch()
    draws = rows(generator.draw_counts)
    with torch.no_grad():
        expected = generator(latents, labels, draws)["total"]
        _partition(generator)
        assert not any(p.numel() for p in generator.parameters())
        assert torch.equal(generator(latents, labels, draws)["total"], expected)


def _partition(generator: nn.Module) -> None:
    units = [m for m in generator.modules() if isinstance(m, ModulatedBlock)]
    inside = {m for unit in units for m in unit.modules()}
    units += [m for m in generator.modules() if m not in inside and list(m.parameters(recurse=False))]
    for unit in units:
        whole = {p: p.data for p in unit.parameters(recurse=isinstance(unit, ModulatedBlock))}

        def gather(*_: object, whole: dict[nn.Parameter, Tensor] = whole) -> None:
            for parameter, data in whole.items():
                parameter.data = data

        def release(*_: object, whole: dict[nn.Parameter, Tensor] = whole) -> None:
            for parameter, data in whole.items():
                parameter.data = data.new_empty(0)

        unit.register_forward_pre_hook(gather)
        unit.register_forward_hook(release)
        release()


def test_what_enters_a_block_requires_a_gradient_and_each_block_runs_once() -> None:
    generator = fresh(section())
    entered: list[bool] = []
    for block in generator.backbone.blocks:
        block.register_forward_pre_hook(lambda _, given: entered.append(given[0].requires_grad))
    latents, labels = batch()
    generator(latents, labels, rows(generator.draw_counts))
    assert entered == [True, True]
    assert block_classes(generator) == [ModulatedBlock]
    assert all(parameter.ndim > 0 for parameter in generator.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks, and ignores it itself
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_one_graph_for_all_blocks_and_steps(kind: str) -> None:
    generator = alive(section(**KINDS[kind]))
    latents, labels = batch()
    expected = [generator(latents, labels, rows(generator.draw_counts, step=step))["total"].item() for step in range(2)]
    torch._dynamo.reset()
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    for block in generator.backbone.blocks:
        block.forward = torch.compile(block.forward, backend=count, fullgraph=True, dynamic=False)
    found = [generator(latents, labels, rows(generator.draw_counts, step=step))["total"].item() for step in range(2)]
    assert found == expected
    assert len(graphs) == 1


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_computing_blocks_again_changes_no_gradient(mode: str) -> None:
    latents, labels = batch()
    gradients = []
    for wanted in ("off", mode):
        generator = alive(section())
        checkpoint_activations(generator, wanted, (ModulatedBlock,))
        generator(latents, labels, rows(generator.draw_counts))["total"].backward()
        gradients.append([parameter.grad for parameter in generator.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_model_in_half_precision_gives_a_float32_loss_near_the_whole_ones() -> None:
    latents, labels = batch()
    whole = alive(section())
    half = alive(section()).bfloat16()
    draws = rows(whole.draw_counts)
    expected, found = (generator(latents, labels, draws)["total"] for generator in (whole, half))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)  # measured 0.2 %


MIXTURE = LatentShape(2, 2, 2)  # two classes: every number of a latent is +1, or -1, within 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_learnt_and_samples_land_near_their_classes_modes(kind: str) -> None:
    """Measured after 100 steps: half of 64 samples within 0.13, 0.16, 0.09 of their mode, the furthest at 0.37, 0.42,
    0.40. (DDIM at so short a training would throw three of them to 10: from pure noise any error grows 157-fold.)"""
    generator = fresh(section(width=32, depth=1, heads=2, **KINDS[kind]), MIXTURE, num_classes=2)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=6e-3, weight_decay=0.0)
    losses = []
    for step in range(100):
        positions = np.arange(step * 64, (step + 1) * 64)
        labels = torch.from_numpy(positions % 2)
        spread = draw(generator.draw_counts, seed=99, step=step, positions=positions).normal_BN.view(64, 2, 2, 2)
        loss = generator(modes(labels) + 0.1 * spread, labels, draw(generator.draw_counts, 0, step, positions))["total"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.3 * losses[0]
    labels, how = torch.arange(64) % 2, Sampling("ancestral" if kind == "dit" else "heun", steps=40)
    samples = generator.sample(labels, how, rows(generator.sampling_draw_counts(how), 64))
    away = (samples - modes(labels)).abs().mean(dim=(1, 2, 3))
    assert away.median() < 0.3
    assert away.max() < 0.8


def modes(labels: Tensor) -> Tensor:
    """Where the latents of each class are."""
    return (1 - 2 * labels).view(-1, 1, 1, 1)


def test_shapes_that_patches_do_not_fill_are_refused() -> None:
    with pytest.raises(ValueError, match=r"generator.patch=2 does not divide latents of 3x4"):
        DiffusionBackbone(Diffusion(width=16, depth=1, heads=2, patch=2), LatentShape(3, 3, 4), 5, "sdpa")
