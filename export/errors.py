"""The one error of export/ that a user can act on."""


class ExportError(Exception):
    """Export cannot go on: the text says what was expected, what was found and what to do next."""
