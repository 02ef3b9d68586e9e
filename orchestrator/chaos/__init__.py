"""The drill: faults on a copy of a run, and what became of them."""
