"""Processes that find each other, stop, and share resumable work."""
