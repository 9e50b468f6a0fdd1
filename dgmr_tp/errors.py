"""The one exception that the command line turns into one sentence and a non-zero exit."""


class DgmrError(Exception):
    """Something the user can put right: the message names the file, key or layer, the value, and what to do."""


class Preempted(DgmrError):
    """The work was asked to stop (SIGTERM) and can go on from where it is; the process ends with ``code``."""

    code = 143  # 128 + SIGTERM
