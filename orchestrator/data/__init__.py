"""Training data: at any URL, prepared before a run, and a small set out of installed packages."""
