"""Recipes: every setting of a training run, checked before work starts."""

import dataclasses
import importlib.util
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from .errors import RecipeError

__all__ = [
    "DataRecipe",
    "LoraRecipe",
    "Parts",
    "Recipe",
    "RunSettings",
    "check_same_run",
    "check_value",
    "load_recipe",
    "native_precision",
    "recipe_from_dict",
    "shipped_recipes",
]

# What a run may be continued with other values of.
CHANGEABLE = {
    "gradient_checkpointing",
    "keep_checkpoints",
    "log_every",
    "per_device_batch",
    "report_to",
    "save_every",
    "workers",
}


@dataclass(frozen=True)
class Parts:
    """What a model that does not exist yet is put together of, with an untrained neck.

    Attributes:
        language_model, vision_tower, high_res_tower: folder or hub id of a causal language model, a CLIP ViT and an
            open_clip ConvNeXt.
        template: name of a chat template of `mgllava.chat_templates`.
        fusion_variant: `gate_sum` is the paper's.
    """

    language_model: str
    vision_tower: str
    high_res_tower: str
    template: str
    fusion_variant: Literal["gate_sum", "gate_concat", "concat_projected", "concat_raw"] = "gate_sum"


@dataclass(frozen=True)
class DataRecipe:
    """One source of records.

    Attributes:
        records, pictures, boxes: files of `LlavaRecords`.
        dataset: instead of files, `module:name` of a class or function that returns a map-style dataset; see
            `PythonRecords`.
        arguments: what it is called with.
    """

    records: str | None = None
    pictures: str | None = None
    boxes: str | None = None
    dataset: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraRecipe:
    """Adapters on every linear layer of the language model (arXiv 2106.09685), in place of its own weights.

    Attributes:
        rank: of the adapters' matrices.
        alpha: their output is scaled by alpha / rank.
        dropout: on their input, in training.
    """

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every training run needs to know.

    Attributes:
        output: folder for checkpoints and the result.
        global_batch: samples of one step of the optimiser, over all processes.
        per_device_batch: samples a process takes at once; gradients of several make up the global batch.
        learning_rate: after warming up.
        muon_learning_rate: of the weights of linear layers, which Muon then teaches; None: AdamW teaches all.
        max_steps: steps of the optimiser.
        schedule: of the learning rate, after warming up.
        warmup_share: share of all steps in which the learning rate rises to its value.
        precision: `bfloat16`: what learns is kept in float32, all else and the arithmetic is bfloat16. `float32`.
            `auto` becomes one of them, see `native_precision`.
        workers: processes that read data, for each training process.
        seed: decides the order of the data and everything random.
        save_every: steps between checkpoints.
        keep_checkpoints: how many of them stay.
        log_every: steps between log lines.
        report_to: experiment trackers by the names of transformers' Trainer, such as `tensorboard`.
    """

    output: str
    global_batch: int
    per_device_batch: int
    learning_rate: float
    muon_learning_rate: float | None = None
    max_steps: int | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_share: float = 0.03
    precision: Literal["bfloat16", "float32", "auto"] = "bfloat16"
    workers: int = 4
    seed: int = 42
    save_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    report_to: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # At once: a run that another machine goes on with stays what it was, or is refused.
        if self.precision == "auto":
            object.__setattr__(self, "precision", native_precision())
        for name in ("global_batch", "per_device_batch", "save_every", "keep_checkpoints", "log_every"):
            check_value(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        check_value("max_steps", self.max_steps, self.max_steps is None or self.max_steps >= 1, "at least 1")
        check_value("workers", self.workers, self.workers >= 0, "at least 0")
        check_value(
            "learning_rate", self.learning_rate, 0 < self.learning_rate < 1, "a number between 0 and 1"
        )
        check_value(
            "muon_learning_rate",
            self.muon_learning_rate,
            self.muon_learning_rate is None or 0 < self.muon_learning_rate < 1,
            "a number between 0 and 1",
        )
        check_value(
            "warmup_share", self.warmup_share, 0 <= self.warmup_share < 1, "a share, 0 or more and below 1"
        )

    def accumulation(self, world_size: int) -> int:
        """Batches of each process whose gradients make up the global batch.

        Raises:
            RecipeError: `per_device_batch` times `world_size` does not divide `global_batch`.
        """
        at_once = self.per_device_batch * world_size
        if self.global_batch % at_once:
            raise RecipeError(
                f"global_batch is {self.global_batch}, which {world_size} processes with per_device_batch: "
                f"{self.per_device_batch} cannot make up: they take {at_once} samples at once, and {self.global_batch} "
                f"/ {at_once} is not a whole number"
            )
        return self.global_batch // at_once

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Recipe(RunSettings):
    """A training run of the model, stage 1 or 2.

    Attributes:
        model: folder or hub id of the model it starts from; made of `parts` if it is a folder that does not exist.
        data: the sources of records.
        stage: 1: fusion and projectors learn. 2: the language model (or adapters, with `lora`) as well.
        parts: see `model`.
        neck: `neck.safetensors` of a stage 1, loaded over the model's own.
        lora: adapters.
        epochs: passes over the data, unless `max_steps` is given.
        text_limit: tokens of a conversation, its picture counting as one and objects as none; by default 2048 less
            the model's image tokens.
        gradient_checkpointing: compute the language model's activations again in the backward pass.
        attn_implementation: of the language model, by its name in transformers.
        max_bad_share: share of the records that may be unusable.
        features: folder that keeps what the frozen towers make of every picture, so that they run once and not in
            every epoch and run, whatever is shown of the pictures; for models and data whose features fit a disk.
        show: `all`; `no_objects`: pictures without their boxes; `low_res`: without them, and with a blank
            high-resolution view. For ablations.
    """

    model: str
    data: list[DataRecipe]
    stage: Literal[1, 2]
    parts: Parts | None = None
    neck: str | None = None
    lora: LoraRecipe | None = None
    epochs: int = 1
    text_limit: int | None = None
    gradient_checkpointing: bool = True
    attn_implementation: str | None = None
    max_bad_share: float = 0.0
    features: str | None = None
    show: Literal["all", "no_objects", "low_res"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value("epochs", self.epochs, self.epochs >= 1, "at least 1")
        check_value(
            "text_limit", self.text_limit, self.text_limit is None or self.text_limit >= 1, "at least 1"
        )
        check_value("max_bad_share", self.max_bad_share, 0 <= self.max_bad_share <= 1, "a share from 0 to 1")
        check_value("data", self.data, bool(self.data), "at least one source of records")
        for index, source in enumerate(self.data):
            _check_source(f"data[{index}]", source)
        if self.lora is not None:
            check_value(
                "lora",
                self.lora,
                self.stage == 2,
                "no adapters in stage 1, where the language model is frozen",
            )
            check_value("lora.rank", self.lora.rank, self.lora.rank >= 1, "at least 1")
            check_value("lora.alpha", self.lora.alpha, self.lora.alpha >= 1, "at least 1")
            check_value(
                "lora.dropout", self.lora.dropout, 0 <= self.lora.dropout < 1, "0 or more and below 1"
            )
            if importlib.util.find_spec("peft") is None:
                raise RecipeError(
                    "lora needs the package peft, which is not installed; pip install 'mgllava[train]'"
                )


def load_recipe(path: str | Path) -> RunSettings:
    """Read a recipe.

    Args:
        path: a YAML file, or the name of one of `shipped_recipes`. Paths in it are relative to the working folder.

    Raises:
        RecipeError: it does not exist, is not YAML, or has an unknown or missing key, a value of the wrong type or
            settings that exclude each other; the message names key, value and what was expected.
    """
    name = str(path).removesuffix(".yaml")
    if Path(path).is_file():
        text = Path(path).read_text(encoding="utf-8")
    elif name in shipped_recipes():
        text = resources.files(__package__).joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise RecipeError(f"there is no recipe {path}; shipped are {', '.join(shipped_recipes())}")
    try:
        return recipe_from_dict(_parse(text))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def shipped_recipes() -> list[str]:
    """Names of the recipes in this package."""
    folder = resources.files(__package__).joinpath("recipes")
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def recipe_from_dict(values: Any) -> RunSettings:
    """A recipe from plain values: a `PretrainingRecipe` for stage 0, else a `Recipe`.

    Raises:
        RecipeError: as `load_recipe`.
    """
    if isinstance(values, Mapping) and values.get("stage") == 0:
        from ..pretraining.recipe import PretrainingRecipe

        return _build(PretrainingRecipe, values, "")
    return _build(Recipe, values, "")


def check_same_run(old: RunSettings, new: RunSettings, folder: Path) -> None:
    """Raise RecipeError if `new` cannot continue what `old` began in `folder`."""
    for key, value in new.to_dict().items():
        before = old.to_dict()[key]
        if key not in CHANGEABLE and value != before:
            hint = f"write {key}: {before} if it says auto, " if key == "precision" else ""
            raise RecipeError(
                f"{folder} holds a run with {key}: {before}, the recipe says {value}; {hint}choose another output, or "
                f"remove that folder to start anew"
            )


def native_precision() -> Literal["bfloat16", "float32"]:
    """`bfloat16` where the GPU, or without one an x86 CPU, has instructions for it, else `float32`.

    On a CPU with AVX2 alone (AMD EPYC, torch 2.15) a bfloat16 depthwise convolution takes 120 times as long as a
    float32 one, and a matrix product 14 times.
    """
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = torch.cpu.get_capabilities()
    is_native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bfloat16" if is_native else "float32"


def check_value(key: str, value: Any, holds: bool, expected: str) -> None:
    """Raise RecipeError that names key and value unless the condition holds."""
    if not holds:
        raise RecipeError(f"{key} is {value}; expected {expected}")


def _check_source(key: str, source: DataRecipe) -> None:
    if (source.records is None) == (source.dataset is None):
        raise RecipeError(f"{key} has {source}; expected records or dataset, one of them")
    for name, owner in (("pictures", "records"), ("boxes", "records"), ("arguments", "dataset")):
        if getattr(source, name) and getattr(source, owner) is None:
            raise RecipeError(f"{key}.{name} is {getattr(source, name)}; expected only beside {owner}")
    if source.dataset is not None and not re.fullmatch(r"[\w.]+:\w+", source.dataset):
        raise RecipeError(f"{key}.dataset is {source.dataset!r}; expected module:name")


def _parse(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "recipes need PyYAML, which is not installed; pip install 'mgllava[train]'"
        ) from error

    class Loader(yaml.SafeLoader):
        """Numbers as in YAML 1.2, where 1e-3 is one, and no key twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise RecipeError(f"the key {twice} stands there twice")
            return super().construct_mapping(node, deep=deep)

    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"it is not YAML: {error}") from error


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise RecipeError(f"{prefix.rstrip('.') or 'the recipe'} is {values!r}; expected keys and values")
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(hints)}"
            raise RecipeError(f"unknown key {prefix}{key}: {values[key]!r}; {hint}")
    required = [
        entry.name
        for entry in dataclasses.fields(cls)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in values]:
        raise RecipeError(f"missing key {prefix}{missing[0]}; expected {_described(hints[missing[0]])}")
    return cls(**{key: _convert(value, hints[key], f"{prefix}{key}") for key, value in values.items()})


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (option for option in options if option is not type(None))
        return None if value is None else _convert(value, inner, key)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{key}.")
    if origin is list and isinstance(value, list):
        return [_convert(entry, options[0], f"{key}[{index}]") for index, entry in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if origin is Literal and value in options and type(value) in map(type, options):
        return value
    if hint is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is hint:
        return value
    raise RecipeError(f"{key} is {value!r}; expected {_described(hint)}")


def _described(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _described(options[0])
    if origin is Literal:
        return " or ".join(map(repr, options))
    if origin is list:
        return f"a list, each entry {_described(options[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "keys and values"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
