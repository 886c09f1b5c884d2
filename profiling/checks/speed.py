"""Two quick measurements: matrix products, and the loader on a few pictures drawn for the purpose."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from profiling.checks.finding import Finding

SAMPLES, BATCH = 64, 16  # of the loader's corpus
DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def products() -> Iterator[Finding]:
    """The fastest square product in bf16 and fp32."""
    import torch

    from profiling.machine import device, matmul_peak

    speeds = {dtype: matmul_peak(dtype) for dtype in (torch.bfloat16, torch.float32)}
    for dtype, speed in speeds.items():
        name = str(dtype).removeprefix("torch.")
        yield Finding(f"product {name}", "ok", f"{speed / 1e12:.2f} TFLOP/s on the {device().type.upper()}")
    ratio = speeds[torch.bfloat16] / speeds[torch.float32]
    if ratio < 1:
        yield Finding(
            "bf16",
            "absent",
            f"bf16 is slower than fp32 here ({ratio:.2f} times its speed): this processor emulates it",
            "train with optim.precision=fp32 on this machine",
        )


def loading() -> Iterator[Finding]:
    """Shards written, indexed, read, decoded and cut to the demo's views."""
    from configs import load_config
    from data.captions import CaptionEncoder
    from data.corpus import build
    from data.loader import Loader
    from data.synthetic.plan import synthetic_plan

    with TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        build(corpus, synthetic_plan(SAMPLES, held_out=0, size=64, shard_size=SAMPLES, seed=0, workers=1))
        config = load_config(
            DEMO,
            [
                f"data.train=[{corpus}/train-*.tar]",
                f"data.tokenizer={corpus}/tokenizer.json",
                "data.streams=1",
                f"batch={{clip: {BATCH}, ssl: {BATCH // 4}, rec: {BATCH // 2}}}",
            ],
        )
        encoder = CaptionEncoder(config.data.tokenizer, config.model.text.context)
        with closing(Loader(config, encoder)) as loader:
            loader.batch(0)  # warms up
            begin, steps = time.perf_counter(), SAMPLES // BATCH
            found = sum(len(loader.batch(step).images) for step in range(1, steps + 1))
            seconds = time.perf_counter() - begin
    threads = config.system.loader.threads
    assert found == SAMPLES, f"{found} of {SAMPLES} images came"
    said = (
        f"{found / seconds:.0f} images/s with all views of the demo, {threads} threads ({SAMPLES} drawn scenes, 64 px)"
    )
    yield Finding("loader", "ok", said, is_needed=True)
