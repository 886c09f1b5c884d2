"""Schedules of learning rate, teacher momentum and teacher temperature: pure functions of the step.

learning_rate(0, config)          # one warm-up step above 0
teacher_momentum(step, config)    # 0.994 -> 1 by a cosine
"""

from __future__ import annotations

import math

from configs import Config, RunConfig


def learning_rate(step: int, config: RunConfig) -> float:
    """Linear warm-up, then cosine to final_lr. The peak scales with the square root of the batch [D of OpenCLIP]."""
    optim = config.optim
    peak = optim.lr * math.sqrt(config.samples_per_step / optim.lr_batch)
    warmup = max(1, round(optim.warmup * optim.steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(peak, peak * optim.final_lr, (step - warmup) / max(1, optim.steps - warmup))


def teacher_momentum(step: int, config: Config) -> float:
    """Fraction of the old teacher kept at this step: cosine from momentum to final_momentum (DINOv2)."""
    teacher = config.teacher
    return cosine(teacher.momentum, teacher.final_momentum, step / config.optim.steps)


def teacher_temperature(step: int, config: Config) -> float:
    """Linear from temp to final_temp over the first temp_warmup of the run, then constant (DINOv2)."""
    teacher = config.teacher
    warm = min(1.0, step / max(1.0, teacher.temp_warmup * config.optim.steps))
    return teacher.temp + (teacher.final_temp - teacher.temp) * warm


def cosine(first: float, last: float, progress: float) -> float:
    """Half a cosine from `first` at progress 0 to `last` at progress 1; constant after it."""
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
