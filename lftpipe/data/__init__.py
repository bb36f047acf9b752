"""Batches on the device, from a store or from a live teacher. Knows no training and no evaluation."""
