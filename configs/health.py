"""What a run does about a step that went wrong.

    Health(spike="skip").spike_factor        # 5: a gradient norm above five times its running median is a spike

*Science*: where it acts, results change. As it comes nothing acts, and a loss that is no number stops the run.

A spike is judged on the norm of the whole gradient, which is the same on every rank and known before the optimizer
moves. OLMo-core's SkipStep optimizers skip such steps (above mean + 6 deviations of the last 128), ZClip clips them
(arXiv 2504.02507, by a z-score); PaLM goes back (arXiv 2204.02311, section 5.1: to a checkpoint about 100 steps before
the spike, leaving out 200 to 500 batches). A median is ours: a spike does not move it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.section import NotBool, Number, Positive, Section


class Health(Section):
    """skip: the optimizer leaves the step out, its moments too; schedules and data go on. rollback: the run goes back
    to its last checkpoint, and on with other data: what came since is left out."""

    nonfinite: Literal["stop", "skip", "rollback"] = "stop"  # a loss or a gradient that is no number
    spike: Literal["off", "skip", "rollback"] = "off"
    spike_window: Annotated[int, Field(ge=4, le=100_000), NotBool] = (
        128  # steps the median is over; before so many nothing is a spike
    )
    spike_factor: Number = Field(5.0, gt=1, le=1e6)  # times the median [D]
    most_rollbacks: Positive = 3  # to one checkpoint; then the run stops [D]

    @model_validator(mode="after")
    def _settings_of_something(self) -> Health:
        """Refuses a setting without effect."""
        of_spikes, of_rollbacks = ("spike_window", "spike_factor"), ("most_rollbacks",)
        unused: tuple[str, ...] = of_spikes if self.spike == "off" else ()
        unused += of_rollbacks if "rollback" not in (self.nonfinite, self.spike) else ()
        for key in unused:
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                switch = "health.spike" if key in of_spikes else "health.nonfinite or health.spike to rollback"
                raise ValueError(f"{key}={value:g} but nothing uses it: set {switch}, or remove health.{key}")
        return self
