"""What every tree of candidates must be."""

from restpoint.decode.draft import ROOT, Candidates, Draft


def check_tree(candidates: Candidates, room: int) -> None:
    """Parents stand before their children, siblings differ, nothing is deeper than allowed, confidences are shares."""
    depths: list[int] = []
    nodes = zip(candidates.tokens, candidates.parents, candidates.confidences, strict=True)
    for node, (_, parent, confidence) in enumerate(nodes):
        assert ROOT <= parent < node
        assert 0 <= confidence <= 1
        depths.append(1 if parent == ROOT else depths[parent] + 1)
    assert max(depths, default=0) <= room
    children = Draft(tuple(candidates.tokens), tuple(candidates.parents)).children()
    assert sum(len(following) for following in children) == len(candidates.tokens)
