"""Students scored on cached states: predictors, metrics, and statistics of them. No training."""
