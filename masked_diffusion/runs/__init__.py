"""Files that a run leaves on disk, and opening them again."""
