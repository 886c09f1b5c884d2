"""Benches of whole training steps by the engine, data in memory: speed and roofline, overlap_comm, gradient cache.

As in a run: ZeRO-1 on one rank, bf16, compiled blocks, all three objectives (without LPIPS, whose weights are not
shipped), captions as long as the web's. On a GPU `train` is VTP-L, `train_smaller` VTP-B and S, `overlap` VTP-L with
and without DeepSpeed's overlap_comm, each with as many images as were predicted to fit; on a CPU all are the tokenizer
of the scaling study, which only shows that the bench runs.

    python -m profiling.benches.train      # predict IMAGES anew: minutes on a CPU, which traces every preset

`grad_cache` trains on a contrastive batch that fits no memory: 131,072 pairs in parts of 512 through vtp_s at 128 px on
a GPU; 512 pairs in parts of 64 through the tokenizer of the scaling study on a CPU. Beside it a step of one part:
memory should hardly grow, and time by more than the parts, since all but one of them are computed twice forward.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from configs import Config
from engine.build import PretrainParts
from model.losses.comm import Comm
from model.packing import RankBatchSizes
from model.text import pack_captions
from profiling.benches.recorder import BenchRecorder, BenchResult, print_now
from profiling.benches.workload import (
    build_on_one_rank,
    one_rank,
    preset_config,
    random_batch,
    repeated_step,
    zero1_ds_config,
)
from profiling.cost.peak_memory import predict_peak
from profiling.cost.roofline import PhaseWork, Roof, phase_work, update_work
from profiling.cost.step_flops import step_flops
from profiling.instruments.machine import (
    MemoryBandwidth,
    PeakFlops,
    bandwidth,
    by_device,
    device,
    measured_bandwidth,
    measured_peak,
    peak,
    precision_label,
    training_dtype,
)
from profiling.instruments.profiler import kernel_time

MAIN = by_device(cuda="vtp_l", cpu="study_mini")
SMALLER = by_device(cuda=("vtp_b", "vtp_s"), cpu=("study_mini",))
FITS = 0.85  # of the device's memory: a prediction counts tensors, an allocator takes more
GRAIN = 32  # clip images; ssl takes a quarter of them, rec an eighth
# Clip images of a step that is predicted to take FITS of so many GiB, by the command above.
IMAGES = {
    "vtp_l": {79: 64, 139: 160},
    "vtp_b": {79: 224, 139: 448},
    "vtp_s": {79: 448, 139: 832},
}
WARM_UP = 3  # steps: graphs, moments, the allocator's blocks
NUM_WORST = 3  # phases in the notes


def bench_train(recorder: BenchRecorder) -> None:
    """Speed, kernels and worst phases of MAIN."""
    with one_rank() as comm:
        _measure(MAIN, comm, recorder)


def bench_train_smaller(recorder: BenchRecorder) -> None:
    """The same for smaller presets."""
    with one_rank() as comm:
        for name in SMALLER:
            _measure(name, comm, recorder)
            _free()


def bench_overlap(recorder: BenchRecorder) -> None:
    """Two engines that differ in overlap_comm only, on the batch of `train`."""
    config = preset_config(MAIN, images(MAIN))
    with one_rank() as comm:
        engines = {
            f"overlap_comm {'on' if is_on else 'off'}": build_on_one_rank(config, comm, overlap_comm=is_on)
            for is_on in (False, True)
        }
        batch = random_batch(config)
        variants = {name: repeated_step(parts, batch, config) for name, parts in engines.items()}
        workload = f"{_sizes(config)}, {precision_label()}, ZeRO-1"
        recorder.add(recorder.measure("overlap", workload, variants, "overlap_comm off", warmups=WARM_UP))


def images(name: str) -> int:
    """Clip images of a step of this preset on this device."""
    if device().type != "cuda":
        return 2 * GRAIN
    total = torch.cuda.get_device_properties(0).total_memory
    fitting = [most for gib, most in IMAGES[name].items() if gib * 2**30 <= total]
    return max(fitting, default=GRAIN)


def predicted_images(name: str, gib: int) -> int:
    """Clip images that are predicted to fit: memory grows linearly with them, as two predictions show."""
    configs = [preset_config(name, clip) for clip in (GRAIN, 2 * GRAIN)]
    one, two = (predict_peak(config, zero1_ds_config(config), 1, "sdpa", "cuda").device_bytes for config in configs)
    left = FITS * gib * 2**30 - (2 * one - two)
    return max(1, int(left / (two - one))) * GRAIN


def _measure(name: str, comm: Comm, recorder: BenchRecorder) -> None:
    """Measure, with half of the images again where memory is too small."""
    clip, halved = images(name), ""
    while True:
        try:
            return _timed(preset_config(name, clip), comm, recorder, halved)
        except torch.OutOfMemoryError:
            if clip <= GRAIN:
                raise
        _free()  # here, where the exception holds the step's tensors no more
        halved = f"{clip} images were predicted to fit and did not; "
        print_now(f"train: {halved}half of them now")
        clip //= 2


def _timed(config: Config, comm: Comm, recorder: BenchRecorder, halved: str) -> None:
    """Measure speed, then kernels, then phases; each is saved before the next is measured."""
    begin = time.perf_counter()
    parts = build_on_one_rank(config, comm)
    batch = random_batch(config)
    step = repeated_step(parts, batch, config)
    built = time.perf_counter() - begin
    print_now(f"train: {config.name}: {built:.1f} s to build the engine and its batch")
    slots = float(pack_captions(batch.captions).tokens_RC.numel())
    rows, backend = RankBatchSizes.per_rank(config, 1), parts.engine.module.trunk.blocks[0].attn.backend
    flops = step_flops(config, rows, slots, backend=backend, device=device().type).model_flops
    best, memory = _peaks()
    workload = f"{_sizes(config)}, {precision_label()}, ZeRO-1, attention {backend}"
    result = recorder.measure(
        "train", workload, {"engine": step}, "engine", flops, best.flops_per_second, warmups=WARM_UP
    )
    [row] = result.rows
    spent = f"{built:.0f} s to build, {row.warm_up_s:.0f} s for {WARM_UP} steps of warm-up, compiling included"
    notes = [
        f"{halved}{rows.clip / row.median_ms * 1000:.1f} samples/s, {flops / rows.clip / 1e9:.1f} GFLOP each; "
        f"MFU against {best}; {spent}"
    ]
    recorder.save(replace(result, notes=tuple(notes)))
    kernels = kernel_time(step)
    notes += [
        f"kernels of a step: {kernels}",
        "the slowest: " + "; ".join(f"{name[:60]} {ms:.1f} ms" for name, ms in kernels.slowest),
    ]
    recorder.save(replace(result, notes=tuple(notes)))
    roof = Roof(best.flops_per_second, memory.bytes_per_second)
    notes += _gaps(_phase_ms(parts, step, recorder.rounds), _work(config, rows, backend, slots), roof)
    recorder.add(replace(result, notes=tuple(notes)))


def _sizes(config: Config) -> str:
    batch = config.batch
    return f"{config.name}: {batch.clip} clip, {batch.ssl} ssl, {batch.rec} rec images"


def _free() -> None:
    """Give unreferenced memory back to the device."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def _peaks() -> tuple[PeakFlops, MemoryBandwidth]:
    """By data sheet where there is one, else measured."""
    name = torch.cuda.get_device_name() if device().type == "cuda" else ""
    kind = "bf16" if training_dtype() == torch.bfloat16 else "fp32"
    return peak(name, kind) or measured_peak(kind), bandwidth(name) or measured_bandwidth()


def _phase_ms(parts: PretrainParts, step: Callable[[], object], rounds: int) -> dict[str, float]:
    """Milliseconds of every phase of a step."""
    parts.phases.read()
    for _ in range(rounds):
        step()
    reading = parts.phases.read()
    return {phase: ms / reading.steps for phase, ms in reading.ms.items()}


def _work(config: Config, rows: RankBatchSizes, backend: str, slots: float) -> dict[str, PhaseWork]:
    counted = "matmul" if backend == "matmul" else "sdpa"
    return phase_work(config, 1, counted, slots) | update_work(config, zero1_ds_config(config), 1)


def _gaps(ms: dict[str, float], work: dict[str, PhaseWork], roof: Roof) -> Iterator[str]:
    """Notes on the phases farthest from the roof, the worst first. Blocks are compiled: bytes are those of products."""
    least = {phase: 1000 * roof.seconds(each, is_fused=True) for phase, each in work.items()}
    lost = {phase: taken - least.get(phase, 0.0) for phase, taken in ms.items()}
    for phase in sorted(lost, key=lost.__getitem__, reverse=True)[:NUM_WORST]:
        at_least = f"at least {least[phase]:.1f}" if phase in least else "nothing that is counted"
        share = lost[phase] / sum(ms.values())
        yield f"phase {phase}: {ms[phase]:.1f} ms, {at_least} under the roof; {share:.0%} of the step is lost there"


CACHE_PRESET, PAIRS, PART = by_device(cuda=("vtp_s", 131_072, 512), cpu=("study_mini", 512, 64))
SMALL_VIEWS = by_device(cuda=("views.image_size=128", "views.global_size=128", "views.local_size=64"), cpu=())


def bench_grad_cache(recorder: BenchRecorder) -> None:
    """One part of the batch alone, and the whole batch."""
    part, pairs = (PART // 4, PART // 2) if recorder.is_dry else (PART, PAIRS)
    with one_rank() as comm:
        parts = _measure_grad_cache(comm, part, part, recorder)
        recorder.add(parts)
        gc.collect()
        whole = _measure_grad_cache(comm, pairs, part, recorder)
    speeds = (f"{number / found.rows[0].median_ms * 1000:.0f}" for number, found in ((part, parts), (pairs, whole)))
    one, all_of_it = parts.rows[0].peak_mib or 0.0, whole.rows[0].peak_mib or 0.0
    note = (
        "{} pairs/s in one part, {} in {} parts; peak beyond the states {:.0f} -> {:.0f} MiB".format(
            *speeds, pairs // part, one, all_of_it
        ),
    )
    recorder.add(replace(whole, notes=note))


def _measure_grad_cache(comm: Comm, pairs: int, part: int, recorder: BenchRecorder) -> BenchResult:
    # ssl and rec as large as they are with one part, whatever the number of pairs.
    config = preset_config(
        CACHE_PRESET, part, *SMALL_VIEWS, f"batch.clip={pairs}", f"system.clip.micro_batches={pairs // part}"
    )
    step = repeated_step(build_on_one_rank(config, comm), random_batch(config), config)
    workload = f"{CACHE_PRESET}, {pairs} pairs in {pairs // part} parts, {precision_label()}, a whole step"
    return recorder.measure("grad_cache", workload, {"engine": step}, "engine", warmups=1)


if __name__ == "__main__":
    for preset, known in IMAGES.items():
        print_now(f"{preset}: { ({gib: predicted_images(preset, gib) for gib in known}) }")
