"""What keeps it alive: agents, attempts, checkpoints, the driver and the command line."""
