"""The demo corpus: scenes of coloured shapes, drawn and described, on any machine in seconds."""
