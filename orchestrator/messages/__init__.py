"""What driver, agents and trainers say to each other: plain values, pickled and sent."""
