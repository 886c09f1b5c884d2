"""One file a bench, each with `run(rounds) -> list[Measurement]`."""
