"""Ranks that hold parts of one model keep pace: what one of them runs before its decoder, all run."""
