"""What an answer token is worth: difficulties, keys of samples, labels kept, positions computed."""
