"""What a run notices of itself, and what it does about it: losses that are no numbers, spikes, replicas that differ.

Per step everything stays on the device (judge.py); the host looks at reports (guard.py). What a person should see is an
alarm (alarms.py); what must not go on raises a `TrainingFailed` (failure.py); what may, goes back to a checkpoint
(rollback.py).
"""
