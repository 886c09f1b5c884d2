"""Build a training engine from a config, in the one order that works.

order                       the error you get otherwise
1. construct                (ZeRO-3 inside its own context) a 7B model does not fit on one device
2. initialise               after partitioning, gathered one by one; else all ranks start apart
3. teacher = student        before the optimizer; else the first targets are noise
4. FP8 in the blocks        before 5 and 6 wrap their forwards; else they go on with the bf16 products
5. activation checkpointing before compiling; else the compiled block is one operation, of which nothing is kept
6. compile the blocks       before ZeRO hangs its hooks on modules; else each hook breaks the graph
7. mark blocks as leaves    before `initialize`; else ZeRO-3 hooks the layers inside a compiled block
8. optimizer, then ZeRO     ZeRO flattens the groups it is given
9. the rule on skipped steps  wraps ZeRO's step, which exists only now; else steps with a NaN gradient are taken
10. the EMA teacher         reads fp32 shards, which exist only now
11. phases are timed        before ZeRO's hooks, a child's time would have the gather of its parameters in it

`build_engine` is 1 to 9 for any model; `build_pretraining` is all of it for pre-training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs import Config, RunConfig, UserError
from configs.deepspeed import offloads_optimizer, overlap_summary, scale_out_summary, uses_deepcompile, zero_stage
from configs.run import Optim
from engine import distributed, optim, zero
from engine.block_transforms import checkpoint_activations, convert_to_fp8
from engine.checkpoint.contents import TrainState
from engine.checkpoint.tensor_ranges import MAIN
from engine.distributed import gather_comm
from engine.ema import CentreState, TeacherEma, WeightEma
from engine.health.anomalies import GradNormGuard
from engine.initial_weights import initial_weights
from engine.process_settings import enforce_determinism, keep_freed_blocks
from engine.random_draws import DropPathDraws, RecNoiseDraws, drop_path_draws, rec_noise_draws
from engine.reporting.phase_timing import TimedComm, time_calls, time_children
from engine.reporting.step_meter import GradFractions
from kernels.attention import AttentionBackend, resolve_attention
from model.block import Block
from model.conv import ResBlock
from model.frozen import Dinov2Block, FrozenNetwork, describe_alignment, load_frozen
from model.initialise import initialise_parameter
from model.losses.comm import Comm
from model.losses.perceptual import LpipsDistance
from model.losses.total import TeacherCentres
from model.packing import RankBatchSizes
from model.pretrainer import Pretrainer, student_teacher_pairs
from model.text import TextBlock
from profiling.instruments.phases import PhaseTimer, clock_of

MAX_GRAPHS = 32  # of one block kind; captions meet a few shapes a run (model/text.py), torch's own limit is 8
BLOCK_CLASSES: tuple[type[nn.Module], ...] = (Block, TextBlock, ResBlock)
# Child module of the Pretrainer -> phase that its forward is timed as.
PHASE_OF_CHILD = {"teacher": "teacher", "trunk": "trunk", "text": "text", "decoder": "decoder"}
PHASE_OF_CHILD |= dict.fromkeys(("bottleneck", "align", "clip", "prototypes"), "heads")


@dataclass(frozen=True)
class BuiltEngine:
    """A model under DeepSpeed."""

    engine: Any
    guard: GradNormGuard  # which of its optimizer steps are skipped
    choices: dict[str, str]  # what every "auto" became, and why


@dataclass(frozen=True)
class PretrainParts:
    """Everything a step of pre-training needs on this rank."""

    engine: Any  # DeepSpeed's
    grad_norm_guard: GradNormGuard  # which optimizer steps are skipped
    grad_fractions: GradFractions
    teacher: TeacherEma | None
    average: WeightEma | None
    comm: Comm
    perceptual: LpipsDistance | None
    frozen: FrozenNetwork | None  # the encoder of objectives.rec.align
    centres: TeacherCentres | None  # at the start
    drop_path: DropPathDraws | None
    rec_noise: RecNoiseDraws | None
    device: torch.device
    phases: PhaseTimer
    choices: dict[str, str]  # what every "auto" became, and why

    def train_state(self, centre: CentreState | None = None) -> TrainState:
        """Return what a checkpoint holds; `centre` is that of the last step, with objectives.ssl.targets=centering."""
        stateful = (self.teacher, self.average, self.grad_norm_guard, centre)
        return TrainState({MAIN: self.engine}, [each for each in stateful if each is not None])


def build_pretraining(
    config: Config,
    ds_config: dict[str, Any],
    comm: Comm,
    resume: bool = False,
    draw_device: str | torch.device = "cpu",
) -> PretrainParts:
    """Build the model, its engine and what a step needs beside them on this rank; a collective.

    `comm` is that of `distributed.start`. With `resume` the caller loads a checkpoint next. First weights are drawn on
    `draw_device`: on the CPU they are the same numbers whatever the run's device is; on a GPU others, in a second.
    """
    device = distributed.device()
    drop_path = drop_path_draws(config, comm.rank, comm.world_size)
    rec_noise = rec_noise_draws(config, comm.rank, comm.world_size)
    comm, gather_choice = gather_comm(comm, config.system.gather, config.system.timeout_minutes)
    rows = RankBatchSizes.per_rank(config, comm.world_size)
    built = build_engine(
        config,
        ds_config,
        device,
        make_model=lambda attention: Pretrainer(config, rows, attention, comm),
        initialise=lambda model: initialise(model, config, resume, draw_device),
        block_classes=BLOCK_CLASSES,
        convert_linears=lambda model: convert_to_fp8(model, config, device),
    )
    engine = built.engine
    teacher = TeacherEma(student_teacher_pairs(engine.module)) if engine.module.teacher is not None else None
    timed_calls = {} if teacher is None else {"ema": (teacher, "update")}
    phases = time_phases(config, device, engine, PHASE_OF_CHILD, timed_calls)
    choices = {
        "gather of features": gather_choice,
        "drop path": f"a branch sees {drop_path}" if drop_path else "off (model.trunk.drop_path=0)",
        "rec": f"a step {rec_noise}" if rec_noise else "from whole images and exact latents (objectives.rec)",
        "weights of the run": "the last step's (ema=null)"
        if config.ema is None
        else f"an average (ema={config.ema:g})",
        "alignment": describe_alignment(config.objectives.rec.align),
    }
    return PretrainParts(
        engine=engine,
        grad_norm_guard=built.guard,
        grad_fractions=GradFractions(config.system.checks.shares_every, device),
        teacher=teacher,
        average=None if config.ema is None else WeightEma(engine, MAIN),
        comm=TimedComm(comm, phases),
        perceptual=_perceptual(config, device),
        frozen=_frozen(config, device),
        centres=_centres(config, device),
        drop_path=drop_path,
        rec_noise=rec_noise,
        device=device,
        phases=phases,
        choices=built.choices | choices,
    )


def build_engine(
    config: RunConfig,
    ds_config: dict[str, Any],
    device: torch.device,
    *,
    make_model: Callable[[str], nn.Module],
    initialise: Callable[[Any], str],
    block_classes: tuple[type[nn.Module], ...],
    convert_linears: Callable[[Any], str] | None = None,
    optim_settings: Optim | None = None,
    name: str = MAIN,
) -> BuiltEngine:
    """Take steps 1 to 9 of the module's table; a collective.

    `make_model` takes the name of the resolved attention backend. `initialise` sets the first weights and
    `convert_linears` puts FP8 into blocks; both return a summary. `optim_settings` are those of this engine where
    config.optim is another's; `name` is the engine's in a checkpoint.
    """
    determinism = enforce_determinism(config, device)
    settings = config.optim if optim_settings is None else optim_settings
    optimizer_choice = optim.resolve(config, ds_config, device)
    attention = _attention(config, device)
    is_compiled, compile_reason = resolve_compile(config, device)
    is_deepcompiled = uses_deepcompile(ds_config)
    if is_deepcompiled:
        is_compiled, compile_reason = False, "the whole model by DeepCompile (--ds_config)"
    with zero.construction(ds_config, config.optim.precision, device, config.system.timeout_minutes):
        model = make_model(attention.name)
    origin = initialise(model)
    linears = f"{config.optim.precision} (optim.precision)" if convert_linears is None else convert_linears(model)
    checkpoint_activations(model, config.system.activation_checkpointing, block_classes)
    if is_compiled:
        compile_blocks(model, block_classes)
    if not is_deepcompiled:
        present = [kind for kind in block_classes if any(isinstance(module, kind) for module in model.modules())]
        zero.mark_leaves(model, present)
    optimizer = optim.build(model, settings, optimizer_choice.name)
    engine = zero.initialize(model, optimizer, ds_config)
    guard = GradNormGuard(config.health, torch.device("cpu") if offloads_optimizer(ds_config) else device, name)
    zero.skip_steps_where(guard, engine, optimizer)
    return BuiltEngine(
        engine,
        guard,
        {
            "weights": origin,
            "attention": f"{attention.name} ({attention.reason})",
            "linear": linears,
            "compile": f"{'on' if is_compiled else 'off'} ({compile_reason})",
            "optimizer": f"{settings.kind} by {optimizer_choice.name} ({optimizer_choice.reason})",
            "zero": f"stage {zero_stage(ds_config)}{scale_out_summary(ds_config)} (--ds_config)",
            "gradients": overlap_summary(ds_config, distributed.world_size()),
            "activation checkpointing": f"{config.system.activation_checkpointing} (system.activation_checkpointing)",
            "precision": f"{config.optim.precision} (optim.precision)",
            "host memory": keep_freed_blocks(device),
            "deterministic": determinism,
        },
    )


def time_phases(
    config: RunConfig,
    device: torch.device,
    engine: Any,
    children: Mapping[str, str],
    calls: Mapping[str, tuple[object, str]],
) -> PhaseTimer:
    """Start to time the phases of a step; return their recorder.

    Timed are the forward of the model's `children` (name -> phase), what the engine does, and `calls` (phase -> owner
    and method). Nothing is timed with system.phases off, unless a profiler window wants the names.
    """
    phases = PhaseTimer(clock_of(device) if config.system.phases else None)
    if config.system.phases or config.profile.steps is not None:
        time_children(phases, engine.module, children)
        time_calls(phases, engine)
        for phase, (owner, method) in calls.items():
            phases.wrap(phase, owner, method)
    return phases


def initialise(model: Pretrainer, config: Config, resume: bool = False, draw_device: str | torch.device = "cpu") -> str:
    """Initialise all parameters (teacher = student); return where they came from."""
    shapes = {name: tuple(zero.full_shape(parameter)) for name, parameter in model.named_parameters()}
    with initial_weights(config, shapes, resume) as initial:

        def fill(name: str, tensor: torch.Tensor) -> None:
            if not initial.fill(name, tensor):
                initialise_parameter(name, tensor, config, draw_device)

        fill_parameters(model.named_parameters(), fill)
        return initial.summary


def fill_parameters(parameters: Iterable[tuple[str, nn.Parameter]], fill: Callable[[str, torch.Tensor], None]) -> None:
    """Call `fill(name, tensor)` for each parameter, gathered one at a time; set what it writes. A collective."""
    for name, parameter in parameters:
        with zero.gathered([parameter], write=True):
            if distributed.is_first() or not zero.is_partitioned(parameter):
                fill(name, parameter.data)


def _attention(config: RunConfig, device: torch.device) -> AttentionBackend:
    try:
        return resolve_attention(
            config.system.attention, device, zero.DTYPES[config.optim.precision], config.system.deterministic
        )
    except ValueError as error:
        raise UserError(f"system.attention={config.system.attention}: {error}") from None


def resolve_compile(config: RunConfig, device: torch.device) -> tuple[bool, str]:
    """Return whether blocks are compiled, and why."""
    if config.system.compile != "auto":
        return config.system.compile == "on", "named in the config"
    if config.system.linear == "fp8_te":
        return False, "auto: Transformer Engine cannot be traced (system.linear=fp8_te)"
    if device.type == "cuda":
        return True, "auto: on CUDA fused kernels pay within minutes"
    return False, "auto: on CPU compiling costs more than a short run gains"


def compile_blocks(model: nn.Module, kinds: tuple[type[nn.Module], ...] = BLOCK_CLASSES) -> None:
    """Compile each block as one full graph per class and layout; a layout's integers are constants of the graph."""
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)


def _perceptual(config: Config, device: torch.device) -> LpipsDistance | None:
    rec = config.objectives.rec
    if not (rec.weight and rec.perceptual):
        return None
    assert rec.lpips_weights is not None, "the schema asks for weights"
    return LpipsDistance.load(rec.lpips_weights).to(device)


def _frozen(config: Config, device: torch.device) -> FrozenNetwork | None:
    align = config.objectives.rec.align
    if align is None:
        return None
    attention, dtype = _attention(config, device), zero.DTYPES[config.optim.precision]
    encoder = load_frozen(align, attention.name, dtype).to(device)
    if resolve_compile(config, device)[0]:
        compile_blocks(encoder, (*BLOCK_CLASSES, Dinov2Block))
    return encoder


def _centres(config: Config, device: torch.device) -> TeacherCentres | None:
    ssl = config.objectives.ssl
    if not ssl.weight or ssl.targets != "centering":
        return None
    return TeacherCentres.zeros(config.model.prototypes.num, device)
