"""Faults on a real graph of processes; `campaign.py` and `soak.py` are the commands."""
