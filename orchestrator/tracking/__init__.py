"""What is known of a run: its own record in storage, and the sinks that show it elsewhere."""
