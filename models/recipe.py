"""A recipe: everything that decides what a training produces, in one YAML file."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.recipe_errors import explain
from models.recipe_yaml import Override, apply_overrides, read_recipe_yaml


class Section(BaseModel):
    """Strict: no unknown key, no silent conversion, no NaN, no change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0.05, le=0.5)]
"""A share of the samples, large enough to hold every class."""


class DataSection(Section):
    """The data set and its splits."""

    name: Literal["digits"] = "digits"
    """Which data set."""

    held_out_fraction: Fraction = 0.2
    """Share of all samples that only measures the finished model."""

    validation_fraction: Fraction = 0.1
    """Share of the remaining samples that chooses the best epoch."""


class ModelSection(Section):
    """The architecture; channels and classes of the images come from the data."""

    name: Literal["convnet"] = "convnet"
    """Which architecture."""

    # Lists are how YAML writes a tuple, so this one conversion is allowed.
    widths: Annotated[tuple[Annotated[int, Field(strict=True, ge=1)], ...], Field(strict=False, min_length=1)] = (
        32,
        64,
    )
    """Channels of each stage; every stage after the first halves height and width."""

    blocks_per_stage: int = Field(default=2, ge=1)
    """ConvBlocks in each stage."""

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability that a pooled feature is zeroed in training."""


class OptimizerSection(Section):
    """AdamW on a one-cycle schedule."""

    learning_rate: float = Field(default=3e-3, gt=0)
    """The peak of the schedule."""

    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled decay per step, times the learning rate; not applied to biases and norms."""

    warmup_fraction: float = Field(default=0.25, gt=0, lt=1)
    """Share of all steps until the peak."""


class TrainerSection(Section):
    """The training loop."""

    epochs: int = Field(default=20, ge=1)
    """Passes over the training split."""

    batch_size: int = Field(default=64, ge=2)
    """Samples per step; batch normalisation needs two."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients longer than this L2 norm are scaled down to it."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA when there is one."""

    threads: int = Field(default=2, ge=1)
    """CPU threads. Part of the recipe because their number decides the last bits of every sum."""


class Recipe(Section):
    """One training, fully described."""

    # A name is a folder's name too.
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run folder, `runs/<name>`."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Rules everything random: splits, first weights, order of batches, dropout."""

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    optimizer: OptimizerSection = OptimizerSection()
    trainer: TrainerSection = TrainerSection()

    def as_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain values: what recipe.yaml and checkpoints hold."""
        return self.model_dump(mode="json")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a recipe and applies overrides to it.

    Args:
        name_or_path: a built-in recipe's name, such as "digits", or the path of a YAML file.
        overrides: "section.key=value" each, the value in YAML.

    Raises:
        RecipeError: naming the key or the line, the file, and the remedy.
    """
    source, content = read_recipe_yaml(name_or_path)
    parsed = [Override.parse(text) for text in overrides]
    values = apply_overrides(content, parsed)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise explain(error, source=source, overrides=parsed, valid_keys=list(_dotted_keys(Recipe))) from error


def _dotted_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key a recipe may hold: "name", "data", "data.name", ..."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _dotted_keys(field.annotation, f"{prefix}{name}.")
