"""What an answer token is worth: the teacher, difficulties, the labels kept and the positions computed for them."""
