"""What a run tells: reports and their sinks, and the instruments that fill a report from beside the steps."""
