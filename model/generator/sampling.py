"""How latents are drawn from a trained generator, and which of the ways fit which generator.

Sampling()                                                     # as fits the generator; 250 steps, no guidance
Sampling("euler", steps=250, timestep_shift=0.075)             # VTP's figures
Sampling("dopri5", guidance=4.0, guidance_interval=(0.1, 1.0))
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from configs import UserError

Method = Literal["euler", "heun", "dopri5", "sde", "ddim", "ancestral"]
# Where none are asked for: 250 evaluations [P].
STEPS = {"euler": 250, "heun": 125, "sde": 250, "ddim": 250, "ancestral": 250}
METHODS: dict[str, tuple[Method, ...]] = {  # by objective; the first is taken where none is asked for
    "velocity": ("euler", "heun", "dopri5", "sde"),
    "noise": ("ancestral", "ddim"),
}
RANDOM = ("sde", "ancestral")  # add noise on the way


@dataclass(frozen=True)
class Sampling:
    """`guidance` scales the step from the classless to the class's prediction; 1 is none.

    Times run from 0, noise, to 1, a latent, whatever the generator's objective. Raises UserError for a setting that is
    out of range or without effect.
    """

    method: Method | None = None  # None: the first of METHODS for the generator's objective
    steps: int | None = None  # None: STEPS; dopri5 chooses its own, held to rtol and atol
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times at which there is guidance
    timestep_shift: float = 1.0  # t' = s t / (1 + (s - 1) t): below 1 more of the steps are near the noise
    temperature: float = 1.0  # of the noise that is added on the way
    rtol: float = 1e-3
    atol: float = 1e-6
    iterations: int | None = None  # in which an autoregressive generator of order=masked draws all tokens; None: 64

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        for is_right, found, rule in (
            (
                self.method in (None, *get_args(Method)),
                f"sampler={self.method}",
                f"it is one of {', '.join(get_args(Method))}",
            ),
            (self.steps is None or self.steps >= 1, f"steps={self.steps}", "there is at least one"),
            (
                0 <= self.guidance < math.inf,
                f"guidance={self.guidance:g}",
                "1 is none, larger is more, and it is finite",
            ),
            (0 <= low <= high <= 1, f"guidance interval={low:g}, {high:g}", "times low, high lie in 0 to 1"),
            (0 < self.timestep_shift < math.inf, f"timestep shift={self.timestep_shift:g}", "it is above 0 and finite"),
            (0 < self.temperature < math.inf, f"temperature={self.temperature:g}", "it is above 0 and finite"),
            (self.iterations is None or self.iterations >= 1, f"iterations={self.iterations}", "there is at least one"),
            (self.rtol > 0 and self.atol > 0, f"rtol={self.rtol:g}, atol={self.atol:g}", "both are above 0"),
        ):
            if not is_right:
                raise UserError(f"{found}: {rule}; change it")
        self._check_effect()

    def _check_effect(self) -> None:
        if self.method == "dopri5" and self.steps is not None:
            raise UserError(f"steps={self.steps} with sampler=dopri5: it chooses its steps by rtol; leave steps out")
        if self.timestep_shift != 1 and self.method not in (None, "euler", "heun"):
            raise UserError(
                f"timestep shift={self.timestep_shift:g} with sampler={self.method}: only euler and heun have a grid "
                "of times to shift; set it to 1"
            )
        if self.temperature != 1 and self.method not in (None, *RANDOM):
            raise UserError(
                f"temperature={self.temperature:g} with sampler={self.method}: it adds no noise that a temperature "
                "could scale; set it to 1"
            )

    def fitted(self, objective: str, kind: str) -> Sampling:
        """With a method for `objective`, of `kind` in words. Raises UserError where that of another was asked for."""
        if self.method is None:
            return replace(self, method=METHODS[objective][0])
        if self.method not in METHODS[objective]:
            raise UserError(
                f"sampler={self.method} for a {kind} of objective={objective}: it is sampled with "
                f"{', '.join(METHODS[objective])}; choose one of them, or none"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Steps of a method that has a fixed number of them; `fitted` chose it where nobody did."""
        assert self.method is not None
        return STEPS[self.method] if self.steps is None else self.steps

    @property
    def num_latents(self) -> int:
        """How many latents' worth of normals a sample takes: what it starts from, and what is added on the way."""
        return self.num_steps if self.method in RANDOM else 1

    def guides(self, time: float) -> bool:
        """Whether there is guidance at `time`."""
        low, high = self.guidance_interval
        return self.guidance != 1 and low <= time <= high
