"""The one exception of the client whose text is meant for the user."""


class UpscaleError(Exception):
    """Something the user can put right; the text says what was expected, what was found and what to do."""
