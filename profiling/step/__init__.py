"""What a step computes, holds and moves: counted and predicted, without running it."""
