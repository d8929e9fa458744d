"""The error that a user can mend: it says what was found, what was wanted, and which key or flag fixes it."""


class ModelError(ValueError):
    """A model, text or setting that cannot be used as given."""
