"""Architectures, data and training: everything up to a checkpoint."""
