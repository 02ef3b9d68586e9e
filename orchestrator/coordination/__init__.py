"""What rank 0 decides for all ranks: when to launch, save, commit, stop, restart and give up."""
