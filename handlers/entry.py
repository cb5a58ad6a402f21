"""The file that TorchServe imports, by its bare name, from an archive's root.

TorchServe wants exactly one class defined in it, and cannot resolve relative imports here.
"""

from handlers.service import Service


class Entry(Service):
    """The handler of this archive."""
