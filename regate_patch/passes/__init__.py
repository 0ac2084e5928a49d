"""Passes over a captured graph; `rewrite` has their list."""
