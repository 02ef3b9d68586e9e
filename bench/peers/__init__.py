"""The same training as the frameworks want it written. What they need is the extra `bench`."""
