"""What is to be run where a GPU is at hand for minutes: `python -m benchmarks.gpu PART`."""
