"""Exceptions of the package, and the text of a library's error for use in a message."""


class DgmrError(Exception):
    """Error that the user can fix.

    The message names the file, key or layer and its value, and says what to do. The command line prints it without a
    traceback and exits with a non-zero code.
    """


class Preempted(DgmrError):
    """The process received SIGTERM and stopped after saving its state. Run the command again to resume."""

    code = 143
    """Exit code of the process: 128 + SIGTERM."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class name without a text. At most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
