"""The one exception that restpoint raises for something its user can put right."""


class RestpointError(Exception):
    """What was wrong, what would have been allowed, and which argument to change, in one line.

    The command line prints the message and exits with code 2; a traceback is shown only with ``--debug``.
    """
