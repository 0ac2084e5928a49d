"""What a full step may leave out: who reads the decoder's output, and what the first batch proves of it."""
