"""What an answer token is worth: the teacher, difficulties, labels kept, positions computed."""
