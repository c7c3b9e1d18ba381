"""A recipe's settings as transformers' Trainer takes them."""

import dataclasses
import os
from typing import Any

import torch
from transformers import TrainingArguments

from .errors import RecipeError
from .recipe import RunSettings

__all__ = ["training_arguments"]

# How long processes wait for each other: the first looks at all records, and stores their features, alone.
WAIT_SECONDS = 24 * 3600


def training_arguments(
    settings: RunSettings, *, gradient_checkpointing: bool = False, **more: Any
) -> TrainingArguments:
    """Arguments of a run, in which one sample of the global batch counts as much as any other.

    Args:
        settings: of the recipe.
        gradient_checkpointing: compute activations again in the backward pass.
        more: further arguments of `TrainingArguments`.

    Raises:
        RecipeError: one process was started where there are several GPUs, or the processes cannot make up the
            global batch.
    """
    names = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    # The older name is deprecated from transformers 5.23 on.
    recompute = (
        "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = settings.accumulation(world_size)
    precision = "bf16" if settings.precision == "bfloat16" else "no"
    if os.environ.get("ACCELERATE_MIXED_PRECISION", precision) != precision:  # of `accelerate launch`
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    if world_size == 1 and torch.cuda.device_count() > 1:
        raise RecipeError(
            f"one process was started on {torch.cuda.device_count()} GPUs; start one for each with "
            "`accelerate launch -m mgllava train ...`, or choose a GPU with CUDA_VISIBLE_DEVICES=0"
        )
    return TrainingArguments(
        output_dir=settings.output,
        per_device_train_batch_size=settings.per_device_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=settings.max_steps or -1,
        lr_scheduler_type="cosine" if settings.schedule == "cosine" else "constant_with_warmup",
        warmup_steps=settings.warmup_share,
        bf16=precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        ddp_timeout=WAIT_SECONDS,
        ddp_find_unused_parameters=False,
        logging_steps=settings.log_every,
        save_steps=settings.save_every,
        report_to=settings.report_to or "none",
        **{recompute: gradient_checkpointing, f"{recompute}_kwargs": {"use_reentrant": False}},
        **more,
    )
