"""Running the frozen teacher once: the plan, the passes, and what they hand to the store. No training."""
