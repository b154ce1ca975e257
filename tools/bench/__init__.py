"""Measurements that a reader can repeat with one command: `python -m tools.bench cpu`."""
