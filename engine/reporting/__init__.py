"""Reporting: what a run measures at its reports, and the sinks that reports go to."""
