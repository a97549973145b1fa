"""Which nodes of a round's tree are verified: all that must be, then the others by the probability that they stand."""

from dataclasses import dataclass

from torch import Tensor

from restpoint.decode.draft import ROOT, Draft, Drawn
from restpoint.decode.tree import RoundTree, TreeSettings


@dataclass(frozen=True)
class Order:
    """Nodes in the order in which they are worth verifying.

    Attributes:
        nodes: of the trie, parents first.
        reaches: probability that each stands.
        least: the first so many are verified in any case.
        exits: layer and states that the target resumes from.
    """

    nodes: list[int]
    reaches: list[float]
    least: int
    exits: tuple[int, Tensor] | None


def order_nodes(tree: RoundTree, settings: TreeSettings, largest: int, exits: tuple[int, Tensor] | None) -> Order:
    """The nodes worth verifying; parents come first, and before all others the nodes whose first layers ran.

    Args:
        tree: of the round.
        settings: its limits.
        largest: nodes of the largest pass whose cost is known.
        exits: layer and states that the target resumes from; None where it runs from the embeddings.
    """
    trie = tree.trie
    first = [node for node in tree.expanded if node != ROOT] if exits else []
    bound = tree.with_ancestors([*first, *(child for drawn in tree.drawn.values() for child in drawn.nodes)])
    reaches = trie.exclusive_reaches() if settings.branching else trie.reaches
    if settings.branching:
        others = sorted(set(range(len(trie))) - bound, key=lambda node: (-reaches[node], node))
    else:
        others = [node for node in _best_chain(tree, bound) if node not in bound]
    nodes = [*first, *sorted(bound - set(first)), *others]
    if settings.fixed is None:
        nodes = nodes[: max(settings.limit(largest), len(bound))]
        return Order(nodes, [reaches[node] for node in nodes], len(bound), exits)
    nodes = nodes[: max(min(settings.fixed, largest), len(bound))]
    return Order(nodes, [1.0] * len(nodes), len(nodes), exits)


def draft_first(tree: RoundTree, order: Order, width: int) -> Draft:
    """The first nodes of the order, renumbered."""
    trie, nodes = tree.trie, order.nodes[:width]
    place = {node: index for index, node in enumerate(nodes)}
    place[ROOT] = ROOT
    layer, states = order.exits or (0, None)
    return Draft(
        tokens=[trie.tokens[node] for node in nodes],
        parents=[place[trie.parents[node]] for node in nodes],
        drawn={
            place[node]: Drawn(drawn.law, tuple(place[child] for child in drawn.nodes))
            for node, drawn in tree.drawn.items()
        },
        exit_layer=layer,
        exits=states,
    )


def _best_chain(tree: RoundTree, bound: set[int]) -> list[int]:
    """The path from the root, through all bound nodes, with the largest sum of reaches."""
    trie = tree.trie
    values = list(trie.reaches)
    for node in reversed(range(len(trie))):
        values[node] += max((values[child] for child in trie.children[node + 1].values()), default=0.0)
    chain, node = list[int](), ROOT
    while children := list(trie.children[node + 1].values()):
        node = max(children, key=lambda child: (child in bound, values[child]))
        chain.append(node)
    return chain
