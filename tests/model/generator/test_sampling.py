"""From noise to latents: conventions, guidance, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from configs import UserError
from model.generator.ddpm import linear_alphas_cumprod
from model.generator.draws import RandomDraws
from model.generator.sampling import Sampling
from tests.model.generator.tiny_generator import KINDS, NUM_CLASSES, SHAPE, Exact, alive, fresh, rows, section

pytestmark = pytest.mark.L0
LABELS = torch.arange(6) % NUM_CLASSES
METHODS = {"euler": "sit", "heun": "sit", "dopri5": "sit", "sde": "sit", "ddim": "dit", "ancestral": "dit"}


def sampling(method: str, **settings: object) -> Sampling:
    """Few steps, for methods that are told how many."""
    return Sampling(**{"method": method, "steps": None if method == "dopri5" else 5, **settings})


def sampled(method: str, **settings: object) -> Tensor:
    generator, how = alive(section(**KINDS[METHODS[method]])), sampling(method, **settings)
    return generator.sample(LABELS, how, rows(generator.sampling_draw_counts(how)))


@pytest.mark.parametrize("method", METHODS)
def test_equal_draws_give_equal_latents_and_other_draws_others(method: str) -> None:
    first = sampled(method)
    assert first.shape == (6, SHAPE.channels, SHAPE.height, SHAPE.width)
    assert first.dtype == torch.float32
    assert not first.requires_grad
    assert torch.equal(first, sampled(method))
    generator, how = alive(section(**KINDS[METHODS[method]])), sampling(method)
    assert not torch.allclose(first, generator.sample(LABELS, how, rows(generator.sampling_draw_counts(how), step=1)))


# How far off the exact mean + std * noise each method is: measured 1.8e-2, 5.6e-5, 2.8e-3 (43 evaluations) and 1.4e-2.
@pytest.mark.parametrize(
    ("how", "within"),
    [
        (Sampling("euler", steps=100), 2.5e-2),
        (Sampling("heun", steps=100), 1e-4),
        (Sampling("dopri5"), 1e-2),
        (Sampling("ddim", steps=500), 2e-2),
    ],
)
def test_noise_becomes_the_latent_it_stands_for(how: Sampling, within: float) -> None:
    """With the best prediction for normal data the way from noise z ends at mean + std z: time 0 is noise."""
    kind = METHODS[how.method]
    generator = fresh(section(**KINDS[kind]))
    generator.backbone = Exact(generator.section.objective, mean=2.0, std=0.5, alphas_cumprod_S=linear_alphas_cumprod())
    draws = rows(generator.sampling_draw_counts(how))
    expected = 2.0 + 0.5 * draws.normal_BN.view(6, *SHAPE_AXES)
    assert (generator.sample(LABELS, how, draws) - expected).abs().max() < within


SHAPE_AXES = (SHAPE.channels, SHAPE.height, SHAPE.width)


@pytest.mark.parametrize("steps", [10, 50])
def test_a_timestep_shift_helps_where_most_happens_near_the_noise(steps: int) -> None:
    """Data far off and wide: the velocity bends near time 0, and Euler's steps are wanted there."""
    errors = []
    for shift in (1.0, 0.3):
        how = Sampling("euler", steps=steps, timestep_shift=shift)
        generator = fresh(section(**KINDS["sit"]))
        generator.backbone = Exact("velocity", mean=0.0, std=8.0, alphas_cumprod_S=linear_alphas_cumprod())
        draws = rows(generator.sampling_draw_counts(how))
        expected = 8.0 * draws.normal_BN.view(6, *SHAPE_AXES)
        errors.append((generator.sample(LABELS, how, draws) - expected).abs().max())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_guidance_of_one_is_no_guidance_and_zero_is_no_class(method: str) -> None:
    classless = torch.full_like(LABELS, NUM_CLASSES)
    fixed = {**KINDS[METHODS[method]], "variance": "fixed"}  # a learnt one is the class's at any guidance
    generator, how = alive(section(**fixed)), sampling(method)
    draws = rows(generator.sampling_draw_counts(how))
    asked: list[int] = []
    generator.backbone.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    plain = generator.sample(LABELS, how, draws)
    assert set(asked) == {6}, "without guidance the class alone is asked for"
    unguided = generator.sample(LABELS, sampling(method, guidance=0.0), draws)
    # Twice the rows round otherwise; dopri5 has other steps, as the rows without a class move its error.
    within = 3e-3 if method == "dopri5" else 1e-5
    torch.testing.assert_close(unguided, generator.sample(classless, how, draws), atol=within, rtol=within)
    assert not torch.allclose(plain, unguided, atol=1e-2)


def test_guidance_moves_one_euler_step_by_its_formula() -> None:
    generator = alive(section(**KINDS["sit"]))
    draws = rows(generator.sampling_draw_counts(sampling("euler")))
    noise, time = draws.normal_BN.view(6, *SHAPE_AXES), torch.zeros(6)
    with torch.no_grad():
        of_class = generator.backbone(noise, time, LABELS)
        of_none = generator.backbone(noise, time, torch.full_like(LABELS, NUM_CLASSES))
    found = generator.sample(LABELS, Sampling("euler", steps=1, guidance=4.0), draws)
    torch.testing.assert_close(found, noise + of_none + 4.0 * (of_class - of_none), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "guided"), [("euler", [2, 3, 4]), ("ddim", [2, 3, 4])])
def test_guidance_keeps_to_its_interval(method: str, guided: list[int]) -> None:
    """Five steps begin at times 0, 0.2, 0.4, 0.6, 0.8 (euler) and 0, 0.25, 0.5, 0.75, 1 (ddim)."""
    generator = alive(section(**KINDS[METHODS[method]]))
    how = sampling(method, guidance=2.0, guidance_interval=(0.3, 1.0))
    asked: list[int] = []
    generator.backbone.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    generator.sample(LABELS, how, rows(generator.sampling_draw_counts(how)))
    assert [step for step, count in enumerate(asked) if count == 12] == guided


def test_guidance_is_within_both_ends_of_its_interval() -> None:
    how = Sampling(guidance=2.0, guidance_interval=(0.25, 0.75))
    assert [how.guides(time) for time in (0.2, 0.25, 0.5, 0.75, 0.8)] == [False, True, True, True, False]
    assert not Sampling(guidance_interval=(0.25, 0.75)).guides(0.5)


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_are_the_times_the_model_was_asked(method: str) -> None:
    generator, how = alive(section(**KINDS[METHODS[method]])), sampling(method, guidance=2.0)
    asked: list[None] = []
    generator.backbone.register_forward_pre_hook(lambda *_: asked.append(None))
    path = generator.follow(LABELS, how, rows(generator.sampling_draw_counts(how)))
    assert path.evaluations == len(asked)


def test_a_row_is_sampled_alike_in_any_batch() -> None:
    generator = alive(section(**KINDS["lightningdit"]))
    how = sampling("heun", guidance=3.0)
    draws = rows(generator.sampling_draw_counts(how))
    whole = generator.sample(LABELS, how, draws)
    part = generator.sample(LABELS[2:4], how, RandomDraws(draws.normal_BN[2:4], draws.uniform_BU[2:4]))
    torch.testing.assert_close(part, whole[2:4], atol=1e-5, rtol=1e-5)  # products of other sizes: 2e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "rk4"}, "sampler=rk4: it is one of euler, heun, dopri5, sde, ddim, ancestral"),
        ({"steps": 0}, "steps=0: there is at least one"),
        ({"guidance": -1.0}, "guidance=-1: 1 is none"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance interval=0.8, 0.2"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance interval=0, 1.5"),
        ({"timestep_shift": 0.0}, "timestep shift=0: it is above 0"),
        ({"method": "ancestral", "temperature": 0.0}, "temperature=0: it is above 0"),
        ({"rtol": 0.0}, "rtol=0, atol=1e-06: both are above 0"),
        ({"method": "dopri5", "steps": 50}, "steps=50 with sampler=dopri5: it chooses its steps by rtol"),
        ({"method": "ddim", "timestep_shift": 0.3}, "timestep shift=0.3 with sampler=ddim: only euler and heun"),
        ({"method": "ddim", "temperature": 0.9}, "temperature=0.9 with sampler=ddim: it adds no noise"),
    ],
)
def test_a_setting_out_of_range_or_without_effect_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Sampling(**settings)


@pytest.mark.parametrize(("kind", "method"), [("sit", "ddim"), ("lightningdit", "ancestral"), ("dit", "heun")])
def test_a_method_of_the_other_objective_is_refused(kind: str, method: str) -> None:
    generator, how = fresh(section(**KINDS[kind])), sampling(method)
    objective = generator.section.objective
    message = f"sampler={method} for a generator of objective={objective}: it is sampled"
    with pytest.raises(UserError, match=message):  # before 250 times a latent's noise is drawn
        generator.sampling_draw_counts(how)
    with pytest.raises(UserError, match=message):
        generator.sample(LABELS, how, rows(generator.draw_counts))


@pytest.mark.parametrize(("kind", "method", "steps"), [("sit", "euler", 250), ("dit", "ancestral", 250)])
def test_without_a_method_the_objectives_own_is_taken(kind: str, method: str, steps: int) -> None:
    found = fresh(section(**KINDS[kind])).resolve_sampling(Sampling(guidance=2.0))
    assert (found.method, found.steps, found.guidance) == (method, steps, 2.0)


def test_iterations_are_not_a_diffusion_generators() -> None:
    with pytest.raises(UserError, match=r"iterations=8 for a diffusion generator: it draws all tokens at once"):
        fresh(section()).sampling_draw_counts(Sampling("euler", iterations=8))
