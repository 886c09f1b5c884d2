"""What the planner predicts beside what is measured here, and beside what others have published.

Each case is a whole step of one process, forward to EMA, eager or compiled. In every round the machine's rates are
measured, then the step: on a shared machine both see the same moment. The published figures are of hardware that is not
here; their predictions use data sheets and the assumptions of profiling/plan/rates.py, none of which was fitted to
them.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import configs
from configs import Config, load_config
from engine.assemble import LEAVES
from engine.host_memory import keep_freed_blocks
from engine.recompute import recompute_blocks
from engine.step import model_inputs
from engine.zero import DTYPES
from kernels.attention import resolve
from model.pretrainer import Pretrainer
from model.rows import Rows
from profiling.benches.step import Step, shared_loss
from profiling.clock import Times, alternate
from profiling.machine import device
from profiling.measurement import Measurement, Recorder, Row, print_now
from profiling.plan.calibration import measured_rates
from profiling.plan.page import cluster_of
from profiling.plan.search import Plan, search
from profiling.plan.step_time import step_time
from profiling.plan.work import Build, step_work
from profiling.workload import random_batch, small_step

PRESETS = Path(configs.__file__).parent
LINK = "nvlink,ib400"
WORKLOAD = "a step of one process; its prediction from rates measured in the same round"
# DINOv3's ViT-7B as its training config has it: no clip, no rec; one head here stands for its two.
DINOV3 = (
    "objectives.clip.weight=0", "objectives.rec.weight=0", "batch.rec=0", "batch.clip=4096", "batch.ssl=4096",
    "data.streams=256", "model.trunk.mlp_ratio=3", "model.trunk.drop_path=0.4", "model.trunk.layer_scale=1e-5",
    "model.trunk.norm=layernorm", "model.registers=4", "views.local_size=112", "model.prototypes.num=262144",
    "model.prototypes.hidden=8192", "model.prototypes.bottleneck=512",
)  # fmt: skip
WITHOUT_FILES = "objectives.rec.lpips_weights=none"


@dataclass(frozen=True)
class Case:
    """A step that this machine takes."""

    name: str
    config: Config
    is_compiled: bool = False

    @property
    def attention(self) -> str:
        """The backend that auto becomes on this machine, in the config's precision."""
        return resolve("auto", device(), DTYPES[self.config.optim.precision]).name

    @property
    def rows(self) -> Rows:
        """One process has the whole batch."""
        return Rows.per_rank(self.config, 1)

    def step(self) -> Step:
        """The step to be timed, on random pixels and captions."""
        model = Pretrainer(self.config, self.rows, self.attention)
        recompute_blocks(model, self.config.system.activation_checkpointing, tuple(LEAVES))
        batch = random_batch(self.config)
        return Step(model, self.config, batch, model_inputs, shared_loss, is_compiled=self.is_compiled)

    def predicted(self, captions: Tensor) -> float:
        """Seconds, from rates measured now."""
        rates = measured_rates(self.config, self.rows, self.attention, device())
        build = Build(self.attention, self.is_compiled, device().type)
        return step_time(step_work(self.config, self.rows, build, captions.numel()), rates, [], None, 1).seconds


def cases() -> list[Case]:
    """Eager, compiled, recomputed, and another architecture in float32."""
    demo = load_config(PRESETS / "demo.yaml", ["data.streams=1"])
    return [
        Case("vtp_s, eager", small_step()),
        Case("vtp_s, compiled", small_step(), is_compiled=True),
        Case("vtp_s, eager, blocks computed again", small_step("system.activation_checkpointing=full")),
        Case("demo, eager, fp32", demo),
    ]


def run(recorder: Recorder) -> None:
    """One measurement; its notes compare."""
    keep_freed_blocks(device())
    rows, notes = [], []
    for case in cases():
        row, note = compare(case, recorder.rounds)
        rows.append(row)
        notes.append(note)
        print_now(f"plan: {note}")
        recorder.save(Measurement("plan", WORKLOAD, rows[0].variant, tuple(rows), tuple(notes)))
    recorder.add(Measurement("plan", WORKLOAD, rows[0].variant, tuple(rows), (*notes, *published())))


def compare(case: Case, rounds: int) -> tuple[Row, str]:
    """Measured seconds, and the predicted ones as a share of them."""
    step = case.step()
    captions = step.inputs(step.batch, device())["captions"].tokens_RC
    alternate({"warm up": step}, rounds=1, warmups=1)
    measured: list[float] = []
    ratios: list[float] = []
    for _ in range(rounds):
        before = case.predicted(captions)
        measured += alternate({case.name: step}, rounds=1, warmups=0)[case.name].seconds
        ratios.append((before + case.predicted(captions)) / 2 / measured[-1])
    times, ratio = Times(tuple(measured)), statistics.median(ratios)
    note = f"{case.name}: predicted over measured {ratio:.2f} (rounds: {', '.join(f'{r:.2f}' for r in ratios)})"
    return Row(case.name, 1000 * times.median, times.spread, 1.0, None, None, rounds), note


def published() -> list[str]:
    """The two figures that others have given, each beside its prediction."""
    dinos = plans("vtp_7b", "h100", 256, DINOV3)
    shipped = next(plan for plan in dinos if plan.variant.stage == 3 and plan.variant.persistence is None)
    layouts = " and ".join(f"{plan.samples_per_second / 256:.1f} ({name(plan)})" for plan in (dinos[0], shipped))
    vtp = plans("vtp_l", "h800", 256, ("batch.clip=32768", "batch.ssl=8192", "batch.rec=4096", WITHOUT_FILES))[0]
    two_days = 2 * 86_400 * vtp.samples_per_second
    return [
        f"DINOv3 ViT-7B on 256 H100: predicted {layouts} images/s a GPU, the fastest layout and the shipped ZeRO-3; "
        "published 61,440 GPU-hours for 1M steps of 4,096, which is 18.5",
        f"VTP-L on 256 H800, clip 32,768: predicted {vtp.samples_per_second:,.0f} samples/s ({name(vtp)}), so "
        f"{two_days / 1e9:.1f}B samples in the two days that its author names; how many it saw is not published",
    ]


def plans(preset: str, gpu: str, gpus: int, overrides: tuple[str, ...]) -> list[Plan]:
    """Those that fit first, by speed."""
    config = load_config(PRESETS / f"{preset}.yaml", overrides)
    return search(config, cluster_of(gpu, gpus, LINK, config), samples=1e9)


def name(plan: Plan) -> str:
    """Of a layout, in a few words."""
    variant = plan.variant
    return f"{variant.name}, checkpointing {variant.checkpointing}, {variant.linear}, MFU {plan.mfu:.2f}"
