"""Muon over matrices and convolutions against torch.optim's own, one weight at a time."""

import copy

import pytest
import torch
from torch import nn

from powersteer.apps.pretrain.muon import MuonAdamW

RATE = 3e-3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.conv = nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Linear(24, 32)
        self.out = nn.Linear(32, 3)

    def forward(self, tokens):
        maps = self.table(tokens).permute(0, 3, 1, 2)
        return self.out(self.head(self.conv(maps).tanh().mean((2, 3))).tanh())


def build(memory_format=torch.channels_last):
    torch.manual_seed(0)
    return Net().to(memory_format=memory_format)


def backward(net, seed):
    tokens = torch.randint(20, (8, 4, 4), generator=torch.Generator().manual_seed(seed))
    net(tokens).square().sum().backward()


def optimizer(net):
    return MuonAdamW(net, RATE, betas=(0.9, 0.99), weight_decay=0.1)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_each_weight_moves_as_torchs_optimizer_of_its_kind_moves_it(memory_format):
    net, peer = build(memory_format), build()
    ours = optimizer(net)
    hidden = {"conv.weight", "head.weight"}
    muon = {}
    for name in hidden:  # the peer's hidden weights as plain matrices
        weight = dict(peer.named_parameters())[name].detach()
        matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1) if weight.ndim == 4 else weight
        muon[name] = nn.Parameter(matrix.clone())
    peer_muon = torch.optim.Muon(list(muon.values()), RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [p for name, p in peer.named_parameters() if name not in hidden]
    peer_adamw = torch.optim.AdamW(rest, RATE, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(3):
        backward(net, step)
        backward(peer, step)
        for name, matrix in muon.items():
            grad = dict(peer.named_parameters())[name].grad
            matrix.grad = grad.permute(0, 2, 3, 1).reshape(len(grad), -1) if grad.ndim == 4 else grad.clone()
        peer_muon.step()
        peer_adamw.step()
        peer.zero_grad()
        with torch.no_grad():
            for name, matrix in muon.items():
                weight = dict(peer.named_parameters())[name]
                shape = [weight.shape[i] for i in (0, 2, 3, 1)] if weight.ndim == 4 else weight.shape
                moved = matrix.reshape(shape)
                weight.copy_(moved.permute(0, 3, 1, 2) if weight.ndim == 4 else moved)
        ours.step()
        ours.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    for (name, mine), theirs in zip(net.named_parameters(), peer.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6), name
        assert not torch.equal(mine, dict(build().named_parameters())[name]), name


def test_state_goes_on_where_it_was_saved():
    straight, saved = build(), build()
    first, second = optimizer(straight), optimizer(saved)
    for step in range(2):
        for net, opt in ((straight, first), (saved, second)):
            backward(net, step)
            opt.step()
            opt.zero_grad()
    resumed = build()
    resumed.load_state_dict(saved.state_dict())
    third = optimizer(resumed)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    for net, opt in ((straight, first), (resumed, third)):
        for group in opt.param_groups:
            group["lr"] = RATE / 2
        backward(net, 2)
        opt.step()
        opt.zero_grad()
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)
