"""The main demo: a small multimodal model trained dense, with ReGATE, and with a random gate."""
