"""Tiny models that iterate a block, and a slow recomputation of them: one row, one token, one head at a time."""

import math
from collections import defaultdict

import torch

from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.model.recurrent.config import RecurrentDepthConfig
from restpoint.model.recurrent.deq import DeepEquilibriumConfig, DeepEquilibriumForCausalLM

VOCABULARY = 61
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "prelude_layers": 1,
    "core_layers": 2,
    "coda_layers": 1,
    "mean_recurrence": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # large enough that context matters
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def recurrent(attention="sdpa", dtype=torch.float64, gain=1.0, **settings):
    """A random recurrent-depth model, the same at every call; with a small gain, its core contracts."""
    torch.manual_seed(0)
    model = RecurrentDepthForCausalLM(RecurrentDepthConfig(**{**TINY, **settings}))
    model.set_attn_implementation(attention)
    with torch.no_grad():
        model.model.adapter.weight[:, : model.config.hidden_size] *= gain
    return model.to(dtype).eval()


def equilibrium(attention="sdpa", dtype=torch.float64, gain=0.1, **settings):
    """A random deep equilibrium model, whose core contracts: it hardly hears the state."""
    torch.manual_seed(0)
    config = DeepEquilibriumConfig(**{**TINY, "tolerance": 1e-11, "max_steps": 200, **settings})
    model = DeepEquilibriumForCausalLM(config)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        model.model.adapter.weight[:, : config.hidden_size] *= gain
    return model.to(dtype).eval()


def tokens(rows=3, count=11, seed=0):
    return torch.randint(3, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def pieces(ids, sizes):
    assert sum(sizes) == ids.shape[1]
    return ids.split(list(sizes), dim=1)


class Slow:
    """One text, token by token, with keys and values in dictionaries: [layer][token][place of the step]."""

    def __init__(self, model, num_steps, stop=None, budget=None):
        self.model, self.inner, self.config = model, model.model, model.config
        self.num_steps, self.stop, self.budget = num_steps, stop, budget
        self.stored = defaultdict(lambda: defaultdict(dict))
        self.ran = []

    @torch.no_grad()
    def run(self, ids):
        """Logits (tokens, vocabulary) and the steps of every token."""
        noise = self.inner.noise.at(torch.arange(len(ids))[None], self.inner.adapter.weight)[0]
        logits = []
        for position, token in enumerate(ids.tolist()):
            self.ran.append(1)
            hidden = self.inner.embed_tokens.weight[token] * self.config.embedding_scale
            for layer in self.inner.prelude:
                hidden = self._layer(layer, hidden, position, 0, iterated=False)
            states = [noise[position]]
            predicted = []
            for step in range(self.num_steps):
                self.ran[position] = step + 1
                new = self.inner.adapter(torch.cat((states[-1], hidden)))
                for layer in self.inner.core:
                    new = self._layer(layer, new, position, step, iterated=True)
                states.append(new)
                predicted.append(self._finish(new, position))
                if self.stop is not None and self.stop(states, predicted):
                    break
            logits.append(predicted[-1])
        return torch.stack(logits), torch.tensor(self.ran)

    @torch.no_grad()
    def run_together(self, ids):
        """The same for further tokens that run step by step with one another; the rule may not read logits."""
        first, count = len(self.ran), len(ids)
        positions = range(first, first + count)
        noise = self.inner.noise.at(torch.arange(first + count)[None], self.inner.adapter.weight)[0]
        self.ran += [1] * count
        hidden = {at: self.inner.embed_tokens.weight[ids[at - first]] * self.config.embedding_scale for at in positions}
        hidden = self._layers(self.inner.prelude, hidden, 0, iterated=False)
        states, live = {at: [noise[at]] for at in positions}, list(positions)
        for step in range(self.num_steps):
            new = {at: self.inner.adapter(torch.cat((states[at][-1], hidden[at]))) for at in live}
            for at in live:
                self.ran[at] = step + 1
            for at, state in self._layers(self.inner.core, new, step, iterated=True).items():
                states[at].append(state)
            live = [at for at in live if self.stop is None or not self.stop(states[at], None)]
        last = self._layers(
            self.inner.coda, {at: self.inner.norm(states[at][-1]) for at in positions}, 0, iterated=False
        )
        return torch.stack([self.model.lm_head(self.inner.norm(last[at])) for at in positions])

    def _layers(self, layers, hidden, step, *, iterated):
        for layer in layers:
            for at, entering in hidden.items():
                self._store(layer, entering, at, step, iterated=iterated)
            hidden = {at: self._attend(layer, entering, at, step, iterated=iterated) for at, entering in hidden.items()}
        return hidden

    def _finish(self, state, position):
        hidden = self.inner.norm(state)
        for layer in self.inner.coda:
            hidden = self._layer(layer, hidden, position, 0, iterated=False)
        return self.model.lm_head(self.inner.norm(hidden))

    def _layer(self, layer, hidden, position, step, *, iterated):
        self._store(layer, hidden, position, step, iterated=iterated)
        return self._attend(layer, hidden, position, step, iterated=iterated)

    def _place(self, step, iterated):
        return 0 if not iterated else step % self.budget if self.budget else step

    def _store(self, layer, hidden, position, step, *, iterated):
        entered = layer.norm_1(hidden)
        key, value = (
            getattr(layer.self_attn, name)(entered).view(-1, self.config.head_dim) for name in ("k_proj", "v_proj")
        )
        self.stored[layer.self_attn.layer_idx][position][self._place(step, iterated)] = (_rotate(key, position), value)

    def _attend(self, layer, hidden, position, step, *, iterated):
        size, groups = self.config.head_dim, self.config.num_attention_heads // self.config.num_key_value_heads
        query = _rotate(layer.self_attn.q_proj(layer.norm_1(hidden)).view(-1, size), position)
        kept = self.stored[layer.self_attn.layer_idx]
        shown = [kept[at][self._place(min(step, self.ran[at] - 1), iterated)] for at in range(position + 1)]
        heads = []
        for head in range(query.shape[0]):
            keys = torch.stack([entry[0][head // groups] for entry in shown])
            values = torch.stack([entry[1][head // groups] for entry in shown])
            heads.append(torch.softmax(keys @ query[head] / math.sqrt(size), 0) @ values)
        hidden = layer.norm_2(hidden + layer.self_attn.o_proj(torch.cat(heads)))
        return layer.norm_4(hidden + layer.mlp(layer.norm_3(hidden)))


def _rotate(heads, position):
    """Entries i and i + size/2 of every head as one complex number, turned by position x 10000^(-2i/size).

    The angles in float32, as models have them: an iterated random core blows the difference up.
    """
    half = heads.shape[-1] // 2
    angles = position / 10000.0 ** (torch.arange(half, dtype=torch.float32) / half)
    turned = torch.complex(heads[..., :half], heads[..., half:]) * torch.complex(angles.cos(), angles.sin())
    return torch.cat((turned.real, turned.imag), dim=-1)
