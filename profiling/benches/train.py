"""Training steps by the engine itself, data in memory: samples a second, MFU, and how far each phase is from its roof.

As in a run: ZeRO-1 on one rank, bf16, compiled blocks, all three objectives (without LPIPS, whose weights are not
shipped), captions as long as the web's. On a GPU the released sizes with as many images as are predicted to fit; on a
CPU the tokenizer of the scaling study, which shows that the bench runs and says nothing of those sizes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from configs import Config
from engine.assemble import Assembly, assemble
from model.captions import pack_captions
from model.objectives.comm import Comm
from model.rows import Rows
from profiling.benches.one_rank import configured, layout_of, one_rank, stepper
from profiling.kernel_time import kernel_time
from profiling.machine import device, precision_label, sized, training_dtype
from profiling.measurement import Measurement, measure
from profiling.peaks import Bandwidth, Peak, bandwidth, measured_bandwidth, measured_peak, peak
from profiling.step.flops import step_flops
from profiling.step.peak import predict_peak
from profiling.step.phase_work import phase_work, update_work
from profiling.step.roofline import Roof, Work
from profiling.workload import random_batch

PRESETS = sized(cuda=("vtp_l", "vtp_b", "vtp_s"), cpu=("study_mini",))
FITS = 0.85  # of the device's memory: a prediction counts tensors, an allocator takes more
GRAIN = 32  # clip images; ssl takes a quarter of them, rec an eighth
WARM_UP = 3  # steps: graphs, moments, the allocator's blocks
WORST = 3  # phases that the notes name


def run(rounds: int) -> list[Measurement]:
    """One measurement a preset."""
    with one_rank() as comm:
        return [_measure(name, comm, rounds) for name in PRESETS]


def _measure(name: str, comm: Comm, rounds: int) -> Measurement:
    """With half of the images again and again, where memory turns out too small."""
    clip, halved = _most_images(name), ""
    while True:
        try:
            return _timed(configured(name, clip), comm, rounds, halved)
        except torch.OutOfMemoryError:
            if clip <= GRAIN:
                raise
        gc.collect()  # here, where the exception holds the step's tensors no more
        torch.cuda.empty_cache()
        halved = f"{clip} images were predicted to fit and did not; "
        clip //= 2


def _most_images(name: str) -> int:
    """A multiple of GRAIN: memory grows with the images by a line, which two predictions give."""
    if device().type != "cuda":
        return 2 * GRAIN
    configs = [configured(name, clip) for clip in (GRAIN, 2 * GRAIN)]
    one, two = (predict_peak(config, layout_of(config), 1, "sdpa", "cuda").device_bytes for config in configs)
    left = FITS * torch.cuda.get_device_properties(0).total_memory - (2 * one - two)
    return max(1, int(left / (two - one))) * GRAIN


def _timed(config: Config, comm: Comm, rounds: int, halved: str) -> Measurement:
    parts = assemble(config, layout_of(config), comm)
    step = stepper(parts, config)
    slots = float(pack_captions(random_batch(config).captions).tokens_RC.numel())
    rows, backend = Rows.per_rank(config, 1), parts.engine.module.trunk.blocks[0].attn.backend
    flops = step_flops(config, rows, slots, backend=backend, device=device().type).model_flops
    best, memory = _peaks()
    sizes = f"{rows.clip} clip, {rows.ssl} ssl, {rows.rec} rec images"
    workload = f"{config.name}: {sizes}, {precision_label()}, ZeRO-1, attention {backend}"
    found = measure(
        "train", workload, {"engine": step}, "engine", rounds, flops, best.flops_per_second, warmups=WARM_UP
    )
    speed = rows.clip / found.rows[0].median_ms * 1000
    kernels = kernel_time(step)
    roof = Roof(best.flops_per_second, memory.bytes_per_second)
    notes = (
        f"{halved}{speed:.1f} samples/s, {flops / rows.clip / 1e9:.1f} GFLOP each; MFU against {best}",
        f"kernels of a step: {kernels}",
        "the slowest: " + "; ".join(f"{name[:60]} {ms:.1f} ms" for name, ms in kernels.slowest),
        *_gaps(_phase_ms(parts, step, rounds), _work(config, rows, backend, slots), roof),
    )
    return replace(found, notes=notes)


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
