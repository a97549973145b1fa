"""Q, K and V of a pretrained model's attention heads, as maps of particles on the unit sphere."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.theory.maps import Heads

_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
_FUSED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv", "qkv")
_OUTPUT = ("o_proj", "c_proj", "out_proj", "dense")
_BENDS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "q_a_proj", "kv_a_proj_with_mqa", "sinks")
_TOLERANCE = 1e-3  # of the attention's own output; a wrong arrangement is wrong by about 1


@dataclass(frozen=True, eq=False)
class ReadHeads:
    """Maps read from a model.

    Attributes:
        maps: of the chosen heads; inverse temperature 1 is the model's own.
        left_out: what the model's attention has beside them, in words.
    """

    maps: Heads
    left_out: tuple[str, ...]


@torch.no_grad()
def read_heads(layered: LayeredModel, layer: int, heads: Sequence[int] | None = None) -> ReadHeads:
    """A layer's heads acting on states x = h / |h|: scores xᵀ (QᵀK) y with the model's scaling, and V y.

    The norm before attention gives d^1/2 G x for a unit vector x, with its gain G (and, for a LayerNorm, its centring),
    so QᵀK = d s G Qᵀ K G with the model's scaling s of scores, and V = d^1/2 O V G with the head's columns O of the
    output map. Heads that share keys and values (grouped queries) each get their group's. Left out are rotary and
    other positions, biases and windows: what remains is the content part of the attention, so numbers hold for the
    maps and not for the model. Value and output maps are compared with what the layer's own attention makes of a
    single token.

    Args:
        layered: the model.
        layer: index of the layer, from 0.
        heads: indices of query heads; all if None.

    Returns:
        Maps in float64 on the CPU, and what was left out.

    Raises:
        RestpointError: there is no such layer or head, or Q, K, V cannot be extracted; it names the part.
    """
    if not 0 <= layer < layered.depth:
        raise RestpointError(f"layer is {layer}; the model has layers 0 to {layered.depth - 1}")
    where = f"model: layer {layer} of {layered.config.model_type}"
    block = layered.stack.layers[layer]
    attention, carried, query, key, value, output = _projections(block, where)
    bends = [name for name in _BENDS if getattr(attention, name, None) is not None]
    if getattr(layered.config, "attn_logit_softcapping", None):
        bends.append("attn_logit_softcapping")
    if bends:
        raise _refusal(where, f"its {bends[0]} makes scores no product <Qx, Ky>")
    groups, _each = key.shape[0], query.shape[1]
    count = query.shape[0]
    chosen = list(range(count)) if heads is None else list(heads)
    if not chosen or not all(0 <= head < count for head in chosen):
        raise RestpointError(f"head: {chosen} is not among heads 0 to {count - 1} of layer {layer}")
    shared = torch.arange(count) // (count // groups)
    value, key = value[shared], key[shared]
    gain = _check_and_gain(layered, layer, (attention, carried), value, output, where)
    scaling = _scaling(attention, where)
    keep = torch.tensor(chosen)
    query_key = gain.mT @ (scaling * query[keep].mT @ key[keep]) @ gain
    maps = Heads(query_key, output[keep] @ value[keep] @ gain)
    return ReadHeads(maps, _left_out(layered, attention))


def _projections(block: nn.Module, where: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """The attention, its output map as a module, Q, K, V (heads, inner, dim) and the output map (heads, dim, inner)."""
    names = {*_FUSED, *(triple[0] for triple in _SEPARATE), "q_a_proj"}
    owners = [module for module in block.modules() if any(hasattr(module, name) for name in names)]
    if not owners:
        raise _refusal(
            where, "it has no self-attention whose projections are called q_proj, c_attn, query_key_value, .."
        )
    attention = owners[0]
    outputs = [name for name in _OUTPUT if isinstance(getattr(attention, name, None), nn.Module)]
    if not outputs:
        raise _refusal(where, f"its {type(attention).__name__} has no output map ({', '.join(_OUTPUT)})")
    carried = getattr(attention, outputs[0])
    output = _matrix(carried, where, outputs[0])
    count, each = _sizes(attention, output.shape[1], where)
    columns = output.unflatten(1, (count, each)).movedim(1, 0)
    for triple in _SEPARATE:
        if hasattr(attention, triple[0]):
            missing = [name for name in triple if not hasattr(attention, name)]
            if missing:
                raise _refusal(where, f"its {type(attention).__name__} has no {missing[0]}")
            query, key, value = (_matrix(getattr(attention, name), where, name) for name in triple)
            break
    else:
        fused = [name for name in _FUSED if hasattr(attention, name)]
        if not fused:
            raise _refusal(where, f"its {type(attention).__name__} has compressed queries (q_a_proj) and no q_proj")
        query, key, value = _split(_matrix(getattr(attention, fused[0]), where, fused[0]), fused[0], count, each, where)
    if any(len(part) % each for part in (query, key, value)) or len(key) != len(value) or count % (len(key) // each):
        raise _refusal(where, f"its queries, keys and values do not divide into heads of {each}")
    query, key, value = (part.unflatten(0, (-1, each)) for part in (query, key, value))
    return attention, carried, query, key, value, columns


def _matrix(module: Any, where: str, name: str) -> Tensor:
    """Weights of a linear map, outputs by inputs."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise _refusal(where, f"its {name} is a {type(module).__name__}, which has no matrix")
    transposed = not isinstance(module, nn.Linear) and type(module).__name__ == "Conv1D"
    return (weight.t() if transposed else weight).detach().double().cpu()


def _sizes(attention: nn.Module, width: int, where: str) -> tuple[int, int]:
    """Number of query heads and size of each."""
    for name in ("head_dim", "head_size"):
        each = getattr(attention, name, None)
        if isinstance(each, int) and each > 0 and width % each == 0:
            return width // each, each
    for name in ("num_heads", "num_attention_heads", "n_heads"):
        count = getattr(attention, name, None)
        if isinstance(count, int) and count > 0 and width % count == 0:
            return count, width // count
    raise _refusal(where, f"its {type(attention).__name__} does not say how large a head is (head_dim, num_heads)")


def _split(fused: Tensor, name: str, count: int, each: int, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one matrix: interleaved by head or one kind after another."""
    rest = fused.shape[0] - count * each
    if rest <= 0 or rest % (2 * each):
        raise _refusal(
            where, f"its {name} has {fused.shape[0]} rows, not those of {count} heads of {each} with keys, values"
        )
    groups = rest // (2 * each)
    if name == "query_key_value":
        parts = fused.unflatten(0, (groups, count // groups + 2, each))
        return parts[:, :-2].flatten(0, 2), parts[:, -2].flatten(0, 1), parts[:, -1].flatten(0, 1)
    query, key, value = fused.split((count * each, groups * each, groups * each))
    return query, key, value


def _check_and_gain(
    layered: LayeredModel, layer: int, modules: tuple[nn.Module, nn.Module], value: Tensor, output: Tensor, where: str
) -> Float64[Tensor, "dim dim"]:
    """d^1/2 G of the norm before attention, after comparing O V with the attention's own output for single tokens."""
    ids = torch.arange(2, 5, device=layered.device)[:, None] % layered.vocabulary_size
    with _seen(*modules) as inside, _outputs(layered.stack.layers[layer]) as outputs:
        layered.run(layered.plan(ids), stop=layer + 1)
    given, made = (tensor.double().cpu()[:, 0] for tensor in inside)
    expected = torch.einsum("hdk,hke,be->bd", output, value, given - given[:1])[1:]
    actual = (made - made[:1])[1:]  # biases cancel
    difference = float((expected - actual).norm() / actual.norm())
    if not difference < _TOLERANCE * (1 if layered.dtype == torch.float32 else 30):
        raise _refusal(
            where, f"its value and output maps differ from its own attention by {difference:.1g} of its output"
        )
    source = next((module for module, result in outputs if result is inside[0]), None)
    return _gain(source, given.shape[-1], layered, where)


def _gain(norm: nn.Module | None, dim: int, layered: LayeredModel, where: str) -> Tensor:
    if norm is None:
        raise _refusal(where, "no norm stands before its attention, so the size of its states is not fixed")
    basis = torch.eye(dim, device=layered.device, dtype=layered.dtype) * dim**0.5  # large beside the norm's epsilon
    odd = ((norm(basis) - norm(-basis)).double().cpu() / 2).mT  # biases cancel
    off = odd - odd.diagonal().diag()
    centred = float(off.norm()) > 1e-3 * float(odd.norm())
    return odd * (1 - 1 / dim) ** 0.5 if centred else odd


@contextmanager
def _seen(attention: nn.Module, carried: nn.Module) -> Iterator[list[Tensor]]:
    """Input of the attention and output of its output map, after a pass."""
    found: list[Tensor] = []

    def note_input(_module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append(args[0] if args else keywords["hidden_states"])

    def note_output(_module: nn.Module, _args: Any, output: Tensor) -> None:
        found.append(output)

    hooks = (
        attention.register_forward_pre_hook(note_input, with_kwargs=True),
        carried.register_forward_hook(note_output),
    )
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _outputs(block: nn.Module) -> Iterator[list[tuple[nn.Module, Any]]]:
    """Every module in a layer that has a weight vector (a norm), with its output, after a pass."""
    found: list[tuple[nn.Module, Any]] = []
    hooks = [
        module.register_forward_hook(lambda one, _args, output: found.append((one, output)))
        for module in block.modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 1  # pyright: ignore
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _scaling(attention: nn.Module, where: str) -> float:
    """What the model multiplies scores by."""
    for name in ("scaling", "scale", "softmax_scale", "inv_norm_factor"):
        value = getattr(attention, name, None)
        if isinstance(value, float) and value > 0:
            return value
    raise _refusal(where, f"its {type(attention).__name__} does not say by what its scores are scaled (scaling)")


def _left_out(layered: LayeredModel, attention: nn.Module) -> tuple[str, ...]:
    accepted = inspect.signature(type(attention).forward).parameters
    rotary = "position_embeddings" in accepted
    either = rotary and "alibi" in accepted
    slopes = bool(getattr(layered.config, "alibi", False)) if either else bool({"alibi", "position_bias"} & {*accepted})
    present = {
        "rotary positions": rotary and not (either and slopes),
        "distance bias (ALiBi)": slopes,
        "biases of the projections": any(name.endswith("bias") for name, _ in attention.named_parameters()),
    }
    return tuple(name for name, here in present.items() if here)


def _refusal(where: str, reason: str) -> RestpointError:
    return RestpointError(f"{where}: Q, K, V cannot be extracted, because {reason}; simulate with maps of your own")


def attention_of(layered: LayeredModel, layer: int) -> nn.Module:
    """The module of a layer whose output, or the first of its outputs, is what its attention gives.

    Raises:
        RestpointError: the layer has no self-attention whose projections are known.
    """
    where = f"model: layer {layer} of {layered.config.model_type}"
    return _projections(layered.stack.layers[layer], where)[0]
