"""What is remembered of samples: in a store, between ranks, in checkpoints."""
