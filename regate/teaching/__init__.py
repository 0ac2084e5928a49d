"""The text-only teacher: whose language model answers, and what it makes of each label."""
