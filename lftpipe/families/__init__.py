"""What a decoder layer is: norms, branches, forward arguments, attention. No checkpoints, no stores."""
