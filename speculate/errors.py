"""The error that a user of a bundle can mend. (`speculate` imports no other folder, so it has its own.)"""


class BundleError(ValueError):
    """A bundle, prompt or setting that cannot be used as given; it says what was found and wanted."""
