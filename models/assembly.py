"""What a recipe asks for, put together: its data set, and the model that fits it."""

from pathlib import PurePath
from typing import Any

from torch import nn

from models.corpus import TextSource
from models.dataset import Dataset
from models.digits import build_digits_dataset
from models.factories import CONV_CLASSIFIER, TEXT_CLASSIFIER, find_factory
from models.image_folder import ImageSource, load_image_dataset
from models.recipe import DigitsSection, ImagesSection, Recipe, TextSection, TicketsSection
from models.text import load_text_dataset
from models.tickets import load_tickets_dataset

_FACTORIES = {"convnet": CONV_CLASSIFIER, "text_encoder": TEXT_CLASSIFIER}


def build_dataset(recipe: Recipe) -> Dataset:
    """Reads, or makes, the data set of a recipe.

    Raises:
        DataError: when it cannot be read or split.
    """
    data = recipe.data
    splits: dict[str, Any] = {
        "seed": recipe.seed,
        "held_out_fraction": data.held_out_fraction,
        "validation_fraction": data.validation_fraction,
    }
    if isinstance(data, DigitsSection):
        return build_digits_dataset(**splits)
    if isinstance(data, ImagesSection):
        return load_image_dataset(
            ImageSource(
                path=data.path,
                height=data.height,
                width=data.width,
                mode=data.mode,
                skip_bad_rows=data.skip_bad_rows,
                **splits,
            )
        )
    if isinstance(data, TicketsSection):
        return load_tickets_dataset(count=data.count, **data.tokenizer.model_dump(), **splits)
    return load_text_dataset(_text_source(data, splits), **data.tokenizer.model_dump())


def describe_model(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint says of its model: "factory", an import path, and "config", its keyword arguments."""
    choices = recipe.model.model_dump(mode="json", exclude={"name"})
    return {"factory": _FACTORIES[recipe.model.name], "config": {**dataset.model_arguments, **choices}}


def build_model(description: dict[str, Any]) -> nn.Module:
    """Builds the model of `describe_model`, its weights from torch's global random generator.

    Raises:
        ModelConfigError: when the recipe's choices do not go together.
    """
    return find_factory(description["factory"])(**description["config"])


def _text_source(data: TextSection, splits: dict[str, Any]) -> TextSource:
    def path(name: str | None) -> str | None:
        return None if name is None else str(PurePath(data.folder) / name)

    return TextSource(
        path=str(PurePath(data.folder) / data.train),
        validation_path=path(data.validation),
        held_out_path=path(data.test),
        text_columns=data.text_columns,
        label_column=data.label_column,
        label_names=data.label_names,
        held_out_rows=data.held_out_rows,
        clean_html=data.clean_html,
        skip_bad_rows=data.skip_bad_rows,
        **splits,
    )
