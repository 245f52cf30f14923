"""Samplers and guidance: functions over a denoiser, which know neither models nor files."""
