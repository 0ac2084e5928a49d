"""Errors of the adapters."""


class AdapterError(LookupError):
    """No adapter serves this model, or an adapter does not find what it needs in it."""
