"""Exceptions of the client; their texts are meant for the user."""


class UpscaleError(Exception):
    """Something the user can put right; the text says what was expected, what was found and what to do."""


class HeldError(UpscaleError):
    """Another run is writing this output, or has just finished it."""


class ServerError(UpscaleError, ConnectionError):
    """A server does not answer, or none is left."""


class FrameError(UpscaleError, ValueError):
    """A frame is not what ``Upscaler.upscale`` takes."""
