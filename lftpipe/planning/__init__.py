"""Which shape is the best for a budget: candidates trained alone, scored in place, and chosen together."""
