"""Behind the decoder: the head where labels are kept, logits a chunk at a time, losses per label."""
