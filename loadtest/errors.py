"""What can go wrong while talking to a model.

LoadTestError
├── PayloadError      an archive or an input file that cannot be sent
├── PlanError         a load test that cannot be run as asked
├── UnreachableError  no answer: nothing listens there, or it is silent
├── RefusedError      the server answered, and the answer is an error
└── RunError          the load generator itself failed
"""


class LoadTestError(Exception):
    """Base of every expected error here: one plain sentence with the value and the remedy."""

    user_facing = True


class PayloadError(LoadTestError):
    """An archive or an input file cannot be turned into a request."""


class PlanError(LoadTestError):
    """The load test cannot be run as asked."""


class UnreachableError(LoadTestError):
    """The server gave no answer at all."""


class RefusedError(LoadTestError):
    """The server answered with an error.

    Args:
        message: The sentence for the user.
        status: HTTP status of the answer.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class RunError(LoadTestError):
    """The load generator failed, so nothing was measured."""
