"""Training: one loop over optimizer steps, two engines behind it, and what guards, measures and shows a run."""
