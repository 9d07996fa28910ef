"""Packing windows of unequal size into groups of one size, so that attention runs as one batch.

After masking, a local window holds anything between no token and all of them. Group window
attention (GreenMIM, arXiv 2205.13515, Sec. 3.2) puts whole windows together into groups of `S`
slots, pads each group and lets a token attend only to tokens of its own window. The result does
not depend on the packing; only the time does. Value equals weight in this knapsack, so it is a
subset-sum problem, and a set of reachable sums fits in one Python integer (bit v set = sum v can
be reached).

Everything here is NumPy on the host and knows nothing of the model:

    ids = window_ids(rows, columns, window=7, shift=3)          # (N,) window of each token
    plan = plan_groups(rows, columns, ids, window=7, sizing=cheapest_groups)
    q, k, v  ->  x[:, plan.slots]                               # (B, G * S, C)
    logits + table[plan.index] + plan.apart                     # (G, h, S, S)
    attended[:, plan.places]                                    # (B, N, C) back in token order
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Cost = Callable[[int, int], float]  # (number of groups, group size) -> cost of one attention
Sizing = Callable[[Sequence[int], int], list[list[int]]]  # (counts, window area) -> groups


@dataclass(frozen=True)
class GroupPlan:
    """How N tokens are laid out in G groups of S slots; arrays for the model to index with."""

    slots: np.ndarray | None  # (G * S,) int64: the token in each slot; padding repeats token 0
    places: np.ndarray | None  # (N,) int64: the slot of each token; None: tokens need not move
    index: np.ndarray  # (G, S, S) int64: row of the relative position table; 0 where masked
    apart: np.ndarray  # (G, 1, S, S) float32: 0 inside a window, -inf between windows


def pack(counts: Sequence[int], capacity: int) -> list[list[int]]:
    """Greedy packing: fill one group as full as can be, remove its windows, repeat.

    Returns window numbers, ascending inside a group. Ties go as in the released code: a window is
    left out whenever the windows before it can still reach the wanted sum.
    Raises ValueError unless 1 <= count <= capacity for every window.
    """
    if len(counts) == 0 or min(counts) < 1 or max(counts) > capacity:
        raise ValueError(f"window counts must lie in 1..{capacity} and not be empty: {counts}")
    cut = (2 << capacity) - 1  # sums above the capacity are of no interest
    remaining = list(range(len(counts)))
    groups = []
    while remaining:
        reach = [1]  # reach[i]: sums that the first i remaining windows can make
        for window in remaining:
            reach.append((reach[-1] | reach[-1] << counts[window]) & cut)
        missing = reach[-1].bit_length() - 1  # the fullest group
        group, rest = [], []
        for i in range(len(remaining) - 1, -1, -1):
            window = remaining[i]
            if reach[i] >> missing & 1:
                rest.append(window)
            else:
                group.append(window)
                missing -= counts[window]
        groups.append(group[::-1])
        remaining = rest[::-1]
    return groups


def released_groups(counts: Sequence[int], window_area: int) -> list[list[int]]:
    """The released rule: one group while N <= 2 w^2, else size min(w^2, largest window)."""
    if sum(counts) <= 2 * window_area:
        return [list(range(len(counts)))]
    return pack(counts, min(window_area, max(counts)))


def search_groups(counts: Sequence[int], cost: Cost) -> tuple[int, list[list[int]]]:
    """The paper's outer loop: the group size from max(counts) to sum(counts) that costs least.

    `cost` must grow with the number of groups; the first of equally cheap sizes wins. Sizes whose
    lower bound, ceil(sum / size) groups, is no better than the best so far are not packed.
    """
    total = int(sum(counts))
    best_cost, best_size, best = float("inf"), 0, []
    for size in range(int(max(counts)), total + 1):
        if cost(-(-total // size), size) >= best_cost:
            continue
        groups = pack(counts, size)
        if (found := cost(len(groups), size)) < best_cost:
            best_cost, best_size, best = found, size, groups
    return best_size, best


def attention_cost(groups: int, size: int) -> float:
    """Entries of the attention matrices."""
    return groups * size**2


def layer_cost(channels: int) -> Cost:
    """The paper's cost: multiply-adds of an attention layer, its projections padded as well."""
    return lambda groups, size: groups * (4 * size * channels**2 + 2 * size**2 * channels)


def cheapest_groups(
    counts: Sequence[int], window_area: int, cost: Cost = attention_cost
) -> list[list[int]]:
    """The groups of the size that costs least, as a sizing rule for `plan_groups`."""
    return search_groups(counts, cost)[1]


def window_ids(
    rows: np.ndarray, columns: np.ndarray, window: int, shift: int | tuple[int, int]
) -> np.ndarray:
    """(N,) id of the window of each token. A shift cuts border windows, as Swin's region mask does.

    `shift` is one number, or one for rows and one for columns. The shifted grid starts at
    -(window - shift), which is what rolling the map by -shift and forbidding attention between
    wrapped pieces amounts to.
    """
    shifts = shift if isinstance(shift, tuple) else (shift, shift)
    down, along = ((window - s) % window for s in shifts)
    across = int(columns.max()) // window + 2
    return (rows + down) // window * across + (columns + along) // window


def plan_groups(
    rows: np.ndarray, columns: np.ndarray, ids: np.ndarray, window: int, sizing: Sizing
) -> GroupPlan:
    """Lay out tokens at (rows, columns) with window `ids`, all (N,), in groups chosen by `sizing`.

    `window` is the side that the bias table is made for; where all windows are smaller, `index`
    stays in its middle. A group is as large as its fullest member, so `sizing` may ask for any
    capacity.
    """
    order = np.argsort(ids, kind="stable")  # tokens of one window side by side
    _, starts, counts = np.unique(ids[order], return_index=True, return_counts=True)
    groups = sizing(counts.tolist(), window**2)
    members = [
        np.concatenate([order[starts[w] : starts[w] + counts[w]] for w in group])
        for group in groups
    ]
    size = max(len(tokens) for tokens in members)

    slots = np.zeros((len(groups), size), np.int64)
    real = np.zeros((len(groups), size), bool)
    for g, tokens in enumerate(members):
        slots[g, : len(tokens)] = tokens if len(groups) > 1 else np.sort(tokens)
        real[g, : len(tokens)] = True
    places = np.empty(len(ids), np.int64)
    places[slots[real]] = np.flatnonzero(real)

    # Padding counts as a window of its own: a row with nothing to attend to would be all -inf,
    # and its softmax NaN.
    owner = np.where(real, ids[slots], -1)
    r, c = np.where(real, rows[slots], 0), np.where(real, columns[slots], 0)
    allowed = owner[:, :, None] == owner[:, None, :]
    dr, dc = r[:, :, None] - r[:, None, :], c[:, :, None] - c[:, None, :]
    index = np.where(allowed, (dr + window - 1) * (2 * window - 1) + dc + window - 1, 0)
    apart = np.where(allowed, np.float32(0), np.float32(-np.inf))[:, None]
    slots = slots.reshape(-1)
    if np.array_equal(slots, np.arange(len(ids))):
        slots = places = None
    return GroupPlan(slots, places, index, apart)
