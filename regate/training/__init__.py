"""Living in a training loop: hooks, optimizer steps, batches, ways of splitting a model over ranks."""
