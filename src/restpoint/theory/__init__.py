"""Token dynamics in theory: tokens as interacting particles, layers as time."""
