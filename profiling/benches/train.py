"""Training steps by the engine itself, data in memory: samples a second, MFU, and how far each phase is from its roof.

As in a run: ZeRO-1 on one rank, bf16, compiled blocks, all three objectives (without LPIPS, whose weights are not
shipped), captions as long as the web's. On a GPU `train` is VTP-L, `train_smaller` VTP-B and S, `overlap` VTP-L with
and without DeepSpeed's overlap_comm, each with as many images as were predicted to fit; on a CPU all are the tokenizer
of the scaling study, which shows that the bench runs and says nothing of those sizes.

    python -m profiling.benches.train      # predict IMAGES anew: minutes on a CPU, which traces every preset
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from configs import Config
from engine.assemble import Assembly
from model.captions import pack_captions
from model.objectives.comm import Comm
from model.rows import Rows
from profiling.benches.one_rank import assembled, configured, layout_of, one_rank, stepper
from profiling.kernel_time import kernel_time
from profiling.machine import device, precision_label, sized, training_dtype
from profiling.measurement import Recorder, print_now
from profiling.peaks import Bandwidth, Peak, bandwidth, measured_bandwidth, measured_peak, peak
from profiling.step.flops import step_flops
from profiling.step.peak import predict_peak
from profiling.step.phase_work import phase_work, update_work
from profiling.step.roofline import Roof, Work
from profiling.workload import random_batch

MAIN = sized(cuda="vtp_l", cpu="study_mini")
SMALLER = sized(cuda=("vtp_b", "vtp_s"), cpu=("study_mini",))
FITS = 0.85  # of the device's memory: a prediction counts tensors, an allocator takes more
GRAIN = 32  # clip images; ssl takes a quarter of them, rec an eighth
# Clip images of a step that is predicted to take FITS of so many GiB, by the command above.
IMAGES = {
    "vtp_l": {79: 64, 139: 160},
    "vtp_b": {79: 224, 139: 448},
    "vtp_s": {79: 448, 139: 832},
}
WARM_UP = 3  # steps: graphs, moments, the allocator's blocks
WORST = 3  # phases that the notes name


def run(recorder: Recorder) -> None:
    """One measurement."""
    with one_rank() as comm:
        _measure(MAIN, comm, recorder)


def run_smaller(recorder: Recorder) -> None:
    """One measurement a preset."""
    with one_rank() as comm:
        for name in SMALLER:
            _measure(name, comm, recorder)
            _free()


def run_overlap(recorder: Recorder) -> None:
    """One measurement of two engines, alike but for overlap_comm; each on the batch that `train` has."""
    config = configured(MAIN, images(MAIN))
    with one_rank() as comm:
        engines = {
            f"overlap_comm {'on' if is_on else 'off'}": assembled(config, comm, overlap_comm=is_on)
            for is_on in (False, True)
        }
        batch = random_batch(config)
        variants = {name: stepper(parts, batch, config) for name, parts in engines.items()}
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
    """As many clip images as are predicted to fit: memory grows with them by a line, which two predictions give."""
    configs = [configured(name, clip) for clip in (GRAIN, 2 * GRAIN)]
    one, two = (predict_peak(config, layout_of(config), 1, "sdpa", "cuda").device_bytes for config in configs)
    left = FITS * gib * 2**30 - (2 * one - two)
    return max(1, int(left / (two - one))) * GRAIN


def _measure(name: str, comm: Comm, recorder: Recorder) -> None:
    """With half of the images again and again, where memory turns out too small."""
    clip, halved = images(name), ""
    while True:
        try:
            return _timed(configured(name, clip), comm, recorder, halved)
        except torch.OutOfMemoryError:
            if clip <= GRAIN:
                raise
        _free()  # here, where the exception holds the step's tensors no more
        halved = f"{clip} images were predicted to fit and did not; "
        print_now(f"train: {halved}half of them now")
        clip //= 2


def _timed(config: Config, comm: Comm, recorder: Recorder, halved: str) -> None:
    """The speed, then the kernels, then the phases: what is known is saved before the next is measured."""
    begin = time.perf_counter()
    parts = assembled(config, comm)
    batch = random_batch(config)
    step = stepper(parts, batch, config)
    built = time.perf_counter() - begin
    print_now(f"train: {config.name}: {built:.1f} s to build the engine and its batch")
    slots = float(pack_captions(batch.captions).tokens_RC.numel())
    rows, backend = Rows.per_rank(config, 1), parts.engine.module.trunk.blocks[0].attn.backend
    flops = step_flops(config, rows, slots, backend=backend, device=device().type).model_flops
    best, memory = _peaks()
    workload = f"{_sizes(config)}, {precision_label()}, ZeRO-1, attention {backend}"
    found = recorder.measure(
        "train", workload, {"engine": step}, "engine", flops, best.flops_per_second, warmups=WARM_UP
    )
    [row] = found.rows
    spent = f"{built:.0f} s to build, {row.warm_up_s:.0f} s for {WARM_UP} steps of warm-up, compiling included"
    notes = [
        f"{halved}{rows.clip / row.median_ms * 1000:.1f} samples/s, {flops / rows.clip / 1e9:.1f} GFLOP each; "
        f"MFU against {best}; {spent}"
    ]
    recorder.save(replace(found, notes=tuple(notes)))
    kernels = kernel_time(step)
    notes += [
        f"kernels of a step: {kernels}",
        "the slowest: " + "; ".join(f"{name[:60]} {ms:.1f} ms" for name, ms in kernels.slowest),
    ]
    recorder.save(replace(found, notes=tuple(notes)))
    roof = Roof(best.flops_per_second, memory.bytes_per_second)
    notes += _gaps(_phase_ms(parts, step, recorder.rounds), _work(config, rows, backend, slots), roof)
    recorder.add(replace(found, notes=tuple(notes)))


def _sizes(config: Config) -> str:
    batch = config.batch
    return f"{config.name}: {batch.clip} clip, {batch.ssl} ssl, {batch.rec} rec images"


def _free() -> None:
    """Give the memory of what is referred to no more back to the device."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def _peaks() -> tuple[Peak, Bandwidth]:
    """A data sheet's where there is one, else what this device was measured at."""
    name = torch.cuda.get_device_name() if device().type == "cuda" else ""
    kind = "bf16" if training_dtype() == torch.bfloat16 else "fp32"
    return peak(name, kind) or measured_peak(kind), bandwidth(name) or measured_bandwidth()


def _phase_ms(parts: Assembly, step: Callable[[], object], rounds: int) -> dict[str, float]:
    """Milliseconds a step of every phase."""
    parts.phases.read()
    for _ in range(rounds):
        step()
    reading = parts.phases.read()
    return {phase: ms / reading.steps for phase, ms in reading.ms.items()}


def _work(config: Config, rows: Rows, backend: str, slots: float) -> dict[str, Work]:
    counted = "matmul" if backend == "matmul" else "sdpa"
    return phase_work(config, rows, 1, counted, slots) | update_work(config, layout_of(config), 1)


def _gaps(ms: dict[str, float], work: dict[str, Work], roof: Roof) -> Iterator[str]:
    """The phases that lose most against the roof, the worst first. Blocks are compiled: bytes are those of products."""
    least = {phase: 1000 * roof.seconds(each, is_fused=True) for phase, each in work.items()}
    lost = {phase: taken - least.get(phase, 0.0) for phase, taken in ms.items()}
    for phase in sorted(lost, key=lost.__getitem__, reverse=True)[:WORST]:
        at_least = f"at least {least[phase]:.1f}" if phase in least else "nothing that is counted"
        share = lost[phase] / sum(ms.values())
        yield f"phase {phase}: {ms[phase]:.1f} ms, {at_least} under the roof; {share:.0%} of the step is lost there"


if __name__ == "__main__":
    for preset, known in IMAGES.items():
        print_now(f"{preset}: { ({gib: predicted_images(preset, gib) for gib in known}) }")
