"""The learnt variance: its bounds, its loss against torch's own divergence, and what it mends."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from configs.generator import DIT, SIT
from model.generator import ddpm
from model.generator.ddpm import NoisePrediction, add_noise, ancestral_sample, linear_alphas_cumprod
from model.generator.sampling import Sampling
from tests.model.generator.tiny_generator import NUM_CLASSES, SHAPE, alive, rows, section

pytestmark = pytest.mark.L0
ALPHAS_CUMPROD = linear_alphas_cumprod()
BITS = torch.log(torch.tensor(2.0)).item()


def alphas_cumprod(step: int) -> tuple[float, float]:
    return ALPHAS_CUMPROD[step].item(), ALPHAS_CUMPROD[step - 1].item() if step else 1.0


def posterior(x: Tensor, latents: Tensor, step: int) -> Normal:
    """q(x_{s-1} | x_s, latent), as Ho et al. write it (equations 6 and 7), in float64."""
    before, after = alphas_cumprod(step)
    alpha, beta = before / after, 1 - before / after
    mean = after**0.5 * beta / (1 - before) * latents + alpha**0.5 * (1 - after) / (1 - before) * x
    return Normal(mean.double(), torch.full_like(mean, (beta * (1 - after) / (1 - before)) ** 0.5).double())


@pytest.mark.parametrize("step", [1, 2, 400, 999])
def test_the_bound_is_the_divergence_of_both_normals_in_bits(step: int) -> None:
    random = torch.Generator().manual_seed(step)
    latents, noise, guess, said = (torch.randn(5, 2, 3, 3, generator=random) for _ in range(4))
    step_B = torch.full((5,), step)
    x = add_noise(latents, noise, step_B, ALPHAS_CUMPROD)
    before, after = alphas_cumprod(step)
    predicted = (x.double() - (1 - before) ** 0.5 * guess) / before**0.5
    least, most = posterior(x, latents, step).variance.log(), torch.tensor(1 - before / after).double().log()
    log_variance = (said + 1) / 2 * most + (1 - said) / 2 * least
    of_model = Normal(posterior(x, predicted, step).mean, (log_variance / 2).exp())
    expected = kl_divergence(posterior(x, latents, step), of_model).mean().item() / BITS
    found = ddpm.variational_bound(said, guess, x, latents, step_B, ALPHAS_CUMPROD)
    assert found.item() == pytest.approx(expected, rel=2e-4)  # float32 of sqrt(survival) x_s less the noise in it


def test_the_first_step_costs_its_density() -> None:
    latents, noise, guess = (torch.randn(4, 2, generator=torch.Generator().manual_seed(n)) for n in range(3))
    x = add_noise(latents, noise, torch.zeros(4, dtype=torch.int64), ALPHAS_CUMPROD)
    before = ALPHAS_CUMPROD[0].item()
    predicted = (x - (1 - before) ** 0.5 * guess) / before**0.5
    deviation = (1 - before) ** 0.5  # said = 1: the most, beta
    expected = -Normal(predicted, deviation).log_prob(latents).mean().item() / BITS
    found = ddpm.variational_bound(
        torch.ones(4, 2), guess, x, latents, torch.zeros(4, dtype=torch.int64), ALPHAS_CUMPROD
    )
    assert found.item() == pytest.approx(expected, rel=1e-3)


def test_rows_count_each_at_its_own_step() -> None:
    random = torch.Generator().manual_seed(0)
    latents, noise, said = (torch.randn(3, 2, generator=random) for _ in range(3))
    step_B = torch.tensor([0, 300, 999])
    x = add_noise(latents, noise, step_B, ALPHAS_CUMPROD)

    def of(rows: slice) -> Tensor:
        return ddpm.variational_bound(
            said[rows], 0.9 * noise[rows], x[rows], latents[rows], step_B[rows], ALPHAS_CUMPROD
        )

    torch.testing.assert_close(of(slice(0, 3)), torch.stack([of(slice(n, n + 1)) for n in range(3)]).mean())


def test_the_bound_teaches_the_variance_alone() -> None:
    said, guess = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    x, latents, step_B = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([5, 500])
    ddpm.variational_bound(said, guess, x, latents, step_B, ALPHAS_CUMPROD).backward()
    assert said.grad is not None
    assert (said.grad != 0).all()
    assert guess.grad is None


def share_of(reverse: float, before: float, after: float) -> float:
    """At which share the way back varies by `reverse`."""
    least, most = (ddpm.learned_std(torch.tensor(end).double(), before, after).log() * 2 for end in (0.0, 1.0))
    return ((torch.tensor(reverse).log() - least) / (most - least)).item()


def reverse_variance(std: float, before: float, after: float) -> float:
    """Of x_r, given x_s alone, for data that are normal with this deviation."""
    kept = before / after
    of_r, of_s = after * std**2 + 1 - after, before * std**2 + 1 - before
    return of_r - kept * of_r**2 / of_s


@pytest.mark.parametrize("std", [0.25, 0.5, 1.0])
def test_what_the_bound_is_least_for_is_what_the_way_back_varies_by(std: float) -> None:
    """Its gradient vanishes there, over 200,000 latents, and points back from either side."""
    step, random = 300, torch.Generator().manual_seed(0)
    before, after = alphas_cumprod(step)
    best = 2 * share_of(reverse_variance(std, before, after), before, after) - 1
    latents = std * torch.randn(200_000, 1, generator=random)
    step_B = torch.full((len(latents),), step)
    x = add_noise(latents, torch.randn(len(latents), 1, generator=random), step_B, ALPHAS_CUMPROD)
    guess = (1 - before) ** 0.5 * x / (before * std**2 + 1 - before)
    slopes = []
    for place in (best - 0.5, best, best + 0.5):
        said = torch.full_like(x, place).requires_grad_()
        ddpm.variational_bound(said, guess, x, latents, step_B, ALPHAS_CUMPROD).backward()
        slopes.append(said.grad.sum().item())
    assert slopes[0] < 0 < slopes[2]
    assert abs(slopes[1]) < 0.1 * min(-slopes[0], slopes[2])


@pytest.mark.parametrize("std", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("count", [5, 20])
def test_a_known_variance_mends_samples_of_few_steps(std: float, count: int) -> None:
    """All variances added up, as in test_noising: with the right share the deviation of the data comes out, but for the
    noise of the first step, which is never added; with the posterior's it is 0.25 to 0.84 times as large."""
    steps = torch.linspace(999, 0, count, dtype=torch.float64).round().int().tolist()
    later = dict(zip(steps, [*steps[1:], -1], strict=True))

    def predict(x: Tensor, step: int) -> NoisePrediction:
        before, after = ALPHAS_CUMPROD[step].item(), ALPHAS_CUMPROD[later[step]].item() if later[step] >= 0 else 1.0
        noise = (1 - before) ** 0.5 * x / (before * std**2 + 1 - before)
        right = share_of(reverse_variance(std, before, after), before, after) if after < 1 else 0.0
        return NoisePrediction(noise, torch.full_like(x, right))

    sources = torch.eye(count, dtype=torch.float64)
    learnt, fixed = (
        ancestral_sample(said, sources[:, :1], ALPHAS_CUMPROD, count, sources.T[1:].unsqueeze(-1))
        .square()
        .sum()
        .sqrt()
        .item()
        for said in (predict, lambda x, step: NoisePrediction(predict(x, step).noise))
    )
    assert learnt == pytest.approx(std, rel=2e-3)
    assert fixed < 0.85 * std


def test_both_ends_are_the_bounds() -> None:
    before, after = alphas_cumprod(400)
    posterior_std, beta_std = (
        ddpm.learned_std(ddpm.variance_fraction(torch.tensor(said).double()), before, after).item()
        for said in (-1.0, 1.0)
    )
    assert beta_std**2 == pytest.approx(1 - before / after)
    assert posterior_std**2 == pytest.approx((1 - before / after) * (1 - after) / (1 - before))


def test_guidance_leaves_the_variance_to_the_class() -> None:
    """One stage of two, of equal noise whatever is asked: what differs is what it adds."""
    generator = alive(section(**DIT))
    labels, how = torch.arange(6) % NUM_CLASSES, Sampling("ancestral", steps=2, guidance=3.0)
    seen: list[Tensor] = []
    generator.backbone.register_forward_hook(lambda _, __, said: seen.append(said))
    draws = rows(generator.sampling_draw_counts(how))
    generator.sample(labels, how, draws)
    of_class, of_none = seen[0].chunk(2)
    assert of_class.shape[1] == 2 * SHAPE.channels
    x = draws.normal_BN.view(6, 2, SHAPE.channels, SHAPE.height, SHAPE.width)
    noise = of_none + 3.0 * (of_class - of_none)
    said = iter(
        (
            NoisePrediction(noise[:, :3], ddpm.variance_fraction(of_class[:, 3:])),
            NoisePrediction(torch.zeros_like(x[:, 0])),
        )
    )
    reached: list[Tensor] = []

    def again(x: Tensor, step: int) -> NoisePrediction:
        reached.append(x)
        return next(said)

    ancestral_sample(again, x[:, 0], ALPHAS_CUMPROD, 2, x[:, 1:].transpose(0, 1))
    asked: list[Tensor] = []
    generator.backbone.register_forward_pre_hook(lambda _, given: asked.append(given[0]))
    generator.sample(labels, how, draws)
    torch.testing.assert_close(asked[1][:6], reached[1], rtol=1e-5, atol=1e-5)


def test_a_fixed_variance_has_no_outputs_of_its_own() -> None:
    generator = alive(section(**{**DIT, "variance": "fixed"}))
    how = Sampling(steps=3)
    assert set(generator(torch.randn(2, 3, 4, 2), torch.tensor([0, 1]), rows(generator.draw_counts, 2))) == {
        "total",
        "noise",
    }
    assert generator.sample(torch.tensor([0, 1]), how, rows(generator.sampling_draw_counts(how), 2)).shape == (
        2,
        3,
        4,
        2,
    )


def test_a_velocity_has_no_variance_to_learn() -> None:
    with pytest.raises(ValidationError, match="only the steps of DDPM have one to learn"):
        section(**SIT, variance="learnt")
