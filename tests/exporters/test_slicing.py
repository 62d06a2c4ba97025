"""Structures cut out of small networks: what nothing reads can go without a trace, and the rest stays whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from networks.attention import LENGTH, WIDTH
from networks.attention import Block as AttentionBlock
from outrider_exporters import Data, Prune
from outrider_exporters.passes.base import PassContext
from outrider_exporters.passes.slicing import Slicer, find_prunable
from outrider_exporters.passes.slicing.attention import SlimAttention
from outrider_exporters.sources.module import PositionalModule, interface_from_module
from outrider_runtimes.errors import ExportError

pytestmark = pytest.mark.slow


class Recurrent(nn.Module):
    """A layer before, a recurrent network of several layers, two after."""

    def __init__(self, kind, *, layers=2, both=False, batch_first=True, state=False) -> None:
        super().__init__()
        self.before = nn.Linear(8, 16)
        self.body = kind(16, 16, layers, batch_first=batch_first, bidirectional=both)
        self.middle = nn.Linear(32 if both and not state else 16, 32)
        self.out = nn.Linear(32, 4)
        self.state = state

    def forward(self, x):
        y, state = self.body(self.before(x))
        if self.state:
            y = state[0] if isinstance(state, tuple) else state
            return self.out(torch.relu(self.middle(y[-1])))
        return self.out(torch.relu(self.middle(y)))


class OwnAttention(nn.Module):
    """softmax(QK^T / sqrt(d_k)) V by hand; ``fused`` has one projection for all three."""

    def __init__(self, *, width=16, heads=4, size=8, fused=False, derived=False) -> None:
        super().__init__()
        self.heads, self.size, self.width, self.derived = heads, size, width, derived
        inner = heads * size
        if fused:
            self.qkv = nn.Linear(width, 3 * inner)
        else:
            self.q, self.k, self.v = (nn.Linear(width, inner) for _ in range(3))
        self.fused = fused
        self.mix = nn.Linear(inner, width)

    def forward(self, x):
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        scale = (32 // self.heads if self.derived else self.size) ** 0.5
        weights = torch.softmax(q @ k.transpose(-1, -2) / scale, -1)
        return self.mix((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One block of a Transformer by hand."""

    def __init__(self, attention) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 16)
        self.attention = attention
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        x = self.enter(x)
        x = x + self.attention(self.norm(x))
        return self.out(x + self.down(torch.relu(self.up(x))))


class Encoder(nn.Module):
    def __init__(self, *, batch_first=True, norm_first=False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first, norm_first=norm_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first)
        self.out = nn.Linear(16, 4)

    def forward(self, tokens):
        return self.out(self.layers(self.embed(tokens)))


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.body = nn.Transformer(16, 4, 1, 1, 32, batch_first=True)
        self.out = nn.Linear(16, 20)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        padding = source == 0
        mixed = self.body(
            self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        return self.out(mixed)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.point = nn.Conv2d(32, 32, 1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.out = nn.Linear(16 * 64, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.point(self.depth(x)) + x)
        return self.out(torch.relu(self.up(torch.relu(self.grouped(x)))).flatten(1))


with torch.random.fork_rng(devices=[]):  # the same numbers whatever was imported before, and nobody else's are moved
    torch.manual_seed(0)
    SEQUENCE, TOKENS = torch.randn(3, 5, 8), torch.randint(1, 20, (3, 6))
    TOKEN_ROWS = torch.randn(2, LENGTH, WIDTH)
    NETWORKS = {
        **{
            f"{k.__name__}-{n}": (Recurrent(k, layers=n), (SEQUENCE,))
            for k in (nn.RNN, nn.GRU, nn.LSTM)
            for n in (1, 3)
        },
        "GRU-both": (Recurrent(nn.GRU, both=True), (SEQUENCE,)),
        "LSTM-both": (Recurrent(nn.LSTM, both=True), (SEQUENCE,)),
        "LSTM-state": (Recurrent(nn.LSTM, state=True), (SEQUENCE,)),
        "RNN-time-first": (Recurrent(nn.RNN, batch_first=False), (SEQUENCE,)),
        "own": (Block(OwnAttention()), (SEQUENCE,)),
        "fused": (Block(OwnAttention(fused=True)), (SEQUENCE,)),
        "encoder": (Encoder(), (TOKENS,)),
        "encoder-time-first": (Encoder(batch_first=False), (TOKENS,)),
        "encoder-norm-first": (Encoder(norm_first=True), (TOKENS,)),
        "translator": (
            Translator(),
            (torch.where(TOKENS > 15, 0, TOKENS).index_fill(1, torch.tensor(0), 1), TOKENS[:, :4]),
        ),
        "residual": (Residual(), (torch.randn(2, 3, 4, 4),)),
    }
KINDS = {
    "own": {"attention": "heads", "up": "channels", "down": "channels"},
    "encoder": {
        **{f"layers.layers.{i}.self_attn": "heads" for i in (0, 1)},
        **{f"layers.layers.{i}.linear1": "channels" for i in (0, 1)},
    },
    "LSTM-3": {"body": "hidden", "middle": "channels", "before": "channels"},
    "residual": {"point": "channels", "grouped": "channels", "up": "channels"},
}


def network_of(name):
    model, examples = NETWORKS[name]
    return PositionalModule(model, [f"input{i}" for i in range(len(examples))], ["out"]), examples


def outputs_of(network, examples):
    with torch.no_grad():
        return network.eval()(*examples)[0]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("half", [False, True])
def test_units_that_nothing_reads_can_go_without_a_trace(name, half):
    network, examples = network_of(name)
    groups = find_prunable(network, examples, round_to=4).groups
    silenced, pruned = copy.deepcopy(network), copy.deepcopy(network)
    before, after = (Slicer(n, examples, round_to=4) for n in (silenced, pruned))
    exact = {part.group.name for part in after.parts if part.exact}
    counts = {g.name: g.counts[len(g.counts) // 2 if half else -1] for g in groups if g.name in exact}
    before.silence(counts)
    after.apply(counts)
    wanted, got = outputs_of(silenced, examples), outputs_of(pruned, examples)
    assert float((wanted - got).abs().max()) <= 1e-6 * max(1.0, float(wanted.abs().max()))
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in network.parameters())
    if name in KINDS:
        assert {g.name: g.kind for g in groups} == KINDS[name]


@pytest.mark.parametrize("name", ["GRU-both", "own", "translator", "residual"])
def test_a_pruned_network_trains_and_can_be_pruned_again(name):
    network, examples = network_of(name)
    for left in (12, 8):
        groups = find_prunable(network, examples, round_to=4).groups
        plan = {g.name: max(g.counts[0], left) if g.kind != "heads" else g.counts[0] for g in groups}
        Slicer(network, examples, round_to=4).apply(plan)
    network.requires_grad_(True).train()
    network(*examples)[0].sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in network.parameters() if p.requires_grad)
    state = copy.deepcopy(network.state_dict())
    network.load_state_dict(state)
    copy.deepcopy(network)(*examples)


def test_the_least_important_go():
    model = Block(OwnAttention())
    with torch.no_grad():
        model.attention.mix.weight[:, 8:16] *= 0.01
        model.attention.v.weight[8:16] *= 0.01
        model.attention.q.weight[8:16] *= 0.01
        model.attention.k.weight[8:16] *= 0.01
    network = PositionalModule(model, ["x"], ["out"])
    Slicer(network, (SEQUENCE,), round_to=8).apply({"attention": 3})
    kept = torch.cat([model.attention.v.weight[:8], model.attention.v.weight[16:]])
    assert torch.equal(network.module.attention.v.weight, kept)
    assert network.module.attention.heads == 3


def test_what_cannot_be_cut_is_left_out_with_the_reason():
    network, examples = PositionalModule(Block(OwnAttention(derived=True)), ["x"], ["out"]), (SEQUENCE,)
    found = find_prunable(network, examples, round_to=8)
    assert found.skipped["attention"].startswith("the network computes something else with fewer of them; to prune")
    assert "up" in {group.name for group in found.groups}

    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.LSTM(8, 16, batch_first=True)
            self.out = nn.Linear(16, 4)

        def forward(self, x):
            y, (h, c) = self.body(x)
            return self.out(y), h.transpose(0, 1), c.transpose(0, 1)

    found = find_prunable(PositionalModule(States(), ["x"], ["y", "h", "c"]), examples, round_to=8)
    assert found.groups == ()
    assert found.skipped == {"body": "its hidden state is an output"}


class Named(OwnAttention):
    """Its number of heads is an attribute of another name, beside other numbers that divide the width."""

    def __init__(self, name, value=4) -> None:
        super().__init__(heads=value)
        self.depth, self.spare, self.key = 2, 8, name
        del self.heads
        if not hasattr(type(self), name):
            setattr(self, name, value)

    def forward(self, x):
        heads = getattr(self, self.key)
        q, k, v = (layer(x).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / self.size**0.5, -1)
        return self.mix((weights @ v).transpose(1, 2).flatten(2))


class OfTheClass(Named):
    COUNT = 4


CONSTANT = 4


class Constant(OwnAttention):
    """Its number of heads is a constant of the Python module."""

    def __init__(self) -> None:
        super().__init__()
        del self.heads

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (CONSTANT, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / self.size**0.5, -1)
        return self.mix((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("attention", "name"), [(Named("branches"), "branches"), (OfTheClass("COUNT"), "COUNT")])
def test_heads_are_pruned_by_whichever_attribute_holds_their_number(attention, name):
    network = PositionalModule(Block(attention), ["x"], ["out"])
    groups = {group.name: group for group in find_prunable(network, (SEQUENCE,), round_to=8).groups}
    assert (groups["attention"].kind, groups["attention"].units) == ("heads", 4)
    silenced, pruned = copy.deepcopy(network), copy.deepcopy(network)
    Slicer(silenced, (SEQUENCE,), round_to=8).silence({"attention": 2})
    Slicer(pruned, (SEQUENCE,), round_to=8).apply({"attention": 2})
    cut = pruned.module.attention
    assert (getattr(cut, name), cut.spare, cut.depth, cut.size) == (2, 8, 2, 8)
    assert cut.q.out_features == cut.mix.in_features == 16
    wanted, got = outputs_of(silenced, (SEQUENCE,)), outputs_of(pruned, (SEQUENCE,))
    torch.testing.assert_close(got, wanted, rtol=0.0, atol=1e-5)
    Slicer(pruned, (SEQUENCE,), round_to=8).apply({"attention": 1})
    assert getattr(pruned.module.attention, name) == 1
    again = find_prunable(pruned, (SEQUENCE,), round_to=8)
    assert "attention" not in {group.name for group in again.groups}


@pytest.mark.parametrize(
    ("model", "example", "name"), [(Block(Constant()), SEQUENCE, "attention"), (AttentionBlock(), TOKEN_ROWS, "model")]
)
def test_a_number_of_heads_that_is_no_attribute_is_left_out_with_what_to_write(model, example, name):
    found = find_prunable(PositionalModule(model, ["x"], ["out"]), (example,), round_to=8)
    assert "heads" not in {group.kind for group in found.groups}
    assert found.skipped[name].startswith("no attribute of it was found to hold the number of its heads; ")
    assert "self.heads = N in __init__" in found.skipped[name]


def test_pruning_that_finds_nothing_else_is_refused_with_what_to_write_in_the_module():
    model, example = Block(Constant()).eval(), {"x": SEQUENCE.numpy()}
    interface = interface_from_module(model, example, ["out"])
    context = PassContext(interface=interface, example=example, data=Data(test=(example, 0)), fit=lambda *_: None)
    with pytest.raises(ExportError, match=r"removed nothing \(.*attention: no attribute .*self\.heads = N in __init__"):
        Prune(ratio=0.1, round_to=64).call(PositionalModule(model, ["x"], ["out"]), context)


class Start(Recurrent):
    """Hands its recurrent layer a state of a written size."""

    def forward(self, x):
        y, _ = self.body(self.before(x), torch.zeros(2, x.shape[0], 16))
        return self.out(torch.relu(self.middle(y[:, -1])))


def test_a_size_written_into_forward_is_found_before_anything_is_cut():
    found = find_prunable(PositionalModule(Start(nn.GRU), ["x"], ["out"]), (SEQUENCE,), round_to=8)
    assert {group.name for group in found.groups} == {"before", "middle"}
    assert "the network cannot lose them" in found.skipped["body"]


class Alone(nn.Module):
    """Its outputs are cut off the layers that made them; or it runs once only."""

    def __init__(self, *, once=False) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(8, 16), nn.Linear(16, 4)
        self.once, self.ran = once, False

    def forward(self, x):
        if self.once and self.ran:
            raise RuntimeError("once only")
        self.ran = True
        y = self.out(torch.relu(self.first(x)))
        return y if self.once else y.detach()


def test_a_network_that_cannot_be_followed_has_nothing_to_prune_and_says_why():
    found = find_prunable(PositionalModule(Alone(), ["x"], ["out"]), (SEQUENCE,), round_to=8)
    assert found.groups == ()
    assert found.skipped == {"model": "its outputs lead back to no layer; forward has detach() or no_grad()"}
    found = find_prunable(PositionalModule(Alone(once=True), ["x"], ["out"]), (SEQUENCE,), round_to=8)
    assert found.groups == ()
    assert found.skipped == {"model": "torch-pruning cannot follow this network: RuntimeError: once only"}


def test_a_trial_leaves_the_network_as_it_was():
    network, examples = network_of("translator")
    network.requires_grad_(False)
    network.module.out.requires_grad_(True)
    before, trained = copy.deepcopy(network.state_dict()), [p.requires_grad for p in network.parameters()]
    find_prunable(network, examples, round_to=8)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [p.requires_grad for p in network.parameters()] == trained
    Slicer(network, examples, round_to=8).apply({"body.encoder.layers.0.self_attn": 2})
    assert {n for n, p in network.named_parameters() if p.requires_grad} == {"module.out.weight", "module.out.bias"}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_slim_attention_answers_as_the_one_it_replaces(batch_first, bias):
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(16, 4, batch_first=batch_first, bias=bias, kdim=12).eval()
    slim = SlimAttention(whole)
    q, k, v = torch.randn(5, 5, 16), torch.randn(5, 5, 12), torch.randn(5, 5, 16)
    mask, padding = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1), torch.zeros(5, 5, dtype=torch.bool)
    padding[:, 4:] = True
    cases = [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": mask, "is_causal": True, "need_weights": False},
        {"attn_mask": mask.float() * -1e9, "key_padding_mask": padding, "need_weights": False},
        {"attn_mask": mask, "key_padding_mask": padding},
    ]
    for options in cases:
        wanted, got = whole(q, k, v, **options), slim(q, k, v, **options)
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-6)
        assert (got[1] is None) == (wanted[1] is None)
        if wanted[1] is not None:
            torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-6)
    wanted, got = whole(q[0], k[0], v[0]), slim(q[0], k[0], v[0])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="3 axes"):
        slim(q, k, v, attn_mask=mask.expand(20, 5, 5))
