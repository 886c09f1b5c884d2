"""What an autoregressive generator may know when it predicts a token, and that what it draws is complete."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from configs import UserError
from configs.generator import Autoregressive
from kernels.attention import attend, attend_reference, resolve_attention
from model.generator import autoregressive
from model.generator.autoregressive_networks import known_spans
from model.generator.factory import build_generator
from model.generator.sampling import Sampling
from model.initialise import initialise_generator
from tests.model.generator.tiny_autoregressive import CLASSES, SHAPE, drawn, tiny

pytestmark = pytest.mark.L0
CAUSAL = ("random", "raster")
ORDERS = ("masked", *CAUSAL)
N = SHAPE.height * SHAPE.width


def latents(rows: int = 2, seed: int = 0) -> Tensor:
    shape = (rows, SHAPE.channels, SHAPE.height, SHAPE.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ordered(seed: int = 3, rows: int = 2) -> Tensor:
    return torch.rand(rows, N, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)


@pytest.mark.parametrize("order", CAUSAL)
def test_a_later_token_does_not_reach_an_earlier_prediction(order: str) -> None:
    backbone, labels_B = tiny(order).backbone, torch.tensor([0, 1])
    order_BN = ordered() if order == "random" else torch.arange(N).expand(2, N)
    tokens_BMC = torch.randn(2, N - 1, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    z_BND = backbone(tokens_BMC, order_BN, labels_B)
    for slot in range(N):
        (gradient_BMC,) = torch.autograd.grad(z_BND[:, slot].sum(), tokens_BMC, retain_graph=True)
        reached_M = gradient_BMC.abs().sum(dim=(0, 2)) > 0
        assert reached_M.tolist() == [idx < slot for idx in range(N - 1)]


def test_an_order_changes_what_a_causal_prediction_knows() -> None:
    backbone, labels_B = tiny("random").backbone, torch.tensor([0, 1])
    tokens_BMC = torch.randn(2, N - 1, 3, generator=torch.Generator().manual_seed(1))
    one, other = ordered(), ordered()
    other[:, -2:] = one[:, -2:].flip(1)  # the last two change places
    first, second = (backbone(tokens_BMC, order_BN, labels_B) for order_BN in (one, other))
    assert torch.equal(first[:, : N - 2], second[:, : N - 2])
    assert (first[:, N - 2] - second[:, N - 2]).abs().max() > 1e-3  # it is told another place


def test_hidden_tokens_do_not_reach_the_conditions() -> None:
    backbone, labels_B = tiny().backbone, torch.tensor([0, 1])
    known_BKC = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    z_BND = backbone(known_BKC, ordered(), torch.tensor([2, 6]), labels_B)
    (gradient_BKC,) = torch.autograd.grad(z_BND.square().sum(), known_BKC)
    assert (gradient_BKC.abs().sum(dim=2) > 0).tolist() == [[True] * 2 + [False] * 4, [True] * 6]


def test_filling_up_the_encoder_changes_nothing() -> None:
    backbone, labels_B, order_BN = tiny().backbone, torch.tensor([0, 1]), ordered()
    known_BKC = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(1))
    visible_B = torch.full((2,), 4)
    exact, filled = (backbone(known_BKC[:, :held], order_BN, visible_B, labels_B) for held in (4, 9))
    torch.testing.assert_close(exact, filled, rtol=0, atol=1e-5)  # measured worst 2e-6


def test_spans_divide_rows_into_known_and_filling() -> None:
    ids_RC, offsets = known_spans(torch.tensor([2, 3]), 3)
    assert ids_RC.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert offsets.tolist() == [0, 2, 3, 6, 6]


def test_spans_say_the_same_to_dense_kernels_and_to_those_that_take_offsets() -> None:
    spans, random = known_spans(torch.tensor([2, 5, 1]), 5), torch.Generator().manual_seed(0)
    q_THE, k_THE, v_THE = (torch.randn(15, 2, 4, generator=random) for _ in range(3))
    dense_THE = attend(q_THE, k_THE, v_THE, ((3, 5),), spans=spans)
    # Measured worst 2e-7. The oracle goes by the offsets.
    torch.testing.assert_close(
        dense_THE, attend_reference(q_THE, k_THE, v_THE, ((3, 5),), spans=spans), rtol=0, atol=2e-6
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", ORDERS)
def test_half_precision_on_a_gpu_agrees_with_single_on_the_host(order: str) -> None:
    generator, labels_B, sampling = tiny(order, "velocity"), torch.tensor([0, 1]), Sampling("euler", steps=3)
    fast = build_generator(generator.section, SHAPE, CLASSES, resolve_attention("auto", "cuda").name).cuda().bfloat16()
    fast.load_state_dict(generator.state_dict())
    draws, more = drawn(generator.draw_counts), drawn(generator.sampling_draw_counts(sampling))
    loss = generator(latents(), labels_B, draws)["total"]
    on_gpu = fast(latents().cuda(), labels_B.cuda(), draws.to("cuda"))["total"]
    on_gpu.backward()
    # With bf16 on the host: losses 5e-4 apart, samples 0.005, of numbers of order 1.
    torch.testing.assert_close(on_gpu.cpu(), loss, rtol=0.01, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fast.parameters())
    of_gpu = fast.sample(labels_B.cuda(), sampling, more.to("cuda")).cpu()
    assert (of_gpu - generator.sample(labels_B, sampling, more)).abs().median() < 0.05


def test_raster_is_random_in_the_order_of_rows() -> None:
    random, raster = tiny("random"), tiny("raster")
    raster.load_state_dict(random.state_dict())
    draws, labels_B = drawn(random.draw_counts), torch.tensor([0, 1])
    draws.uniform_BU[:, :N] = torch.linspace(0.1, 0.9, N)
    assert torch.equal(random(latents(), labels_B, draws)["total"], raster(latents(), labels_B, draws)["total"])
    draws.uniform_BU[:, :N] = torch.linspace(0.9, 0.1, N)
    assert not torch.equal(random(latents(), labels_B, draws)["total"], raster(latents(), labels_B, draws)["total"])


def test_cached_keys_and_values_give_the_predictions_of_a_whole_pass() -> None:
    backbone, labels_B, order_BN = tiny("random").backbone, torch.tensor([0, 1]), ordered()
    tokens_BMC = torch.randn(2, N - 1, 3, generator=torch.Generator().manual_seed(1))
    whole_BND, caches = backbone(tokens_BMC, order_BN, labels_B), backbone.caches(2)
    with torch.no_grad():
        for idx in range(N):
            begin = max(idx - 1, 0)
            class_B = None if idx else labels_B
            z_B1D = backbone(tokens_BMC[:, begin:idx], order_BN[:, begin : idx + 1], class_B, caches)
            # Measured worst 2e-6, of 5.
            torch.testing.assert_close(z_B1D[:, 0], whole_BND[:, idx], rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_a_loss_depends_on_a_rows_own_numbers_alone(order: str) -> None:
    generator, labels_B = tiny(order), torch.tensor([0, 1, 2, 3])
    whole = drawn(generator.draw_counts, rows=4)
    losses = [
        generator(
            latents(4)[row : row + 1],
            labels_B[row : row + 1],
            type(whole)(whole.normal_BN[row : row + 1], whole.uniform_BU[row : row + 1]),
        )["total"]
        for row in range(4)
    ]
    # Measured worst 2e-7: any division of a batch has the mean of the rows' losses.
    torch.testing.assert_close(
        generator(latents(4), labels_B, whole)["total"], torch.stack(losses).mean(), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("order", ORDERS)
def test_a_fresh_generator_is_filled_and_predicts_zeros(order: str) -> None:
    generator = tiny(order)
    for parameter in generator.parameters():
        parameter.data.fill_(torch.nan)
    initialise_generator(generator, generator.section, seed=0)
    draws = drawn(generator.draw_counts)
    loss = generator(latents(), torch.tensor([0, 1]), draws)["total"]
    torch.testing.assert_close(loss, draws.normal_BN.square().mean())  # exact but for the order of the sum
    places = generator.backbone.end.positions
    assert places.std().item() == pytest.approx(0.2, rel=0.15)


@pytest.mark.parametrize("order", ORDERS)
def test_every_parameter_learns(order: str) -> None:
    generator = tiny(order)
    terms = generator(latents(), torch.tensor([0, 1]), drawn(generator.draw_counts))
    assert set(terms) == {"total", "noise"}
    terms["total"].backward()
    assert [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_a_share_of_the_classes_is_hidden() -> None:
    generator = tiny(class_dropout=0.4)
    draws = drawn(generator.draw_counts)
    for number, is_hidden in ((0.39, True), (0.41, False)):
        draws.uniform_BU[:, N + 1] = number
        first, second = (generator(latents(), torch.tensor(labels), draws)["total"] for labels in ([0, 1], [2, 3]))
        assert torch.equal(first, second) == is_hidden


def sampled(generator: Any, sampling: Sampling, labels_B: Tensor, seed: int = 0) -> Tensor:
    return generator.sample(labels_B, sampling, drawn(generator.sampling_draw_counts(sampling), len(labels_B), seed))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", ["ancestral", "ddim", "euler", "heun", "dopri5", "sde"])
def test_sampling_is_a_function_of_its_draws(order: str, method: Any) -> None:
    generator = tiny(order, "velocity" if method in ("euler", "heun", "dopri5", "sde") else "noise")
    sampling = Sampling(method, steps=None if method == "dopri5" else 2, guidance=2.0, rtol=0.1, atol=0.1)
    labels_B = torch.tensor([0, CLASSES])
    first = sampled(generator, sampling, labels_B)
    assert first.shape == (2, 3, 4, 4)
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    assert torch.equal(first, sampled(generator, sampling, labels_B))
    assert not torch.equal(first, sampled(generator, sampling, labels_B, seed=1))


@pytest.mark.parametrize("order", ORDERS)
def test_every_token_is_drawn_once_and_comes_home(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that says when it was drawn: each number is there once, at the place the order names."""
    generator, done = tiny(order), [0]

    def numbered(_predict: Any, noise_KRC: Tensor, _sampling: Sampling) -> Tensor:
        count = noise_KRC.shape[1] // 2
        done[0] += count
        numbers = torch.arange(done[0] - count, done[0], dtype=torch.float32)
        return numbers.view(1, count, 1).expand(2, count, 3).flatten(0, 1)

    monkeypatch.setattr(autoregressive, "sample_tokens", numbered)
    sampling = Sampling("ddim", steps=2, iterations=5 if order == "masked" else None)
    draws = drawn(generator.sampling_draw_counts(sampling))
    out_BN = generator.sample(torch.tensor([0, 1]), sampling, draws)[:, 0].flatten(1)
    order_BN = torch.arange(N).expand(2, N) if order == "raster" else draws.uniform_BU.argsort(dim=1)
    assert torch.equal(out_BN.gather(1, order_BN), torch.arange(float(N)).expand(2, N))


@pytest.mark.parametrize("order", ORDERS)
def test_guidance_of_one_is_none(order: str) -> None:
    generator, labels_B = tiny(order), torch.tensor([0, 1])
    plain, nearly, strong, outside = (
        sampled(generator, Sampling("ddim", steps=3, guidance=g, guidance_interval=interval), labels_B)
        for g, interval in ((1.0, (0.0, 1.0)), (1.0 + 1e-7, (0.0, 1.0)), (4.0, (0.0, 1.0)), (4.0, (0.99, 0.999)))
    )
    torch.testing.assert_close(plain, nearly, rtol=0, atol=1e-3)  # measured worst 9e-5, of numbers up to 170
    assert (plain - strong).abs().max() > 0.1
    torch.testing.assert_close(plain, outside, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("order", "known_then"), [("masked", [2, 5, 10, 16]), ("raster", list(range(1, 17)))])
def test_guidance_grows_with_the_share_of_tokens_drawn(
    order: str, known_then: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in MAR's code: 1 + (guidance - 1) * share, the tokens of the iteration itself among them."""
    generator, scales = tiny(order, "velocity"), []
    answers: list[Tensor] = []
    generator.head.register_forward_hook(lambda _, __, out: answers.append(out))

    def asked(predict: Any, noise_KRC: Tensor, _sampling: Sampling) -> Tensor:
        found = predict(noise_KRC[0], 500.0, 0.5)
        of_class, of_none = answers[-1].chunk(2)
        scales.append(((found - of_none) / (of_class - of_none)).median().item())
        return noise_KRC[0]

    monkeypatch.setattr(autoregressive, "sample_tokens", asked)
    iterations = len(known_then) if order == "masked" else None
    sampled(generator, Sampling("euler", guidance=5.0, iterations=iterations), torch.tensor([0, 1]))
    assert scales == pytest.approx([1 + 4 * count / N for count in known_then], rel=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_a_sample_does_not_depend_on_its_batch(order: str) -> None:
    generator, sampling = tiny(order, "velocity"), Sampling("euler", steps=3, guidance=2.0)
    together, alone = (sampled(generator, sampling, torch.tensor(labels)) for labels in ([0, 1, 2], [0]))
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-4)  # measured worst 2e-6


@pytest.mark.parametrize(
    ("order", "objective", "sampling", "message"),
    [
        ("masked", "noise", Sampling("euler"), "objective=noise"),
        ("masked", "velocity", Sampling("ddim"), "objective=velocity"),
        ("raster", "noise", Sampling("ddim", iterations=4), "token after token"),
        ("masked", "noise", Sampling("ddim", iterations=17), "16 tokens"),
    ],
)
def test_a_sampling_that_does_not_fit_is_refused(order: str, objective: str, sampling: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampled(tiny(order, objective), sampling, torch.tensor([0]))


def test_what_a_sampling_leaves_open_is_filled_in() -> None:
    assert tiny().resolve_sampling(Sampling("ddim")) == Sampling(
        "ddim", steps=100, iterations=N
    )  # 64, but for 16 tokens
    assert tiny("raster", "velocity").resolve_sampling(Sampling("euler", steps=7)) == Sampling("euler", steps=7)
    assert tiny("raster", "velocity").resolve_sampling(Sampling("dopri5")) == Sampling("dopri5")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 3}, "half of the blocks"),
        ({"width": 30, "heads": 4}, "share the width"),
        ({"order": "raster", "mask_ratio": {"low": 0.5}}, "hides nothing"),
    ],
)
def test_a_section_says_what_does_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Autoregressive(**settings)
