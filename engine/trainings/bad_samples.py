"""Bad samples of all ranks, for a report."""

from __future__ import annotations

from data.bad_samples import BadSampleTracker
from engine import world


def bad_samples(health: BadSampleTracker) -> dict[str, float]:
    """`data/bad/*` so far by reason: what the index left out, and what each rank met since it started. A collective.

    A sample that two ranks met in two epochs counts for both; `bad_samples.jsonl` has each once.
    """
    met = world.gather_objects(health.counts - health.left_out)
    counts = sum(met, health.left_out)
    return {f"data/bad/{reason}": float(count) for reason, count in sorted(counts.items())}
