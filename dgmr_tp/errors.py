"""The one exception that the command line turns into one sentence and a non-zero exit."""


class DgmrError(Exception):
    """Something the user can put right: the message names the file, key or layer, the value, and what to do."""
