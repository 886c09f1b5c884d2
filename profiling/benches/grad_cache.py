"""A contrastive batch that no memory holds, on one rank by the gradient cache: time and peak memory of a whole step.

131,072 pairs in parts of 512 through vtp_s at 128 px on a GPU; 512 pairs in parts of 64 through the tokenizer of the
scaling study on a CPU. Beside it a step of one part: memory should hardly grow, and time by more than the parts, since
all but one of them are computed twice forward.
"""

from __future__ import annotations

import gc
from dataclasses import replace

from model.objectives.comm import Comm
from profiling.benches.one_rank import assembled, configured, one_rank, stepper
from profiling.machine import precision_label, sized
from profiling.measurement import Measurement, Recorder
from profiling.workload import random_batch

PRESET, PAIRS, PART = sized(cuda=("vtp_s", 131_072, 512), cpu=("study_mini", 512, 64))
SMALLER = sized(cuda=("views.image_size=128", "views.global_size=128", "views.local_size=64"), cpu=())


def run(recorder: Recorder) -> None:
    """Two measurements: one part of the batch alone, and the whole batch."""
    part, pairs = (PART // 4, PART // 2) if recorder.is_dry else (PART, PAIRS)
    with one_rank() as comm:
        parts = _measure(comm, part, part, recorder)
        recorder.add(parts)
        gc.collect()
        whole = _measure(comm, pairs, part, recorder)
    speeds = (f"{number / found.rows[0].median_ms * 1000:.0f}" for number, found in ((part, parts), (pairs, whole)))
    one, all_of_it = parts.rows[0].peak_mib or 0.0, whole.rows[0].peak_mib or 0.0
    note = (
        "{} pairs/s in one part, {} in {} parts; peak beyond the states {:.0f} -> {:.0f} MiB".format(
            *speeds, pairs // part, one, all_of_it
        ),
    )
    recorder.add(replace(whole, notes=note))


def _measure(comm: Comm, pairs: int, part: int, recorder: Recorder) -> Measurement:
    # ssl and rec as large as they are with one part, whatever the number of pairs.
    config = configured(PRESET, part, *SMALLER, f"batch.clip={pairs}", f"system.clip.micro_batches={pairs // part}")
    step = stepper(assembled(config, comm), random_batch(config), config)
    workload = f"{PRESET}, {pairs} pairs in {pairs // part} parts, {precision_label()}, a whole step"
    return recorder.measure("grad_cache", workload, {"engine": step}, "engine", warmups=1)
