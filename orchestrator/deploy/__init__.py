"""Files for clusters, filled in from a config."""
