"""Runs as jobs of Ray's job server: submitted, followed, and submitted again."""
