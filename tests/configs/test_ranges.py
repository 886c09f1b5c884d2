"""Every number has its range, and what the ranges admit can be built and trained: settings drawn at their edges.

A config at the edges of its ranges either takes a step whose loss, gradient and weights are finite, or is refused in
one line. What is too large for a test is built without memory.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import annotated_types
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from configs import Config, DecoderGan, RunConfig, UserError, load_run
from configs.generator import GeneratorConfig
from configs.load import RUN_KINDS
from configs.section import Section
from data.augment import Renderer, round_windows, view_names
from data.augment import draw_view as draw_view
from data.hashing import hash_words
from data.masking import MaskSampler
from engine.random_draws import drop_path_draws, rec_noise_draws
from engine.schedule import learning_rate, teacher_momentum, teacher_temperature
from model.generator.draws import draw
from model.generator.factory import build_generator
from model.generator.tokens import LatentShape
from model.initialise import initialise
from model.initialise import initialise_generator as initialise_generator
from model.losses.comm import Solo
from model.losses.gan import PatchGan
from model.losses.total import TeacherCentres, compute_losses
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer
from tests.tiny import CONV, TINY, corruption, model_inputs, random_batch, tiny_config

pytestmark = pytest.mark.L0
CONFIGS = TINY.parents[1] / "configs"
MOST_PARAMETERS, MOST_PIXELS, MOST_LAYERS = 1_000_000, 1_000_000, 8  # of a step that a test takes
ALIGN = "objectives.rec.align={weights: none, encoder: {width: 32, depth: 1, heads: 2}}"
HEAD = "generator.head={width: 16, depth: 1, repeats: 1}"
# A run of each kind in which nearly every number has an effect: (file, overrides, sections of the schema it lacks).
BASES: dict[str, tuple[Path, tuple[str, ...]]] = {
    "vtp": (TINY, ("model.trunk.qk_norm=true", "health.spike=rollback", "profile.steps=0:1")),
    "ldetok": (
        TINY,
        ("model.latent=gaussian", "objectives.rec.noise.kind=additive", "objectives.rec.mask=[-0.1,0.5]", "ema=0.9",
         "objectives.ssl.targets=centering", "objectives.clip.kind=sigmoid", "model.trunk.drop_path=0.4"),
    ),
    "conv": (TINY, CONV),
    "stage 2": (
        CONFIGS / "decoder_gan_demo.yaml",
        ("data.train=a.tar", "tokenizer.weights=w", "discriminator.width=8", "batch.images=8", "data.streams=2",
         "views.image_size=64"),
    ),
    "diffusion": (
        CONFIGS / "generator_demo.yaml",
        ("generator.width=16", "generator.depth=1", "generator.heads=2", "batch.samples=2"),
    ),
    "autoregressive": (
        CONFIGS / "mar_b.yaml",
        ("latents.train=l", "generator.width=16", "generator.depth=2", "generator.heads=2", "generator.buffer=2", HEAD,
         "batch.samples=2"),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Range:
    """A number of the schema: its type and the least and greatest value that its rule admits; None: no such rule."""

    kind: type
    least: float | None
    greatest: float | None

    @property
    def edges(self) -> list[Any]:
        """Values at both ends, right inside and right outside; and what is no number of this kind."""
        assert self.least is not None
        assert self.greatest is not None
        ends = (self.least, self.greatest)
        beside = [math.nextafter(end, way) for end, way in zip(ends, (-math.inf, math.inf), strict=True)]
        if self.kind is int:
            beside = [self.least - 1, self.least + 1, self.greatest + 1, 10**30]
        return [*ends, *beside, "true", ".nan", "-1", "1e999", "'1'"]


def numbers(annotation: Any, rules: tuple[Any, ...] = ()) -> Iterator[Range]:
    """The numbers in an annotation: one, or as many as its tuple has."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *outer = typing.get_args(annotation)
        found = [rule for item in outer for rule in getattr(item, "metadata", [item])]
        yield from numbers(inner, (*rules, *found))
    elif annotation in (int, float):
        least, greatest = None, None
        step = 1 if annotation is int else None
        for rule in rules:
            if isinstance(rule, annotated_types.Ge):
                least = rule.ge
            elif isinstance(rule, annotated_types.Gt):
                least = rule.gt + step if step else math.nextafter(rule.gt, math.inf)  # type: ignore[operator,arg-type]
            elif isinstance(rule, annotated_types.Le):
                greatest = rule.le
            elif isinstance(rule, annotated_types.Lt):
                greatest = rule.lt - step if step else math.nextafter(rule.lt, -math.inf)  # type: ignore[operator,arg-type]
        yield Range(annotation, least, greatest)  # type: ignore[arg-type]
    else:
        for part in (part for part in typing.get_args(annotation) if part is not Ellipsis):
            yield from numbers(part)


def settings_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, list[Range], bool]]:
    """(dotted key, its numbers, whether they are a list) for every setting that is a number or a list of them."""
    for name, field in section.model_fields.items():
        if found := list(numbers(field.annotation, tuple(field.metadata))):
            yield prefix + name, found, "tuple" in str(field.annotation)
        for part in _sections(field.annotation):
            yield from settings_of(part, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _sections(part)


@pytest.mark.parametrize("kind", RUN_KINDS)
def test_every_number_has_a_least_and_a_greatest_value(kind: str) -> None:
    found = list(settings_of(RUN_KINDS[kind]))
    assert len(found) > 50
    assert [key for key, ranges, _ in found if any(None in (r.least, r.greatest) for r in ranges)] == []


@st.composite
def runs(data: st.DrawFn) -> tuple[Path, list[str]]:
    """A base, and one to three of its numbers at an edge."""
    path, overrides = BASES[data(st.sampled_from(sorted(BASES)))]
    run = load_run(path, overrides)
    there = [(key, ranges, is_list) for key, ranges, is_list in settings_of(type(run)) if _has(run, key)]
    changed = []
    for _ in range(data(st.integers(1, 3))):
        key, ranges, is_list = data(st.sampled_from(there))
        values = [str(data(st.sampled_from(of.edges))) for of in ranges]
        changed.append(f"{key}=[{','.join(values)}]" if is_list else f"{key}={values[0]}")
    return path, [*overrides, *changed]


def _has(run: RunConfig, key: str) -> bool:
    """Whether the run has the section that the key is in."""
    *sections, leaf = key.split(".")
    part: Any = run
    for name in sections:
        part = getattr(part, name, None)
    return leaf in type(part).model_fields if isinstance(part, Section) else False


@settings(max_examples=150, deadline=None, derandomize=True)
@given(runs())
def test_a_config_at_its_edges_takes_a_step_or_is_refused_in_one_line(run: tuple[Path, list[str]]) -> None:
    path, overrides = run
    refusal = ""
    try:
        take_a_step(load_run(path, overrides))
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal


def take_a_step(config: RunConfig) -> None:
    """Builds what the run trains, and where that is small takes a step of it: loss, gradient and weights are finite."""
    for step in (0, config.optim.steps // 2, config.optim.steps - 1):
        assert 0 <= learning_rate(step, config) < math.inf
    if isinstance(config, Config):
        _pretrain(config)
    elif isinstance(config, DecoderGan):
        _discriminate(config)
    elif isinstance(config, GeneratorConfig):
        _generate(config)


def _built(make: Any, num_pixels: int, num_layers: int) -> Any:
    """The module, or None where it is too large; then it has been built without memory, unless it is deep too."""
    if num_layers > MOST_LAYERS:
        return None  # a thousand blocks take seconds
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in make().parameters())
    return make() if size <= MOST_PARAMETERS and num_pixels <= MOST_PIXELS else None


def _learn(model: nn.Module, loss: Tensor, config: RunConfig) -> None:
    loss.backward()
    optim = config.optim
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rules = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    optimizer = torch.optim.AdamW(learning, learning_rate(0, config), **rules)  # type: ignore[arg-type]
    torch.nn.utils.clip_grad_norm_(learning, optim.clip_norm, error_if_nonfinite=True)
    optimizer.step()
    assert math.isfinite(loss.item())
    assert all(bool(parameter.isfinite().all()) for parameter in learning)


def _pretrain(config: Config) -> None:
    views, rows = config.views, RankBatchSizes.per_rank(config, 1)
    for step in (0, config.optim.steps - 1):
        assert 0 <= teacher_momentum(step, config) <= 1
        assert teacher_temperature(step, config) > 0
    images = config.batch.clip * views.image_size**2
    crops = config.batch.ssl * (2 * views.global_size**2 + views.num_locals * views.local_size**2)
    vit, text = config.model, config.model.text
    layers = text.depth + (len(vit.conv.multipliers) * vit.conv.num_res_blocks if vit.conv else vit.trunk.depth)
    layers += 0 if vit.conv else vit.decoder.depth
    size = max(images + crops, config.batch.clip * text.context * 100)
    model = _built(partial(Pretrainer, config, rows), size, layers)
    if model is None:
        return
    _render(config)
    initialise(model, config)
    batch = random_batch(config, step=0)
    if config.batch.ssl:
        grid = views.global_size // config.model.patch_size
        masks, masked = MaskSampler(config.masks, config.seed, grid, config.batch.ssl, config.data.streams).masks(0)
        batch = dataclasses.replace(batch, masks=torch.from_numpy(masks), masked_idx=torch.from_numpy(masked))
    draws, noise = drop_path_draws(config, 0, 1), rec_noise_draws(config, 0, 1)
    kept = draws.draw(0, noise.hidden(0) if noise else 0) if draws else None
    outputs = model(**model_inputs(batch), rec_noise=corruption(config, 0), kept_idx=kept)
    is_centred = config.objectives.ssl.targets == "centering"
    centres = TeacherCentres.zeros(config.model.prototypes.num, torch.device("cpu")) if is_centred else None
    temp = teacher_temperature(0, config)
    _learn(model, compute_losses(outputs, config.objectives, temp, Solo(), centres).total, config)


def _render(config: Config) -> None:
    """One image of 40 x 30 pixels through every view."""
    picture, sides = torch.zeros(40, 30, 3, dtype=torch.uint8), ([40], [30])
    renderer = Renderer(threads=1)
    for name in ("image", *view_names(config.views)[:3]):
        drawn = draw_view(name, config.views, config.seed, [7], [0], *sides)
        crop = renderer.render([picture], round_windows(drawn.windows, *sides), drawn)
        assert crop.shape == (1, 3, drawn.size, drawn.size)
    renderer.close()


def _discriminate(config: DecoderGan) -> None:
    size = config.views.image_size
    model = _built(partial(PatchGan, config.discriminator), config.batch.images * size**2, 1)
    if model is None:
        return
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02, generator=random)
    own = config.discriminator
    optim = config.optim.model_copy(
        update={"lr": own.lr, "betas": own.betas, "weight_decay": own.weight_decay, "clip_norm": own.clip_norm}
    )
    logits = model(torch.rand(2, 3, size, size, generator=random))
    assert logits.numel() > 0
    _learn(model, logits.square().mean(), config.model_copy(update={"optim": optim}))


def _generate(config: GeneratorConfig) -> None:
    shape, section = LatentShape(3, 4, 4), config.generator
    layers = section.depth + (section.head.depth if hasattr(section, "head") else 0)
    large = config.batch.samples * (section.buffer * section.head.repeats if hasattr(section, "head") else 1)
    model = _built(partial(build_generator, section, shape, 5), large * 100, layers)
    if model is None:
        return
    initialise_generator(model, section, config.seed)
    rows = config.batch.samples
    draws = draw(model.draw_counts, config.seed, step=0, positions=np.arange(rows))
    latents = torch.randn(rows, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    _learn(model, model(latents, torch.arange(rows) % 5, draws)["total"], config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("optim.betas=[1,0.98]",), "optim.betas.0=1: input should be less than 1"),
        (("optim.betas=[0.9,1.0]",), "optim.betas.1=1.0: input should be less than 1"),
        ((f"seed={2**64}",), f"seed={2**64}: input should be less than {2**64}"),
        (("seed=1e400",), "seed=inf: input should be a finite number"),
        (("ema=1",), "ema=1: input should be less than 1"),
        (("optim.lr=true",), "optim.lr: true is not a number"),
        (("model.trunk.mlp_ratio=0.01",), "model.trunk: width=32 with an MLP of 0.00667 times as many hidden units"),
        (("model.text.mlp_ratio=0.01",), "model.text: width=32 with an MLP of 0.01 times as many hidden units"),
        (
            ("batch.clip=1", "batch.ssl=1", "batch.rec=1", "data.streams=1", "objectives.ssl.koleo=0"),
            "batch.clip=1 with objectives.clip.kind=softmax: the one caption is always right, and nothing is learnt",
        ),
        (
            ("batch.ssl=1", "data.streams=1"),
            "batch.ssl=1 with objectives.ssl.koleo=0.1: KoLeo pushes an image away from its nearest neighbour",
        ),
        (("teacher.momentum=1",), "the teacher would stay at its random first weights"),
        (("name=..",), "name='..': string should match pattern"),
        (("name=.hidden",), "name='.hidden': string should match pattern"),
        ((f"name={'n' * 129}",), "string should have at most 128 characters"),
        (("seed=" + "9" * 5000,), "is not a YAML value (Exceeds the limit (4300 digits)"),
    ],
)
def test_settings_that_would_crash_later_or_learn_nothing_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_config(*overrides)
    assert message in str(caught.value)


def test_the_largest_seed_draws_as_any_other() -> None:
    assert len({int(hash_words(seed, 1)[0]) for seed in (0, 1, 2**63, 2**64 - 1)}) == 4
