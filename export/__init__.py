"""From a checkpoint to a verified artifact to an archive."""
