"""Errors of the engine. Every one says what was wrong, where, and what to do about it."""

from __future__ import annotations


class RegateError(Exception):
    """Base of every error that ReGATE raises on purpose."""


class PatchError(RegateError):
    """The decoder could not be rewritten, or the rewritten decoder did not run."""


class NoBlocksError(PatchError):
    """No attention block was found in anything the decoder executed, so nothing could be elided."""


class UnsupportedGraphError(PatchError):
    """A value's token axis cannot be followed, or an attention cannot be placed between residual joins."""


class NotElidedError(PatchError):
    """A call that had to be elided ran fewer rewritten blocks than the decoder has."""


class UnknownPassError(PatchError, ValueError):
    """A pass was to be switched off that does not exist or is needed."""


class UnknownBackendError(PatchError, ValueError):
    """torch.compile has no backend of that name."""


class ActiveIndexError(PatchError, ValueError):
    """The active positions do not fit the decoder's input."""
