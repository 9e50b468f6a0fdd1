"""The one exception that the command line turns into one sentence and a non-zero exit, and how a library's error is quoted in it."""


class DgmrError(Exception):
    """Something the user can put right: the message names the file, key or layer, the value, and what to do."""


class Preempted(DgmrError):
    """The work was asked to stop (SIGTERM) and can go on from where it is; the process ends with ``code``."""

    code = 143  # 128 + SIGTERM


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a sentence of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
