"""Errors that the user can fix: one line that says what was given and what to do."""


class SimsdError(ValueError):
    """A wrong argument, file or combination of settings."""


class NotFoundError(SimsdError, FileNotFoundError):
    """A checkpoint, or a file of it, is missing."""


class QueueFull(SimsdError):
    """An engine has as many waiting requests as its `max_queue` allows."""


class OutOfMemoryError(SimsdError, MemoryError):
    """The device, or the host, has no memory for what an engine's settings ask for."""


def one_line(error: Exception) -> str:
    """What another library's error says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
