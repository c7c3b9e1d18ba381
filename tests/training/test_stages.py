"""What learns in each stage."""

import pytest
import torch
from tiny import tiny_inputs, tiny_model

from mgllava.training.neck import is_neck
from mgllava.training.stages import choose_learners, keep_learners_in_float32


@pytest.mark.parametrize("stage", [1, 2])
def test_the_learners_of_a_stage(stage):
    model = tiny_model()
    choose_learners(model, stage)
    for name, parameter in model.named_parameters():
        language = name.startswith(("model.language_model.", "lm_head."))
        assert parameter.requires_grad == (is_neck(name) or (stage == 2 and language)), name
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())


def test_text_alone_trains_in_stage_1_too():
    """Nothing of the language model learns, and still there is something to go backward through."""
    model = tiny_model()
    choose_learners(model, 1)
    inputs = tiny_inputs([[], []])
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_neck(name)
        assert parameter.grad is None or not parameter.grad.any()


def test_only_what_learns_is_kept_in_float32():
    model = tiny_model().to(torch.bfloat16)
    choose_learners(model, 1)
    keep_learners_in_float32(model)
    dtypes = {is_neck(name): parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
