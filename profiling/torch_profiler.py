"""torch.profiler, opened in one way: CPU and, where there is one, GPU activities; no lines of its own without a GPU."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def recording(**options: Any) -> profile:
    """Return torch.profiler.profile for one cycle, not yet started; `options` are its own.

    Without a GPU its library prints where it starts and stops, and in torch's CUDA build that it found no device: it is
    told to be silent. With one, its messages may be errors, and stay.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return profile(activities=activities, acc_events=True, **options)  # torch 2.11 warns without acc_events
