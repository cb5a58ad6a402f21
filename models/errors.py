"""What this package raises on purpose.

Every message is one plain sentence: what is wrong, with the value, and the remedy.

    ModelsError
    ├── RecipeError                    a recipe that cannot be read or does not make sense
    ├── ModelConfigError               arguments that no model can be built from
    ├── DeviceError                    a device this machine does not have
    ├── RunFolderError                 a run folder that cannot be used
    │   └── ResumeError                --resume with a recipe other than the interrupted one
    ├── TrainingDivergedError          a loss or gradient that is NaN or infinite
    └── CheckpointError
        ├── CheckpointNotFoundError
        ├── CheckpointWriteError
        ├── CheckpointCorruptError     truncated, flipped bytes, or not a PyTorch file at all
        ├── CheckpointFormatError      a sound PyTorch file, but not one that torchport reads
        └── CheckpointMismatchError    weights that do not fit the model
"""


class ModelsError(Exception):
    """Base class: the command line prints its message without a traceback."""

    user_facing = True


class RecipeError(ModelsError):
    """A recipe that cannot be read, or that says something a training cannot do."""


class ModelConfigError(ModelsError):
    """Arguments that no model can be built from."""


class DeviceError(ModelsError):
    """A device this machine does not have."""


class RunFolderError(ModelsError):
    """A run folder that is in use, or cannot be written."""


class ResumeError(RunFolderError):
    """The interrupted run and the recipe at hand are not the same training."""


class TrainingDivergedError(ModelsError):
    """A loss or a gradient is no longer a finite number."""


class CheckpointError(ModelsError):
    """A checkpoint that cannot be written, read or used."""


class CheckpointNotFoundError(CheckpointError):
    """There is no file at the path."""


class CheckpointWriteError(CheckpointError):
    """The file could not be written; what was there before is untouched."""


class CheckpointCorruptError(CheckpointError):
    """The file is truncated or damaged, or never was a PyTorch file."""


class CheckpointFormatError(CheckpointError):
    """A sound PyTorch file whose content torchport does not read."""


class CheckpointMismatchError(CheckpointError):
    """The weights do not fit the model they are loaded into."""
