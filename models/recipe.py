"""A recipe: everything that decides what a training produces, in one YAML file."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.recipe_errors import explain
from models.recipe_yaml import Override, apply_overrides, read_recipe_yaml


class Section(BaseModel):
    """Strict: no unknown key, no silent conversion, no NaN, no change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0.01, le=0.5)]
"""A share of the samples, large enough to hold every class."""

# Lists are how YAML writes a tuple, so this one conversion is allowed.
Widths = Annotated[tuple[Annotated[int, Field(strict=True, ge=1)], ...], Field(strict=False, min_length=1)]
Column = Annotated[str, Field(strict=True)] | Annotated[int, Field(strict=True, ge=0)]
Columns = Annotated[tuple[Column, ...], Field(strict=False, min_length=1)]


class SplitFields(Section):
    """How samples are split that have no split of their own."""

    held_out_fraction: Fraction = 0.2
    """Share of all samples that only measures the finished model."""

    validation_fraction: Fraction = 0.1
    """Share of the remaining samples that chooses the best epoch."""


class DigitsSection(SplitFields):
    """Scikit-learn's 1,797 handwritten digits, 8x8 grey pixels: embedded, nothing to download."""

    name: Literal["digits"] = "digits"
    """Which data set."""


class ImagesSection(SplitFields):
    """Images in class folders, or arrays in an .npz file."""

    name: Literal["images"]
    """Which data set."""

    path: str
    """A folder of class folders, or of train/, validation/ and test/ with class folders in each, or an .npz file."""

    height: int = Field(default=64, ge=1, le=4096)
    """Rows that images are resized to."""

    width: int = Field(default=64, ge=1, le=4096)
    """Columns that images are resized to."""

    mode: Literal["L", "RGB"] = "RGB"
    """Grey or colour."""

    skip_bad_rows: bool = False
    """Leave out images that cannot be read, and count them."""


class TokenizerSection(Section):
    """How text becomes tokens; learnt from the training split."""

    vocab_size: int = Field(default=8000, ge=1)
    """Tokens at most."""

    max_length: int = Field(default=128, ge=1, le=8192)
    """Tokens of a text; the rest is cut off."""

    lower_case: bool = True
    """Fold capitals away."""


class TextSection(SplitFields):
    """Labelled texts in CSV, TSV, JSONL or Parquet files."""

    name: Literal["text"]
    """Which data set."""

    folder: str = "."
    """Where the files are."""

    train: str
    """The file of the training split, and of all splits that have no file of their own."""

    validation: str | None = None
    """A file of its own for what chooses the best epoch."""

    test: str | None = None
    """A file of its own for what measures the finished model."""

    text_columns: Columns = ("text",)
    """Names from the header, or positions from 0 in files without one; several are joined."""

    label_column: Column = "label"
    """As for text_columns."""

    label_names: dict[str, str] | None = Field(default=None, min_length=2)
    """The file's label: the name of the class. Null takes labels as names."""

    held_out_rows: int | None = Field(default=None, ge=1)
    """The last so many rows are held out: for data sets with a fixed split in one file."""

    clean_html: bool = False
    """Make plain text of HTML."""

    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, and count them."""

    tokenizer: TokenizerSection = TokenizerSection()


class TicketsSection(SplitFields):
    """Support tickets routed to queues, from a seeded generator: nothing to download."""

    name: Literal["tickets"]
    """Which data set."""

    count: int = Field(default=4000, ge=200, le=1_000_000)
    """How many tickets."""

    tokenizer: TokenizerSection = TokenizerSection(vocab_size=4000, max_length=96)


class ConvnetSection(Section):
    """Stages of ConvBlocks; channels and classes come from the data."""

    name: Literal["convnet"] = "convnet"
    """Which architecture."""

    widths: Widths = (32, 64)
    """Channels of each stage; every stage after the first halves height and width."""

    blocks_per_stage: int = Field(default=2, ge=1)
    """ConvBlocks in each stage."""

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability that a pooled feature is zeroed in training."""


class TextEncoderSection(Section):
    """A transformer encoder; vocabulary, longest text and classes come from the data."""

    name: Literal["text_encoder"] = "text_encoder"
    """Which architecture."""

    hidden_dim: int = Field(default=128, ge=1)
    """Numbers a token."""

    num_layers: int = Field(default=2, ge=1)
    """Encoder layers."""

    num_heads: int = Field(default=4, ge=1)
    """Attention heads; they divide hidden_dim."""

    intermediate_dim: int = Field(default=256, ge=1)
    """Width of the feed-forward layers."""

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability that a number is zeroed in training."""

    token_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a token is hidden in training, as if it were padding: an over-fitted model is then less sure."""

    bag_of_tokens: bool = False
    """Whether a linear model over the tokens learns beside the encoder; the answer is their average."""

    pair_buckets: int = Field(default=0, ge=0, le=10_000_000)
    """Rows of that linear model for pairs of neighbouring tokens; 0 for none."""

    gradient_checkpointing: bool = False
    """Whether activations are computed twice instead of kept: less memory, a third more time."""


class OptimizerSection(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(default=3e-3, gt=0)
    """The peak of the schedule."""

    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled decay per step, times the learning rate; not applied to biases and norms."""

    schedule: Literal["one_cycle", "warmup_cosine"] = "one_cycle"
    """How the learning rate rises to its peak and falls again."""

    warmup_fraction: float = Field(default=0.25, gt=0, lt=1)
    """Share of all steps until the peak."""


class TrainerSection(Section):
    """The training loop."""

    epochs: int = Field(default=20, ge=1)
    """Passes over the training split."""

    batch_size: int = Field(default=64, ge=2)
    """Samples per step, over all processes; batch normalisation needs two."""

    accumulation: int = Field(default=1, ge=1)
    """Parts that a batch is computed in, to need less memory; the step stays that of the whole batch."""

    consistency: float = Field(default=0.0, ge=0)
    """Weight of the difference that dropout makes between two passes over a batch; 0 for one pass, in half the time."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of what torch's autocast deems safe in it; weights stay fp32."""

    bucketing: bool = True
    """Whether batches hold texts of similar length, which saves most of the padding."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients longer than this L2 norm are scaled down to it."""

    final_weights: Literal["best", "last"] = "best"
    """Of which epoch: best on the validation split, or last, when that split is too small to tell epochs apart."""

    early_stopping: int | None = Field(default=None, ge=1)
    """Epochs without a better validation after which the training ends; null for never."""

    save_every_steps: int | None = Field(default=None, ge=1)
    """Steps after which an epoch in progress can be resumed; null for whole epochs only."""

    keep_epochs: int = Field(default=0, ge=0)
    """How many of the best epochs keep a checkpoint of their own."""

    workers: int | None = Field(default=None, ge=0)
    """Processes that prepare batches; null chooses by the data and the machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA when there is one."""

    threads: int = Field(default=2, ge=1)
    """CPU threads of each process. Part of the recipe because their number decides the last bits of every sum."""

    @model_validator(mode="after")
    def _check_accumulation(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"trainer.batch_size is {self.batch_size}, which does not divide into trainer.accumulation = "
                f"{self.accumulation} parts; make it a multiple of that."
            )
        return self

    @model_validator(mode="after")
    def _check_final_weights(self) -> Self:
        if self.final_weights == "last" and self.early_stopping is not None:
            raise ValueError(
                f"trainer.early_stopping is {self.early_stopping}, which ends a training after epochs that are not "
                "better, and trainer.final_weights is last, which keeps one of them; set trainer.final_weights=best "
                "or trainer.early_stopping=null."
            )
        return self


class TrackingSection(Section):
    """Where metrics go, besides metrics.jsonl and TensorBoard."""

    wandb_project: str | None = None
    """Project of Weights & Biases; null for none."""


DataSection = Annotated[DigitsSection | ImagesSection | TextSection | TicketsSection, Field(discriminator="name")]
ModelSection = Annotated[ConvnetSection | TextEncoderSection, Field(discriminator="name")]

_MODELS_FOR = {"digits": "convnet", "images": "convnet", "text": "text_encoder", "tickets": "text_encoder"}


class Recipe(Section):
    """One training, fully described."""

    # A name is a folder's name too.
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run folder, `runs/<name>`."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Rules everything random: splits, first weights, order of batches, dropout."""

    data: DataSection = DigitsSection()
    model: ModelSection
    optimizer: OptimizerSection = OptimizerSection()
    trainer: TrainerSection = TrainerSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="before")
    @classmethod
    def _name_the_variants(cls, values: Any) -> Any:
        """A section without a name is the one that goes with the rest: digits, and the architecture of the data."""
        return _with_variants_named(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        fitting = _MODELS_FOR[self.data.name]
        if self.model.name != fitting:
            raise ValueError(
                f"model.name is {self.model.name}, and data.name is {self.data.name}, which goes with {fitting}; "
                f"write model.name: {fitting}."
            )
        return self

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        drops_tokens = isinstance(self.model, TextEncoderSection) and self.model.token_dropout
        if self.trainer.consistency and not self.model.dropout and not drops_tokens:
            raise ValueError(
                f"trainer.consistency is {self.trainer.consistency}, and the model has no dropout that would make two "
                "passes over a batch differ; set model.dropout above 0, or trainer.consistency=0."
            )
        return self

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
        raise explain(error, source=source, overrides=parsed, valid_keys=_valid_keys(values)) from error


def _with_variants_named(values: Mapping[str, Any]) -> dict[str, Any]:
    named = dict(values)
    named["data"] = _with_name(values.get("data", {}), "digits")
    data_name = named["data"].get("name") if isinstance(named["data"], Mapping) else None
    named["model"] = _with_name(values.get("model", {}), _MODELS_FOR.get(str(data_name), "convnet"))
    return named


def _with_name(section: Any, name: str) -> Any:
    return {"name": name, **section} if isinstance(section, Mapping) else section


def _valid_keys(values: Mapping[str, Any]) -> list[str]:
    """Every key that a recipe with these values may hold; of a section with variants, the chosen one's."""
    sections = _with_variants_named(values)
    chosen = {f"{key}.": sections[key].get("name") for key in ("data", "model") if isinstance(sections[key], Mapping)}
    return list(_dotted_keys(Recipe, chosen))


def _dotted_keys(section: type[BaseModel], chosen: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields "name", "data", "data.name", ...; of a section whose variant is unknown, the keys of all."""
    seen = set()
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = f"{prefix}{name}."
        variants = [
            variant
            for variant in (field.annotation, *get_args(field.annotation))
            if isinstance(variant, type) and issubclass(variant, BaseModel)
        ]
        named = [variant for variant in variants if inner in chosen and _variant_name(variant) == chosen[inner]]
        for variant in named or variants:
            for key in _dotted_keys(variant, chosen, inner):
                if key not in seen:
                    seen.add(key)
                    yield key


def _variant_name(variant: type[BaseModel]) -> str:
    (name,) = get_args(variant.model_fields["name"].annotation)
    return str(name)
