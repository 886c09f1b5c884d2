"""A training that failed by itself: going on from the last checkpoint would most likely fail the same way, so its exit
code is FAILED (engine/exits.py).

raise TrainingFailed("nonfinite", "3 non-finite losses up to step 120: ...")      # on every rank, or on none
"""


class TrainingFailed(RuntimeError):
    """`kind` is one word for what keeps count of failures: "nonfinite", "spike", "replicas", "checkpoint"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
