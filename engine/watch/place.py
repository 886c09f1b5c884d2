"""Where a rank is, for whoever asks from another thread.

place = Place()
place.at("assembling")              # until a training stands
place.follow(training.phases)       # from then on its phases say it, and the loop the step
place.step = 120
place.phase                         # "backward"
place.at("consolidating")           # after the last step
"""

from __future__ import annotations

from profiling.instruments.phases import PhaseTimer


class Place:
    """`step` counts finished ones. What was said last holds until the next word: an error leaves it as it is, so that
    whoever tells of the error can say where it came from."""

    def __init__(self) -> None:
        self.step = 0
        self._stage, self._phases = "starting up", PhaseTimer(clock=None)

    @property
    def phase(self) -> str:
        """Of a step, or what is done outside of them."""
        return self._stage or self._phases.current

    def at(self, stage: str) -> None:
        """What is done from now on, outside of steps."""
        self._stage = stage

    def follow(self, phases: PhaseTimer) -> None:
        """From now on the rank is in the phases of its steps."""
        self._phases, self._stage = phases, ""
