"""The training engine: launch, build, train, checkpoint, report. May import every package but evaluation."""
