"""Errors of starting and finding servers.

DeployError
├── JavaError      no usable Java runtime
├── PortError      a port is taken, or no free one is left
├── StartError     TorchServe or a worker does not become ready
└── StateError     there is no server of ours, or it does not give a token
"""


class DeployError(Exception):
    """Base of all errors raised by this package."""

    user_facing = True


class JavaError(DeployError):
    """There is no usable Java runtime."""


class PortError(DeployError):
    """A port is taken."""


class StartError(DeployError):
    """TorchServe or one of its workers does not become ready."""


class StateError(DeployError):
    """No server of ours runs there, or it does not give a token."""
