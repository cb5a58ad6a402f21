"""What this package raises on purpose.

Every message is one plain sentence: what is wrong, with the value, and the remedy.

    ModelsError
    ├── RecipeError                    a recipe that cannot be read or does not make sense
    ├── ModelConfigError               arguments that no model can be built from
    ├── TensorError                    a tensor that a model cannot take
    │   ├── ShapeError
    │   ├── DeviceMismatchError        a tensor on another device than the model's weights
    │   └── NonFiniteError             NaN or infinity where there should be numbers
    ├── DeviceError                    a device this machine does not have
    ├── DataError                      data that cannot be read, or that no training can use
    │   ├── PictureError               an image file that cannot be used
    │   └── TokenizerError             a tokenizer that cannot be trained or read
    ├── BenchmarkError                 arguments that give no measurement
    ├── EvaluationError                predictions and labels that do not fit, or nothing measured
    ├── TrackingError                  TensorBoard or Weights & Biases that cannot be written to
    ├── RunFolderError                 a run folder that cannot be used
    │   └── ResumeError                --resume with another recipe or other data than the interrupted one
    ├── TrainingDivergedError          a loss or gradient that is NaN or infinite
    ├── LaunchError                    a training in several processes that cannot start, or of which one failed
    ├── TerminatedError                a training in several processes that was told to end
    └── CheckpointError
        ├── CheckpointNotFoundError
        ├── CheckpointWriteError
        ├── CheckpointCorruptError     truncated, flipped bytes, or not a PyTorch file at all
        ├── CheckpointFormatError      a sound PyTorch file, but not one that torchport reads
        └── CheckpointMismatchError    weights that do not fit the model
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.batch import Batch


class ModelsError(Exception):
    """Base class: the command line prints its message without a traceback."""

    user_facing = True


class RecipeError(ModelsError):
    """A recipe that cannot be read, or that says something a training cannot do."""


class ModelConfigError(ModelsError):
    """Arguments that no model can be built from."""


class TensorError(ModelsError):
    """A tensor that a model cannot take, or should not have produced."""


class ShapeError(TensorError):
    """A tensor with the wrong number of axes, or an axis of the wrong size."""


class DeviceMismatchError(TensorError):
    """Tensors that are to be combined are not on the same device."""


class NonFiniteError(TensorError):
    """A tensor holds NaN or infinity."""


class DeviceError(ModelsError):
    """A device this machine does not have."""


class BenchmarkError(ModelsError):
    """Arguments that give no measurement."""


class EvaluationError(ModelsError):
    """Predictions and labels that do not fit together, or nothing to measure."""


class TrackingError(ModelsError):
    """A place for metrics that is absent or cannot be written to."""


class DataError(ModelsError):
    """Data that cannot be read, or that no training can use; names the file, and the line if it is one row's fault."""


class PictureError(DataError):
    """An image file that cannot be read, or is no image of 8 bits a channel."""


class TokenizerError(DataError):
    """A tokenizer that cannot be trained, or a tokenizer.json that cannot be read."""


class RunFolderError(ModelsError):
    """A run folder that is in use, or cannot be written."""


class ResumeError(RunFolderError):
    """The interrupted run is not the training at hand: another recipe, other data, or other processes."""


class TrainingDivergedError(ModelsError):
    """A loss or a gradient is no longer a finite number.

    Args:
        message: the sentence.
        step: that was not taken, from 1.
        batch: that it was computed from.
    """

    def __init__(self, message: str, *, step: int, batch: "Batch") -> None:
        super().__init__(message)
        self.step = step
        self.batch = batch


class LaunchError(ModelsError):
    """A process of a training in several failed, and the message is its own; or its launcher's variables are wrong."""


class TerminatedError(ModelsError):
    """Somebody told a training in several processes to end.

    Args:
        message: the sentence.
        signal_number: what it was told with.
    """

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
        """As shells report a process that a signal ended."""


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
