"""The ways in which a command ends early without being wrong itself."""


class UserError(Exception):
    """A mistake of the user's: one line with the value, the place and the remedy. Exit code 2."""


class EndedEarly(Exception):
    """A budget or a signal ended the work with everything saved. Exit code 3."""


class ClusterLost(Exception):
    """Ray's head on this machine died. Nothing of this process's Ray can be used again."""
