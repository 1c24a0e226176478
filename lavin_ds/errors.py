"""The error that is meant for people."""


class UserError(Exception):
    """What is wrong, where (file, row, key), and what to do, in one clear sentence.

    Commands print it without a traceback and exit with code 2.
    """
