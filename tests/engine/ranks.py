"""What the engine tests run on each rank; found by name in new processes, so it is a module of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs import Config
from configs.deepspeed import load_ds_config
from engine import zero
from engine.build import PretrainParts, build_pretraining
from engine.checkpoint import reading
from engine.checkpoint.contents import load_checkpoint
from engine.checkpoint.saver import save
from engine.ema import CentreState
from engine.step import train_step
from model.losses.comm import Comm
from model.losses.total import TeacherCentres
from tests.tiny import random_batch

DEEPSPEED = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"


@dataclass(frozen=True)
class Trained:
    """What is compared between two ways of training."""

    losses: list[float]  # the total of every step, mean over ranks
    weights: dict[str, Tensor]  # whole fp32 weights of the student
    teacher: dict[str, Tensor]  # whole teacher weights as the model holds them


def build(config: Config, comm: Comm, stage: str) -> PretrainParts:
    """The tiny engine under configs/deepspeed/{stage}.json."""
    return build_pretraining(config, load_ds_config(DEEPSPEED / f"{stage}.json", config, comm.world_size), comm)


def run_steps(
    parts: PretrainParts, config: Config, comm: Comm, first: int, last: int, centres: TeacherCentres | None = None
) -> tuple[list[float], TeacherCentres | None]:
    """Steps first .. last - 1 on random batches; each step's total as the mean over ranks."""
    losses, centres = [], centres if centres is not None else parts.centres
    for step in range(first, last):
        record = train_step(parts, random_batch(config, step, comm.rank, comm.world_size), centres, config)
        centres = record.centres
        losses.append(float(comm.all_sum(record.losses["total"])) / comm.world_size)
    return losses, centres


def outcome(parts: PretrainParts, losses: list[float]) -> Trained:
    """Gathers everything to be compared; a collective."""
    named = dict(parts.engine.module.named_parameters())
    weights, teacher = {}, {}
    for name, parameter in named.items():
        with zero.gathered([parameter]):
            whole = parameter.detach().float().cpu().clone()
        (weights if parameter.requires_grad else teacher)[name] = whole
    return Trained(losses, weights, teacher)


def train(comm: Comm, config: Config, stage: str, steps: int) -> Trained:
    """`steps` steps from the start."""
    parts = build(config, comm, stage)
    losses, _ = run_steps(parts, config, comm, 0, steps)
    return outcome(parts, losses)


def train_plainly(config: Config, steps: int) -> Trained:
    """The same run without DeepSpeed: one rank, whole tensors, torch.optim.AdamW, clip_grad_norm_, an EMA in a loop."""
    from engine.optim import build
    from engine.schedule import learning_rate, teacher_momentum, teacher_temperature
    from engine.step import model_inputs
    from model.initialise import initialise
    from model.losses.comm import Solo
    from model.losses.total import compute_losses
    from model.packing import RankBatchSizes
    from model.pretrainer import Pretrainer, student_teacher_pairs

    model = Pretrainer(config, RankBatchSizes.per_rank(config, 1), "matmul")
    initialise(model, config)
    optimizer = build(model, config.optim, "torch")
    losses, centres = [], None
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        outputs = model(**model_inputs(random_batch(config, step), torch.device("cpu")))
        found = compute_losses(outputs, config.objectives, teacher_temperature(step, config), Solo(), centres)
        found.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.total.item())
        with torch.no_grad():
            for _, student, teacher in student_teacher_pairs(model):
                teacher.lerp_(student, 1 - teacher_momentum(step, config))
    named = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Trained(
        losses,
        {name: p for name, p in named.items() if not name.startswith("teacher.")},
        {name: p for name, p in named.items() if name.startswith("teacher.")},
    )


def save_steps(root: Path, step: int, parts: PretrainParts, centres: TeacherCentres | None, config: Config) -> None:
    """Save a checkpoint of `step` steps, with the centres that the last of them left."""
    save(root, step, parts.train_state(CentreState(centres)), config)


def load_newest(root: Path, parts: PretrainParts) -> tuple[int, TeacherCentres | None]:
    """Load the newest checkpoint of `root`; return its step and its centres."""
    centre = CentreState(parts.centres)
    state = load_checkpoint(reading.latest_readable(root), parts.train_state(centre))
    return state.step, centre.value


def save_and_go_on(comm: Comm, config: Config, root: Path) -> tuple[list[float], list[float]]:
    """Losses of steps 3 to 5 of a run that never stops and of one that goes on from its checkpoint."""
    parts = build(config, comm, "zero3")
    run_steps(parts, config, comm, 0, 3)
    save_steps(root, 3, parts, None, config)
    whole, _ = run_steps(parts, config, comm, 3, 6)
    again = build(config, comm, "zero3")
    load_newest(root, again)
    return whole, run_steps(again, config, comm, 3, 6)[0]
