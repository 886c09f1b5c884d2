"""From a config to a training engine, in the one order that works.

order                       the error you get otherwise
1. construct                (ZeRO-3 inside its own context) a 7B model does not fit on one device
2. initialise               after partitioning, gathered one by one; else all ranks start apart
3. teacher = student        before the optimizer; else the first targets are noise
4. FP8 in the blocks        before 5 and 6 wrap their forwards; else they go on with the bf16 products
5. activation checkpointing before compiling; else the compiled block is one operation, of which nothing is kept
6. compile the blocks       before ZeRO hangs its hooks on modules; else each hook breaks the graph
7. mark blocks as leaves    before `initialize`; else ZeRO-3 hooks the layers inside a compiled block
8. optimizer, then ZeRO     ZeRO flattens the groups it is given
9. the EMA teacher          reads fp32 shards, which exist only now
10. phases are timed        before ZeRO's hooks, a child's time would have the gather of its parameters in it

`start` is 1 to 8 for any model; `assemble` is all of it for pre-training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs import Config, RunConfig, UserError
from configs.deepspeed import offloads_optimizer, overlap_summary, uses_deepcompile, zero_stage
from configs.run import Optim
from engine import deterministic, linears, optim, world, zero
from engine.average import Average
from engine.checkpoint.pieces import MAIN
from engine.corruption import Corruptor, corruptor
from engine.drop_path import DropPath, drop_path
from engine.health.judge import Judge
from engine.health.shares import GradientShares
from engine.host_memory import keep_freed_blocks
from engine.hosts import across_hosts
from engine.initial import initial_weights
from engine.recompute import recompute_blocks
from engine.report.timing import TimedComm, time_calls, time_children
from engine.teacher import Teacher
from engine.training import Kept
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

MOST_GRAPHS = 32  # of one block kind; captions meet a few shapes a run (model/text.py), torch's own limit is 8
LEAVES: tuple[type[nn.Module], ...] = (Block, TextBlock, ResBlock)
# Which phase the forward of a child of the Pretrainer is.
CHILDREN = {"teacher": "teacher", "trunk": "trunk", "text": "text", "decoder": "decoder"}
CHILDREN |= dict.fromkeys(("bottleneck", "align", "clip", "prototypes"), "heads")


@dataclass(frozen=True)
class Started:
    """A model under DeepSpeed."""

    engine: Any
    judge: Judge  # of its steps
    choices: dict[str, str]  # what every "auto" became, and why


@dataclass(frozen=True)
class Assembly:
    """Everything a step of pre-training needs on this rank."""

    engine: Any  # DeepSpeed's
    judge: Judge
    shares: GradientShares
    teacher: Teacher | None
    average: Average | None
    comm: Comm
    perceptual: LpipsDistance | None
    frozen: FrozenNetwork | None  # with objectives.rec.align
    centres: TeacherCentres | None
    drop_path: DropPath | None
    corruptor: Corruptor | None
    device: torch.device
    phases: PhaseTimer
    choices: dict[str, str]  # what every "auto" became, and why

    def kept(self, centres: TeacherCentres | None) -> Kept:
        """What a checkpoint holds, with the centres of now."""
        followers = [each for each in (self.teacher, self.average, self.judge) if each is not None]
        return Kept({MAIN: self.engine}, followers, {} if centres is None else vars(centres))


def assemble(
    config: Config,
    ds_config: dict[str, Any],
    comm: Comm,
    resume: bool = False,
    draw_device: str | torch.device = "cpu",
) -> Assembly:
    """Builds the run on this rank; a collective.

    `comm` is what `world.start` gave. With `resume` the caller loads a checkpoint next. First weights are drawn on
    `draw_device`: on the CPU they are the same numbers whatever the run's device is; on a GPU others, in a second.
    """
    device, drops = world.device(), drop_path(config, comm.rank, comm.world_size)
    comm, gathers = across_hosts(comm, config.system.gather, config.system.timeout_minutes)
    disturbs = corruptor(config, comm.rank, comm.world_size)
    rows = RankBatchSizes.per_rank(config, comm.world_size)
    started = start(
        config,
        ds_config,
        device,
        make=lambda attention: Pretrainer(config, rows, attention, comm),
        fill=lambda model: initialise(model, config, resume, draw_device),
        leaves=LEAVES,
        convert=lambda model: linears.convert(model, config, device),
    )
    engine = started.engine
    teacher = Teacher(student_teacher_pairs(engine.module)) if engine.module.teacher is not None else None
    followers = {} if teacher is None else {"ema": (teacher, "follow")}
    phases = timed(config, device, engine, CHILDREN, followers)
    options = {
        "gather of features": gathers,
        "drop path": f"a branch sees {drops}" if drops else "off (model.trunk.drop_path=0)",
        "rec": f"a step {disturbs}" if disturbs else "from whole images and exact latents (objectives.rec)",
        "weights of the run": "the last step's (ema=null)"
        if config.ema is None
        else f"an average (ema={config.ema:g})",
        "alignment": describe_alignment(config.objectives.rec.align),
    }
    return Assembly(
        engine=engine,
        judge=started.judge,
        shares=GradientShares(config.system.checks.shares_every, device),
        teacher=teacher,
        average=None if config.ema is None else Average(engine, MAIN),
        comm=TimedComm(comm, phases),
        perceptual=_perceptual(config, device),
        frozen=_frozen(config, device),
        centres=_centres(config, device),
        drop_path=drops,
        corruptor=disturbs,
        device=device,
        phases=phases,
        choices=started.choices | options,
    )


def start(
    config: RunConfig,
    ds_config: dict[str, Any],
    device: torch.device,
    *,
    make: Callable[[str], nn.Module],
    fill: Callable[[Any], str],
    leaves: tuple[type[nn.Module], ...],
    convert: Callable[[Any], str] | None = None,
    learning: Optim | None = None,
    name: str = MAIN,
) -> Started:
    """Steps 1 to 8 of the module's table; a collective.

    `make` gives the model for the name of a resolved attention backend; `fill` its first values, with words on whose
    they are; `leaves` are its kinds of blocks; `convert` puts FP8 into them, with words on what it did; `learning` is
    this engine's optimizer where config.optim is another's; `name` is what a checkpoint calls it.
    """
    determinism = deterministic.enforce(config, device)
    settings = config.optim if learning is None else learning
    optimizer = optim.resolve(config, ds_config, device)
    attention = _attention(config, device)
    is_compiled, why = resolve_compile(config, device)
    is_whole = uses_deepcompile(ds_config)
    if is_whole:
        is_compiled, why = False, "the whole model by DeepCompile (--ds_config)"
    with zero.construction(ds_config, config.optim.precision, device, config.system.timeout_minutes):
        model = make(attention.name)
    origin = fill(model)
    products = convert(model) if convert is not None else f"{config.optim.precision} (optim.precision)"
    recompute_blocks(model, config.system.activation_checkpointing, leaves)
    if is_compiled:
        compile_blocks(model, leaves)
    if not is_whole:
        zero.mark_leaves(model, [kind for kind in leaves if any(isinstance(m, kind) for m in model.modules())])
    judge = Judge(config.health, torch.device("cpu") if offloads_optimizer(ds_config) else device, name)
    engine = zero.start(model, optim.build(model, settings, optimizer.name), ds_config, judge)
    return Started(
        engine,
        judge,
        {
            "weights": origin,
            "attention": f"{attention.name} ({attention.reason})",
            "linear": products,
            "compile": f"{'on' if is_compiled else 'off'} ({why})",
            "optimizer": f"{settings.kind} by {optimizer.name} ({optimizer.reason})",
            "zero": f"stage {zero_stage(ds_config)}{scale_out_summary(ds_config)} (--ds_config)",
            "gradients": overlap_summary(ds_config, world.world_size()),
            "activation checkpointing": f"{config.system.activation_checkpointing} (system.activation_checkpointing)",
            "precision": f"{config.optim.precision} (optim.precision)",
            "host memory": keep_freed_blocks(device),
            "deterministic": determinism,
        },
    )


def timed(
    config: RunConfig,
    device: torch.device,
    engine: Any,
    children: Mapping[str, str],
    calls: Mapping[str, tuple[object, str]],
) -> PhaseTimer:
    """The run's phases: the forward of the model's `children` (name -> phase), what the engine does, and `calls`
    (phase -> owner and method). Nothing is timed with system.phases off, unless a profiler window wants the names."""
    phases = PhaseTimer(clock_of(device) if config.system.phases else None)
    if config.system.phases or config.profile.steps is not None:
        time_children(phases, engine.module, children)
        time_calls(phases, engine)
        for phase, (owner, method) in calls.items():
            phases.wrap(phase, owner, method)
    return phases


def initialise(model: Pretrainer, config: Config, resume: bool = False, draw_device: str | torch.device = "cpu") -> str:
    """First values of every parameter, the teacher's being the student's. Says whose they are."""
    shapes = {name: tuple(zero.full_shape(parameter)) for name, parameter in model.named_parameters()}
    with initial_weights(config, shapes, resume) as initial:

        def fill(name: str, tensor: torch.Tensor) -> None:
            if not initial.fill(name, tensor):
                initialise_parameter(name, tensor, config, draw_device)

        fill_parameters(model.named_parameters(), fill)
        return initial.summary


def fill_parameters(parameters: Iterable[tuple[str, nn.Parameter]], fill: Callable[[str, torch.Tensor], None]) -> None:
    """First values by name, one parameter gathered at a time. A collective."""
    for name, parameter in parameters:
        with zero.gathered([parameter], write=True):
            if world.is_first() or not zero.is_partitioned(parameter):
                fill(name, parameter.data)


def _attention(config: RunConfig, device: torch.device) -> AttentionBackend:
    try:
        return resolve_attention(
            config.system.attention, device, zero.DTYPES[config.optim.precision], config.system.deterministic
        )
    except ValueError as error:
        raise UserError(f"system.attention={config.system.attention}: {error}") from None


def resolve_compile(config: RunConfig, device: torch.device) -> tuple[bool, str]:
    """Whether blocks are compiled, and why."""
    if config.system.compile != "auto":
        return config.system.compile == "on", "named in the config"
    if config.system.linear == "fp8_te":
        return False, "auto: Transformer Engine cannot be traced (system.linear=fp8_te)"
    if device.type == "cuda":
        return True, "auto: on CUDA fused kernels pay within minutes"
    return False, "auto: on CPU compiling costs more than a short run gains"


def compile_blocks(model: nn.Module, kinds: tuple[type[nn.Module], ...] = LEAVES) -> None:
    """One full graph per block kind and layout; the integers of a layout are constants of the graph."""
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
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
        compile_blocks(encoder, (*LEAVES, Dinov2Block))
    return encoder


def _centres(config: Config, device: torch.device) -> TeacherCentres | None:
    ssl = config.objectives.ssl
    if not ssl.weight or ssl.targets != "centering":
        return None
    return TeacherCentres.zeros(config.model.prototypes.num, device)
