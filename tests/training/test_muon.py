"""Muon and AdamW as one optimiser."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mgllava.training.muon import MuonWithAdamW


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.convolution = nn.Conv1d(6, 6, 1)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.down = nn.Linear(8, 3)

    def forward(self, ids):
        hidden = self.norm(self.convolution(self.words(ids).transpose(1, 2)).transpose(1, 2))
        return self.down(self.frozen(self.up(hidden).relu()))


def names_of(model, group):
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_matrices_of_linear_layers_are_muons_and_all_else_that_learns_is_adamws():
    model = Small()
    muon, adamw = MuonWithAdamW(model, 1e-3, 2e-3).param_groups
    assert names_of(model, muon) == {"up.weight", "down.weight"}
    assert muon["lr"] == 2e-3
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names_of(model, adamw) == learning - {"up.weight", "down.weight"}
    assert adamw["lr"] == 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_models_tables_are_adamws(tied):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=13, tie_word_embeddings=tied, **sizes))
    muon, adamw = MuonWithAdamW(model, 1e-3, 1e-3).param_groups
    assert len(muon["params"]) == 7
    assert all("layers.0" in name for name in names_of(model, muon))
    assert {"model.embed_tokens.weight", "lm_head.weight"} - names_of(model, adamw) == (
        {"lm_head.weight"} if tied else set()
    )


def _take_steps(model, optimizer, schedule, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 11, (4, 5), generator=generator)
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten() % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _begin():
    torch.manual_seed(0)
    model = Small()
    optimizer = MuonWithAdamW(model, 1e-2, 2e-2)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def test_it_goes_on_from_its_state_exactly():
    model, optimizer, schedule = _begin()
    _take_steps(model, optimizer, schedule, 0, 3)
    kept = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, schedule)]
    again = _begin()
    for part, state in zip(again, kept, strict=True):
        part.load_state_dict(state)
    for parts in ((model, optimizer, schedule), again):
        _take_steps(*parts, 3, 6)
    for value, expected in zip(again[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(value, expected)


def test_a_schedule_reaches_both():
    model, optimizer, schedule = _begin()
    _take_steps(model, optimizer, schedule, 0, 3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-2 / 4, 1e-2 / 4])
    before = [parameter.clone() for parameter in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _take_steps(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0), 3, 5)
    for value, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(value, expected)


def test_it_learns():
    model, optimizer, _ = _begin()
    ids = torch.arange(11)[None]
    first = nn.functional.cross_entropy(model(ids)[0], ids[0] % 3).item()
    for _ in range(60):
        nn.functional.cross_entropy(model(ids)[0], ids[0] % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert nn.functional.cross_entropy(model(ids)[0], ids[0] % 3).item() < first / 2


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)])
def test_matrices_move_as_torchs_muon_moves_them(shape):
    """Which iterates in bfloat16: of 300 seeds, the first step differed by 3.1% at most."""
    layer = nn.Linear(shape[1], shape[0])
    weight = nn.Parameter(layer.weight.detach().clone())
    settings = {"weight_decay": 0.0, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    expected, ours = torch.optim.Muon([weight], lr=0.01, **settings), MuonWithAdamW(layer, 1e-3, 0.01)
    for _ in range(4):
        before = weight.detach().clone()
        layer.weight.data.copy_(before)
        weight.grad = layer.weight.grad = torch.randn(shape)
        expected.step()
        ours.step()
        moved = weight.detach() - before
        assert (layer.weight - weight).norm() < 0.05 * moved.norm()
