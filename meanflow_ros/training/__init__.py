"""Recordings in, a checkpoint out."""
