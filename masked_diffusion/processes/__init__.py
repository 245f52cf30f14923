"""How processes find each other, stop, and share resumable work."""
