"""Whether an interrupted training can be continued: same recipe, same data, same processes."""

from models.checkpoint import Checkpoint, load_checkpoint
from models.dataset import Dataset
from models.distributed import Processes
from models.errors import CheckpointFormatError, ResumeError
from models.recipe import Recipe
from models.run_folder import RunFolder
from models.runs import flatten

# Beside the session's own training state; see `models.training`.
_REQUIRED_KEYS = ("data_digest", "started_at", "seconds")


def load_resumable(run: RunFolder, recipe: Recipe, dataset: Dataset, processes: Processes) -> Checkpoint:
    """Loads last.pt, if it belongs to this recipe, this data and these processes.

    Raises:
        ResumeError: naming what differs.
        CheckpointError: when last.pt cannot be read or holds no whole training state.
    """
    checkpoint = load_checkpoint(run.last)
    before, now = dict(flatten(checkpoint.recipe)), dict(flatten(recipe.as_dict()))
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            raise ResumeError(
                f"{run.path} was started with {key} = {before.get(key)}, and the recipe now says {now.get(key)}; "
                "resume with the same recipe, or train into another folder with --out."
            )
    if checkpoint.training is None:
        raise CheckpointFormatError(f"{run.last} holds no training state; train again without --resume.")
    missing = [key for key in _REQUIRED_KEYS if key not in checkpoint.training]
    if missing:
        raise CheckpointFormatError(
            f"{run.last} is of an older torchport and does not say {missing[0]}; train again without --resume."
        )
    started_with = len(checkpoint.training["rng"])
    if started_with != processes.world_size:
        raise ResumeError(
            f"{run.path} was started with {started_with} processes, and now there are {processes.world_size}; "
            f"resume with --nproc {started_with}."
        )
    # The files too: from the same texts another version of the tokenizers library may learn other tokens.
    changed = [name for name, content in dataset.files.items() if checkpoint.files.get(name) != content.decode()]
    if checkpoint.training["data_digest"] != dataset.digest:
        changed = ["data"]
    if changed:
        raise ResumeError(
            f"The {changed[0]} has changed since {run.path} was started; restore it, or train into another folder "
            "with --out."
        )
    return checkpoint
