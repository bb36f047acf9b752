"""Frozen teachers: from a name to a model on the disk, its trunk with hooks, its single parts.

Knows no stores and no training.
"""
