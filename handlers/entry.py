"""The file that TorchServe imports, by its bare name, from an archive's root.

TorchServe wants exactly one class defined in it, and cannot resolve relative imports here.
"""

import sys

try:
    from handlers.service import Service
except Exception as error:
    # A package that this Python lacks, as a rule. TorchServe would log it where nobody looks, and try again for ever.
    sys.stderr.write(f"torchport ERROR the model is not served: its code cannot be imported: {error}\n")
    raise


class Entry(Service):
    """The handler of this archive."""
