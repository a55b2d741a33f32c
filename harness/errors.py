"""The ways in which a command ends early without being wrong itself.

The last two are not Exceptions: a library that logs and swallows those must not swallow the end of the night.
"""


class UserError(Exception):
    """A mistake of the user's: one line with the value, the place and the remedy. Exit code 2."""


class WorkFailed(Exception):
    """What all else was to stand on failed: one line. Exit code 1."""


class EndedEarly(BaseException):
    """A budget or a signal ended the work with everything saved. Exit code 3."""


class ClusterLost(BaseException):
    """Ray's head on this machine died. Nothing of this process's Ray can be used again."""
