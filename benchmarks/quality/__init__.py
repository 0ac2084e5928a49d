"""Does a model learn as well with ReGATE? Experiments with several arms and seeds, and what follows from them."""
