"""Replay of recordings: what a policy would have done, at the times at which it would have."""
