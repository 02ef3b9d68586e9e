"""What a model is worth while it is trained: validation loss and sample grids, for the weights and every EMA."""
