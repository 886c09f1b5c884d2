"""Settings for sampling from a trained generator: method, steps, guidance; and which methods fit which objective.

Sampling()                                                     # the generator's default method; 250 steps, no guidance
Sampling("euler", steps=250, timestep_shift=0.075)             # VTP's figures
Sampling("dopri5", guidance=4.0, guidance_interval=(0.1, 1.0))
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from configs import UserError

SamplingMethod = Literal["euler", "heun", "dopri5", "sde", "ddim", "ancestral"]
# Default number of steps: 250 evaluations [P].
DEFAULT_STEPS = {"euler": 250, "heun": 125, "sde": 250, "ddim": 250, "ancestral": 250}
METHODS_OF_OBJECTIVE: dict[str, tuple[SamplingMethod, ...]] = {  # by objective; the first is the default
    "velocity": ("euler", "heun", "dopri5", "sde"),
    "noise": ("ancestral", "ddim"),
}
STOCHASTIC_METHODS = ("sde", "ancestral")  # methods that add noise


@dataclass(frozen=True)
class Sampling:
    """Settings of one way to sample. `guidance` scales the difference that the class makes to a prediction; 1 is none.

    Times run from 0, noise, to 1, a latent, whatever the generator's objective. Raises UserError for a setting that is
    out of range or without effect.
    """

    method: SamplingMethod | None = None  # None: the first of METHODS_OF_OBJECTIVE
    steps: int | None = None  # None: DEFAULT_STEPS; dopri5 chooses its own by rtol and atol
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times at which guidance is applied
    timestep_shift: float = 1.0  # t' = s t / (1 + (s - 1) t): below 1 more of the steps are near the noise
    temperature: float = 1.0  # scales the noise that stochastic methods add
    rtol: float = 1e-3
    atol: float = 1e-6
    iterations: int | None = None  # in which an autoregressive generator of order=masked draws all tokens; None: 64

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        for is_right, found, rule in (
            (
                self.method in (None, *get_args(SamplingMethod)),
                f"sampler={self.method}",
                f"it is one of {', '.join(get_args(SamplingMethod))}",
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
        if self.temperature != 1 and self.method not in (None, *STOCHASTIC_METHODS):
            raise UserError(
                f"temperature={self.temperature:g} with sampler={self.method}: it adds no noise that a temperature "
                "could scale; set it to 1"
            )

    def fitted(self, objective: str, kind: str) -> Sampling:
        """Return these settings with a method for `objective`; `kind` names the generator in errors.

        Raises UserError where the method belongs to another objective.
        """
        if self.method is None:
            return replace(self, method=METHODS_OF_OBJECTIVE[objective][0])
        if self.method not in METHODS_OF_OBJECTIVE[objective]:
            raise UserError(
                f"sampler={self.method} for a {kind} of objective={objective}: it is sampled with "
                f"{', '.join(METHODS_OF_OBJECTIVE[objective])}; choose one of them, or none"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Number of steps of a method that has a fixed number; call `fitted` before."""
        assert self.method is not None
        return DEFAULT_STEPS[self.method] if self.steps is None else self.steps

    @property
    def num_latents(self) -> int:
        """Number of latents' worth of normals that a sample needs: its start, and the noise added later."""
        return self.num_steps if self.method in STOCHASTIC_METHODS else 1

    def guides(self, time: float) -> bool:
        """Whether guidance is applied at `time`."""
        low, high = self.guidance_interval
        return self.guidance != 1 and low <= time <= high
