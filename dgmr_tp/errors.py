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
    """Return the first line of an error's text, or its class name without a text. A library's is cut at 200 characters.

    The text of an error in a data loading worker is its traceback. The cause is its last line.
    """
    lines = (str(error).strip() or type(error).__name__).splitlines()
    is_traceback = lines[0].startswith("Caught ") and " in DataLoader worker " in lines[0]
    line = lines[-1 if is_traceback else 0].removeprefix(f"{DgmrError.__module__}.{DgmrError.__name__}: ")
    return line if isinstance(error, DgmrError) else line[:200]
