"""Health of a run: non-finite losses, spikes of the gradient, stop requests, replicas that differ.

Every step records on the device; the host looks at reports. What must not go on raises TrainingFailed; what may, goes
back to a checkpoint (engine/resume.py). What a person should see is an alarm (engine/reporting/reporter.py).
"""
