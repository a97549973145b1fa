"""From a function of tensors to a compiled program: traced once, every tensor that it closes over made an input."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from restpoint.errors import RestpointError
from restpoint.model import kernels
from restpoint.model.cudagraph import Replayed
from restpoint.model.layered import LayeredModel
from restpoint.model.passes import Pass

Function = Callable[..., Any]
Program = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]
"""Called with the inputs of one pass and the cache's tensors, which it writes to; gives logits and h_L."""

_OPTIONS: dict[str, Any] = {
    # The loops that are left for the compiler are short: waking a thread for them costs more than it brings.
    "cpp.threads": 1,
    "size_asserts": False,
}


def compile_pass(
    functions: Pass,
    inputs: Sequence[Tensor],
    storage: Sequence[Tensor],
    using: Callable[[], AbstractContextManager[None]],
    compiled: bool,
) -> Program:
    """Make a program of a pass.

    Args:
        functions: the pass; its control flow may not depend on values.
        inputs: examples of what changes from pass to pass.
        storage: examples of the tensors that it writes to; they are overwritten.
        using: what is in force while the functions run, which is when they are traced.
        compiled: False to run the functions as they are.

    Raises:
        RestpointError: the tracer, the compiler or the model's code raise.
    """
    layered = functions.layered
    if not compiled:
        layers = [functions.layer(index) for index in range(layered.depth)]
        return _chained(
            _under(using, functions.opening), [_under(using, own) for own in layers], _under(using, functions.closing)
        )
    compiler = _Compiler(using)
    if layered.device.type == "cpu":
        kernels.compiler()
    with explained(layered), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own, about torch's own code
        opening = compiler.compile(functions.opening, inputs)
        state, *shared = opening(*inputs)
        layers = []
        for index in range(layered.depth):
            arguments = [state, *shared, *storage[2 * index : 2 * index + 2]]
            layers.append(compiler.compile(functions.layer(index), arguments))
        closing = compiler.compile(functions.closing, [state])
        program = _chained(opening, layers, closing)
        program(inputs, storage)
    return Replayed(program) if layered.device.type == "cuda" else program


@contextmanager
def explained(layered: LayeredModel) -> Iterator[None]:
    """Whatever a family's own code, the tracer or the compiler raises, as a refusal that says what to do."""
    try:
        yield
    except RestpointError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0][:160]
        reason = f"{type(error).__name__}: {line}"
        name = layered.config.model_type
        raise RestpointError(f"compile: {name} cannot be compiled ({reason}): leave compile out") from error


def _chained(opening: Function, layers: Sequence[Function], closing: Function) -> Program:
    def program(inputs: Sequence[Tensor], storage: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        state, *shared = opening(*inputs)
        for index, layer in enumerate(layers):
            state = layer(state, *shared, storage[2 * index], storage[2 * index + 1])
        return closing(state), state

    return program


def _under(using: Callable[[], AbstractContextManager[None]], function: Function) -> Function:
    def run(*inputs: Tensor) -> Any:
        with using():
            return function(*inputs)

    return run


class _Compiler:
    """Compiles functions of tensors; two that were traced to the same graph, as layers mostly are, share the result.

    Weights become inputs of the graph, so what is compiled does not depend on their values, and later runs find it
    again in torch's own cache.
    """

    def __init__(self, using: Callable[[], AbstractContextManager[None]]):
        self.using = using
        self.known: dict[Any, Function] = {}

    def compile(self, function: Function, inputs: Sequence[Tensor]) -> Function:
        """A compiled function that does what ``function`` does on tensors of the shapes of ``inputs``."""
        with self.using():
            graph = make_fx(lambda *given: function(*given), tracing_mode="real")(*inputs)
        held = _lift_constants(graph)
        given = [*inputs, *held]
        key = (graph.code, tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in given))
        if key not in self.known:
            self.known[key] = cast(Function, torch._inductor.compile(graph, cast(list[Any], given), options=_OPTIONS))
        run = self.known[key]
        return lambda *given: run(*given, *held)


def _lift_constants(graph: fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that a traced graph holds into further inputs, and return them in order."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    inputs: dict[int, tuple[fx.Node, Tensor]] = {}
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = (
            graph.get_parameter(node.target)
            if node.target in dict(graph.named_parameters())
            else getattr(graph, node.target)
        )
        if id(tensor) not in inputs:
            after = placeholders[-1] if not inputs else next(reversed(inputs.values()))[0]
            with graph.graph.inserting_after(after):
                placeholder = graph.graph.placeholder(f"held_{len(inputs)}")
            placeholder.meta = node.meta
            inputs[id(tensor)] = (placeholder, tensor.detach())
        node.replace_all_uses_with(inputs[id(tensor)][0])
        graph.graph.erase_node(node)
    graph.recompile()
    return [tensor for _, tensor in inputs.values()]
