"""What is trained: diffusion models in plain torch. Runs under torchrun alone; knows nothing of Ray or storage."""
