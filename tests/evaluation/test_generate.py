"""gFID: a generator of true latents reaches the tokenizer's rFID, noise does not; figures, files, ranks, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs import UserError
from configs.generator import DIT, Diffusion, Generator
from data.latents.store import LatentStore
from engine.checkpoint.directory import checkpoint_name
from engine.distributed import Ranks
from evaluation import generate, plots
from evaluation import run as evaluation_run
from evaluation.features import CorpusNetwork, write_corpus_network
from evaluation.generate import GenerationOptions, GeneratorEvaluation
from evaluation.latents import LatentOptions, write_latents
from evaluation.samples import SampleBatch, SampleGrid, SamplingPipeline
from evaluation.tokenizer_source import open_tokenizer
from model.generator.draws import DrawCounts, RandomDraws
from model.generator.factory import LoadedGenerator, build_generator, write_generator
from model.generator.sampling import Sampling
from model.generator.tokens import LatentShape
from model.imagenet import normalise
from model.weights import read_weights, weights_of_run, write_weights
from tests.evaluation.tiny_runs import CLASSES, write_labelled_corpus, write_run
from tests.harness import run_ranks
from tests.model.generator.tiny_autoregressive import section as autoregressive

pytestmark = pytest.mark.L0
CPU = torch.device("cpu")
DIFFUSION = Diffusion(width=16, depth=1, heads=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled_corpus(tmp_path_factory.mktemp("corpus") / "labelled")


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained a little on the images of the corpus: an untrained one decodes all latents to much the same."""
    run = write_run(tmp_path_factory.mktemp("runs") / "tiny", corpus)
    source = open_tokenizer(run, CPU)
    [batch] = source.open_images([f"{corpus}/train/*.tar"], "data.train").batches(30)
    parts, images = source.tokenizer.requires_grad_(True), normalise(batch.images)
    optimizer = torch.optim.AdamW(parts.parameters(), 5e-3)
    assert parts.bottleneck is not None
    assert parts.decoder is not None
    for _ in range(80):
        layout = parts.trunk.layout({"clip": images})
        latent_BPL = parts.bottleneck(layout.patches(parts.trunk({"clip": images}, {}), "clip"))
        loss = (parts.decoder(latent_BPL, layout.group("clip").grid) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    write_weights(run / "weights.safetensors", parts.state_dict(), parts.model)
    return run


@pytest.fixture(scope="module")
def store(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return write_latents(tokenizer, tmp_path_factory.mktemp("store") / "latents", LatentOptions())


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path, network = tmp_path_factory.mktemp("network") / "net.safetensors", CorpusNetwork(5, 16)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")  # features of a size, through eight layers
    write_corpus_network(path, network, 0.96, "none")
    return path


def write_random_generator(folder: Path, store: LatentStore, section: Generator = DIFFUSION, **changed: Any) -> Path:
    """A run directory whose generator was never trained, but no weight of which is zero."""
    folder.mkdir()
    shape = changed.pop("shape", LatentShape(*store.shape))
    generator = torch.Generator().manual_seed(changed.pop("seed", 0))
    state = {
        name: torch.randn(tensor.shape, generator=generator) * 0.2
        for name, tensor in build_generator(section, shape, CLASSES).state_dict().items()
    }
    mean, std = (x.new_ones(shape.channels) * x.mean() for x in (store.mean, store.std))
    given = {"section": section, "shape": shape, "num_classes": CLASSES, "mean_L": mean, "std_L": std}
    write_generator(folder / "weights.safetensors", state, **(given | {"tokenizer": store.tokenizer} | changed))
    return folder


@pytest.fixture(scope="module")
def trained(store: LatentStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_generator(tmp_path_factory.mktemp("generators") / "dit", store)


def test_outdated_weights_of_a_generators_run_are_refused(store: LatentStore, tmp_path: Path) -> None:
    folder = write_random_generator(tmp_path / "dit", store, steps=100)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text(checkpoint_name(100))
    assert weights_of_run(folder) == folder / "weights.safetensors"
    (folder / "checkpoints" / "latest").write_text(checkpoint_name(200))
    with pytest.raises(
        UserError, match="holds the weights of step 100, but the run's latest checkpoint is step-00000200"
    ):
        SamplingPipeline.open(folder, "unused", torch.device("cpu"))


class Replay(nn.Module):
    """Gives the latent of image n for class n, as training saw it."""

    def __init__(self, store: LatentStore) -> None:
        super().__init__()
        latents, _ = store.read(range(store.num_samples), [False] * store.num_samples)
        self.latents = (latents - store.mean.view(-1, 1, 1)) / store.std.view(-1, 1, 1)

    def resolve_sampling(self, sampling: Sampling) -> Sampling:
        return sampling

    def sampling_draw_counts(self, sampling: Sampling) -> DrawCounts:
        return DrawCounts(normals=0, uniforms=0)

    def sample(self, labels_B: Tensor, sampling: Sampling, draws: RandomDraws) -> Tensor:
        return self.latents[labels_B]


class Noise(Replay):
    """Gives back the noise that it is asked to start from."""

    def sampling_draw_counts(self, sampling: Sampling) -> DrawCounts:
        return DrawCounts(normals=self.latents[0].numel(), uniforms=0)

    def sample(self, labels_B: Tensor, sampling: Sampling, draws: RandomDraws) -> Tensor:
        return draws.normal_BN.view(-1, *self.latents.shape[1:])


def loaded(module: nn.Module, store: LatentStore, **changed: Any) -> LoadedGenerator:
    given = {"section": DIFFUSION, "shape": LatentShape(*store.shape), "num_classes": store.num_samples}
    given |= {"mean_L": store.mean, "std_L": store.std, "tokenizer": store.tokenizer}
    return LoadedGenerator(module, **(given | changed))  # type: ignore[arg-type]


def test_true_latents_reach_the_rfid_of_their_tokenizer_and_noise_does_not(
    tokenizer: Path, store: LatentStore, network: Path, corpus: Path, tmp_path: Path
) -> None:
    """The generation side decodes, quantises and compares as the reconstruction does, against the same images."""
    shards = f"{corpus}/train/*.tar"
    asked = [tokenizer, "--tasks", "reconstruction", "--fid", network, "--data", shards, "--out", tmp_path]
    assert evaluation_run.main([*map(str, asked)]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())["reconstruction"]
    [rfid] = [value for name, value in found.items() if name.startswith("rfid[")]
    gfid = {}
    for kind in (Replay, Noise):
        pair = SamplingPipeline(loaded(kind(store), store), open_tokenizer(tokenizer, CPU), CPU)
        [row] = GeneratorEvaluation(pair, GenerationOptions(num_samples=30, fid=(network,), batch_size=8)).evaluate(1.0)
        gfid[kind] = row["gfid"]
    # Measured 5e-6 relative: normalising and back rounds, and a pixel may round to the next of 256 values.
    assert gfid[Replay] == pytest.approx(rfid, rel=1e-4)
    assert gfid[Noise] > 2 * rfid  # measured 4


def generated(out: Path, *arguments: object) -> dict[str, Any]:
    assert generate.main([*map(str, arguments), "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads((out / "generation.json").read_text())
    return found


def test_the_command_leaves_figures_a_table_and_an_image(
    trained: Path, tokenizer: Path, network: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (trained, "--tokenizer", tokenizer, "--num-samples", 12)
    more = ("--guidance", "1,4", "--fid", network, network, "--steps", 3, "--batch-size", 5)
    found = generated(tmp_path, *asked, *more)
    assert found["reference"] == [f"{corpus}/train/*.tar"]
    assert [(row["guidance"], row["samples"], row["steps"], row["method"]) for row in found["results"]] == [
        (scale, 12, 3, "euler") for scale in (1.0, 1.0, 4.0, 4.0)
    ]
    assert all(row["network"].startswith("corpus:") for row in found["results"])
    assert all(row["evaluations"] == {"backbone": 3.0} for row in found["results"])
    first, _, other, _ = (row["gfid"] for row in found["results"])
    assert first != other
    shown = capsys.readouterr().out
    for expected in ("gFID", "euler", "backbone 3", "corpus:"):
        assert expected in shown
    assert (tmp_path / "pictures" / "samples.png").exists()
    # One scale alone, in other batches: nothing of the first scale is left in the figures of the second.
    alone = (*asked, "--guidance", 4, "--fid", network, "--steps", 3, "--batch-size", 12)
    assert generated(tmp_path / "alone", *alone)["results"][0]["gfid"] == pytest.approx(other, rel=1e-4)


def test_results_say_by_digest_whose_weights_they_are_of(
    trained: Path, tokenizer: Path, store: LatentStore, tmp_path: Path
) -> None:
    other = write_random_generator(tmp_path / "other", store, seed=1)
    found = [
        generated(tmp_path, generator, "--tokenizer", weights, "--num-samples", 1, "--steps", 1)
        for generator, weights in (
            (trained, tokenizer),
            (trained / "weights.safetensors", tokenizer / "weights.safetensors"),
            (other, tokenizer),
        )
    ]
    [ours, by_file, others] = [row["generator_weights"] for row in found]
    assert ours == by_file != others
    assert {row["tokenizer_weights"] for row in found} == {open_tokenizer(tokenizer, CPU).digest()}


def test_samplers_differ_in_how_often_they_ask(trained: Path, tokenizer: Path, tmp_path: Path) -> None:
    asked = (trained, "--tokenizer", tokenizer, "--num-samples", 6, "--batch-size", 4)
    [heun] = generated(tmp_path, *asked, "--sampler", "heun", "--steps", 2)["results"]
    assert (heun["evaluations"], heun["gfid"], heun["network"][:12]) == ({"backbone": 4.0}, None, "not computed")
    [adaptive] = generated(tmp_path, *asked, "--sampler", "dopri5")["results"]
    assert adaptive["steps"] is None
    assert adaptive["evaluations"]["backbone"] > 6


def test_an_autoregressive_generator_is_judged_alike(
    tokenizer: Path, store: LatentStore, network: Path, tmp_path: Path
) -> None:
    run = write_random_generator(tmp_path / "mar", store, autoregressive("masked"))
    asked = (run, "--tokenizer", tokenizer, "--num-samples", 6, "--steps", 2)
    [row] = generated(tmp_path, *asked, "--iterations", 3, "--fid", network)["results"]
    assert row["method"] == "ancestral", "its head predicts noise"
    assert row["evaluations"] == {"backbone": 3.0, "head": 6.0}
    assert row["iterations"] == 3
    assert row["gfid"] > 0


def test_a_sampler_of_another_objective_shows_before_the_corpus_is_read(
    trained: Path, tokenizer: Path, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GeneratorEvaluation, "_add_reference", lambda _: pytest.fail("the corpus was read"))
    evaluator = GeneratorEvaluation(
        SamplingPipeline.open(trained, tokenizer, CPU),
        GenerationOptions(Sampling("ddim"), num_samples=4, fid=(network,)),
    )
    with pytest.raises(UserError, match="sampler=ddim for a generator of objective=velocity"):
        evaluator.evaluate(1.0)


def test_other_images_and_fewer_of_them_can_be_the_reference(
    trained: Path, tokenizer: Path, network: Path, corpus: Path, tmp_path: Path
) -> None:
    asked = (trained, "--tokenizer", tokenizer, "--num-samples", 6, "--steps", 1, "--fid", network)
    held_out = f"{corpus}/held_out"
    rows = [
        generated(tmp_path, *asked, *more)["results"][0]["gfid"]
        for more in ((), ("--data", held_out), ("--data", held_out, "--limit", 5))
    ]
    assert len(set(rows)) == 3


def test_a_sample_depends_on_seed_and_number_alone(trained: Path, tokenizer: Path) -> None:
    pair = SamplingPipeline.open(trained, tokenizer, CPU)

    def images(numbers: list[int], seed: int = 0, batch_size: int = 3) -> Tensor:
        batches = list(pair.samples(np.array(numbers), Sampling(steps=2), seed, batch_size))
        assert torch.cat([batch.labels for batch in batches]).tolist() == [n % CLASSES for n in numbers]
        return torch.cat([batch.images for batch in batches])

    whole = images(list(range(7)))
    assert whole.shape == (7, 3, 32, 32)
    torch.testing.assert_close(images([6, 2, 0], batch_size=2), whole[[6, 2, 0]], rtol=0, atol=1e-5)  # measured 0
    assert (images([0], seed=1) - whole[:1]).abs().max() > 0.01
    assert (whole[5] - whole[0]).abs().max() > 0.01  # the same class, other noise


def test_products_in_half_precision_change_an_image_little(trained: Path, tokenizer: Path, tmp_path: Path) -> None:
    pair, numbers = SamplingPipeline.open(trained, tokenizer, CPU), np.arange(6)
    whole, half = (
        torch.cat([batch.images for batch in pair.samples(numbers, Sampling(steps=4), 0, 6, precision)])
        for precision in ("float32", "bfloat16")
    )
    assert half.dtype == torch.float32
    assert not torch.equal(half, whole)
    assert (half - whole).abs().mean() < 2e-3  # measured 2e-4; two samples are 0.16 apart
    asked = (trained, "--tokenizer", tokenizer, "--num-samples", 6, "--steps", 2, "--precision", "bfloat16")
    assert generated(tmp_path, *asked)["results"][0]["precision"] == "bfloat16"


def test_a_grid_shows_the_first_samples_of_classes_spread_over_all() -> None:
    grid = SampleGrid(num_classes=20, num_samples=50)
    assert grid.classes == [0, 3, 5, 8, 10, 13, 15, 18]
    drawn: dict[str, Any] = {}
    numbers = np.arange(50)
    images = torch.from_numpy(numbers).view(-1, 1, 1, 1).expand(50, 3, 2, 2) / 255
    for own in (slice(0, 33), slice(33, 50)):
        grid.add("guidance 1", SampleBatch(numbers[own], torch.from_numpy(numbers[own] % 20), images[own].float()))
    grid.gather()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "evaluation.samples.draw_sample_grid", lambda *given: drawn.update(zip("pnf", given, strict=True))
        )
        grid.draw([f"kind {i}" for i in range(20)], Path("samples.png"))
    assert drawn["n"] == [f"kind {label}" for label in grid.classes]
    shown = drawn["p"]["guidance 1"][:, :, 0, 0, 0]
    assert shown.tolist() == [[label, label + 20] for label in grid.classes]  # 18 + 40 is not among the 50


@pytest.mark.parametrize(("classes", "samples", "rows"), [(3, 2, [0, 1]), (1, 9, [0]), (1000, 4, [0, 1, 2, 3])])
def test_a_grid_of_few_samples_shows_what_there_is(classes: int, samples: int, rows: list[int]) -> None:
    assert SampleGrid(classes, samples).classes == rows


def test_a_decoder_that_was_trained_further_decodes_the_same_latents(
    trained: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """By itself, too, as a weights file: the size of images is that of the generator's latents."""
    state, model = read_weights(tokenizer / "weights.safetensors")
    further = {name: tensor * (0.5 if name.startswith("decoder") else 1) for name, tensor in state.items()}
    write_weights(tmp_path / "stage2.safetensors", further, model)
    [first], [second] = (
        SamplingPipeline.open(trained, path, CPU).samples(np.arange(2), Sampling(steps=1), 0, 2)
        for path in (tokenizer, tmp_path / "stage2.safetensors")
    )
    assert first.images.shape == second.images.shape == (2, 3, 32, 32)
    assert (first.images - second.images).abs().max() > 0.01


def _generate(_: Ranks, generator: Path, tokenizer: Path, out: Path, options: GenerationOptions) -> dict[str, Any]:
    return generate.generate(generator, tokenizer, out, options)


@pytest.mark.L1
def test_ranks_reach_the_figures_of_one_rank(trained: Path, tokenizer: Path, network: Path, tmp_path: Path) -> None:
    options = GenerationOptions(Sampling(steps=2), (1.0, 3.0), num_samples=11, batch_size=3, fid=(network,))
    alone = generate.generate(trained, tokenizer, tmp_path / "alone", options)
    first, second = run_ranks(_generate, 2, trained, tokenizer, tmp_path / "together", options)
    assert first == second
    for one, two in zip(alone["results"], first["results"], strict=True):
        # Measured 1e-7: sums come in another order. A sample made twice or not at all changes it by 1e-2.
        assert two.pop("gfid") == pytest.approx(one.pop("gfid"), rel=1e-4)
        assert one == two
    grids = [Image.open(tmp_path / name / "pictures" / "samples.png").convert("RGB") for name in ("alone", "together")]
    assert np.abs(np.subtract(*(np.asarray(picture, np.int64) for picture in grids))).max() <= 1


def test_every_mistake_is_one_line(
    trained: Path,
    tokenizer: Path,
    store: LatentStore,
    network: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def other(name: str, **changed: Any) -> Path:
        return write_random_generator(tmp_path / name, store, **changed)

    wide = other("wide", shape=LatentShape(store.shape[0] + 4, 4, 4))
    weights = tokenizer / "weights.safetensors"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((trained / "weights.safetensors").read_bytes()[:-20])
    few = tmp_path / "classes.json"
    few.write_text('{"classes": [{"name": "one"}]}')
    noise = other("noise", section=Diffusion(width=16, depth=1, heads=2, **DIT))
    astray = other("astray")
    tensors = load_file(astray / "weights.safetensors")
    with safe_open(astray / "weights.safetensors", "pt") as stored:
        described = stored.metadata()
    save_file({k: v * torch.nan for k, v in tensors.items()}, astray / "weights.safetensors", described)
    overflows = write_random_generator(tmp_path / "overflows", store)
    sane = load_file(overflows / "weights.safetensors")
    save_file({k: v * 1e36 for k, v in sane.items()}, overflows / "weights.safetensors", described)
    mistakes: list[tuple[str, tuple[object, ...]]] = [
        (f"makes latents of {store.shape[0] + 4} channels, this tokenizer decodes {store.shape[0]}", (wide,)),
        ("was trained on the latents of deadbeef, this tokenizer's are", (other("foreign", tokenizer="deadbeef"),)),
        ("does not exist", (tmp_path / "nowhere",)),
        ("holds the weights of a tokenizer, not a generator", (tokenizer,)),
        ("is not a safetensors file", (cut,)),
        ("is sampled with ancestral, ddim; choose one of them, or none", (noise, "--sampler", "euler")),
        ("timestep shift=0.3 with sampler=ancestral: only euler and heun", (noise, "--shift", "0.3")),
        ("temperature=0.9 with sampler=euler: it adds no noise", (trained, "--temperature", "0.9")),
        ("--guidance 1,x: give some numbers", (trained, "--guidance", "1,x")),
        ("guidance=-1: 1 is none", (trained, "--guidance", "1,-1")),
        ("--guidance-interval 0.5: give 2 numbers", (trained, "--guidance-interval", "0.5")),
        ("guidance=inf: 1 is none, larger is more, and it is finite", (trained, "--guidance", "inf")),
        ("--seed -1: give a number from 0 to 2^64 - 1", (trained, "--seed", -1)),
        ("--limit 3 without --fid", (trained, "--limit", 3)),
        ("--num-samples 0: give a number from 1 on", (trained, "--num-samples", 0)),
        ("needs two images at least", (trained, "--num-samples", 1, "--fid", network)),
        ("does not exist: FID needs a feature network", (trained, "--fid", tmp_path / "none.pth")),
        ("matches no file", (trained, "--fid", network, "--data", tmp_path / "*.tar")),
        ("names 1 classes, the generator has 5", (trained, "--classes", few)),
        ("give --data", (trained, "--fid", network, "--tokenizer", weights)),
        ("is not finite: the training diverged", (astray,)),
        (
            "guidance 4, network corpus:",
            (overflows, "--fid", network, "--guidance", 4),
        ),
        ("pictures cannot be made a directory", (trained, "--out", few)),
    ]
    for expected, arguments in mistakes:
        given = (*arguments, "--num-samples", 4) if "--num-samples" not in arguments else arguments
        given = (*given, "--tokenizer", tokenizer) if "--tokenizer" not in arguments else given
        assert generate.main(["--out", str(tmp_path / "out"), "--steps", "1", *map(str, given)]) == 2, arguments
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert expected in line
    assert not (tmp_path / "out" / "generation.json").exists()


@pytest.mark.L0
def test_names_of_classes_are_whole_beside_the_samples(tmp_path: Path) -> None:
    panels = {"guidance 1": torch.zeros(8, 4, 64, 64, 3, dtype=torch.uint8)}
    plots.draw_sample_grid(panels, ["red circle"] * 6 + ["orange square", "yellow triangle"], tmp_path / "grid.png")
    pixels = np.array(Image.open(tmp_path / "grid.png").convert("L"))
    assert (pixels[:, :3] == 255).all(), "the left edge is empty"
    assert (pixels < 128).any()
