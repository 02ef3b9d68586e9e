"""Hyper-parameter search: many runs, each of which restarts as runs do."""
