"""What an answer token is worth: difficulties, labels kept, positions computed, turns to be full, and a guard."""
