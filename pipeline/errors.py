"""Errors of the build that its user can mend; the command line prints each as one line."""

from ..model.errors import ModelError


class RecipeError(ModelError):
    """A recipe, override or option that cannot be used as given."""


class CheckFailed(Exception):
    """A check of what was built failed. Nothing is packed, and the command ends with exit code 1."""
