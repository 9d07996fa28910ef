"""Packing of windows against the released code's answers and slow versions of the definition."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from common import grouping
from tests.conftest import golden_files
from tests.filling import uniform
from tests.golden import Fixture


def random_groups(counts: Sequence[int], window_area: int) -> list[list[int]]:
    """Windows in any order, in groups of any size: as far from the default as a plan can be."""
    rng = np.random.default_rng(len(counts))
    order = rng.permutation(len(counts)).tolist()
    cuts = np.flatnonzero(rng.random(len(counts)) < 0.4)
    return [group.tolist() for group in np.split(np.array(order), cuts) if len(group)]


SIZINGS: dict[str, grouping.Sizing] = {
    "cheapest": grouping.cheapest_groups,
    "released": grouping.released_groups,
    "one_group": lambda counts, _: [list(range(len(counts)))],
    "a_window_a_group": lambda counts, _: [[w] for w in range(len(counts))],
    "random": random_groups,
}
COSTS = {
    "attention": grouping.attention_cost,
    "layer_8": grouping.layer_cost(8),
    "layer_128": grouping.layer_cost(128),
    "slots": lambda groups, size: groups * size,
}


# ── golden files ────────────────────────────────────────────────────────────────────────


def lists_of_counts() -> list:
    """Files with window counts; every other kind belongs to tests/test_greenmim.py, which fails
    where it does not know one."""
    params = []
    for path in golden_files("greenmim"):
        cases = Fixture(path).meta.get("cases")
        if cases and "capacity_limit" in cases[0]:
            params.append(pytest.param(path, id=path.stem))
    return params


def visible_tokens(
    side: int, units: int, mask_ratio: float, u: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns, in raster order, of the tokens of the units with the smallest `u`."""
    keep = np.zeros(units**2, bool)
    keep[np.argsort(u)[: int(units**2 * (1 - mask_ratio))]] = True
    return np.nonzero(np.kron(keep.reshape(units, units), np.ones((side // units,) * 2)))


def counts_of(case: dict) -> list[int]:
    """The window counts that a case of kind swin describes."""
    units = case["image"] // 32
    u = uniform("grouping/mask", (units**2,), case["mask_seed"])
    rows, columns = visible_tokens(case["feature"], units, case["mask_ratio"], u)
    assert len(rows) == case["tokens"]
    assert case["visible_units"] == len(rows) // (case["feature"] // units) ** 2
    assert case["capacity_limit"] == case["window_used"] ** 2
    ids = grouping.window_ids(rows, columns, case["window_used"], case["shift"])
    return np.unique(ids, return_counts=True)[1].tolist()


def owners(groups: list[list[int]], windows: int) -> list[int]:
    """For every window the number of its group; each window must stand in exactly one."""
    assert sorted(itertools.chain(*groups)) == list(range(windows))
    assert all(group == sorted(group) for group in groups)
    group_of = {w: g for g, group in enumerate(groups) for w in group}
    return [group_of[w] for w in range(windows)]


def check_case(case: dict, counts: list[int], stored: dict, fill: list[int] | None) -> None:
    """`stored` is this case's entry of every array, partitions as lists over the windows."""

    def check(found: dict[str, object]) -> None:
        there = found.keys() & stored.keys()
        assert {key: found[key] for key in there} == {key: stored[key] for key in there}

    size = min(case["capacity_limit"], max(counts))
    groups = grouping.pack(counts, size)
    assert fill is None or [sum(counts[w] for w in group) for group in groups] == fill
    least = -(-sum(counts) // size)
    assert len(groups) >= least
    check({
        "group_size": size, "num_groups": len(groups), "lower_bound": least,
        "group_of_window": owners(groups, len(counts)),
        "cost": grouping.attention_cost(len(groups), size),
    })  # fmt: skip
    costs = {"search": grouping.attention_cost, "paper": grouping.layer_cost(case["channels"])}
    for name, cost in costs.items():
        best, found = grouping.search_groups(counts, cost)
        check({
            f"{name}_group_size": best, f"{name}_num_groups": len(found),
            f"{name}_group_of_window": owners(found, len(counts)),
            f"{name}_cost": cost(len(found), best),
        })  # fmt: skip
    if case["kind"] == "swin":
        assert counts_of(case) == counts
        released = grouping.released_groups(counts, case["capacity_limit"])
        if case["official_mode"] == "masking":
            assert released == [list(range(len(counts)))]
        else:
            assert released == groups
        _, cheapest = grouping.search_groups(counts, grouping.attention_cost)
        assert grouping.cheapest_groups(counts, case["capacity_limit"]) == cheapest
    elif case["kind"] != "adversarial":
        pytest.fail(f"no check for lists of kind {case['kind']!r}")


@pytest.mark.parametrize("path", lists_of_counts())
def test_golden_partitions_and_searches(path: Path) -> None:
    fixture = Fixture(path)
    counts, offsets = fixture.arrays.pop("counts"), fixture.arrays.pop("offsets")
    cases = fixture.meta["cases"]
    assert len(cases) == fixture.meta.get("number_of_cases", len(cases)) == len(offsets) - 1
    known = {"group_of_window", "group_size", "num_groups", "cost"}
    known |= {f"{name}_{array}" for name in ("search", "paper") for array in known}
    arrays = {n: fixture.take(n) for n in sorted((known | {"lower_bound"}) & fixture.arrays.keys())}
    fill, ends = (
        fixture.take(name) if name in fixture else None
        for name in ("group_fill", "group_fill_offsets")
    )
    for k, case in enumerate(cases):
        part = slice(offsets[k], offsets[k + 1])
        stored = {
            name: (array[part] if name.endswith("of_window") else array[k]).tolist()
            for name, array in arrays.items()
        }
        there = fill is not None and ends is not None
        ours = fill[ends[k] : ends[k + 1]].tolist() if there else None
        check_case(case, counts[part].tolist(), stored, ours)
    fixture.finish()


# ── packing ─────────────────────────────────────────────────────────────────────────────


def slow_pack(counts: list[int], capacity: int) -> list[list[int]]:
    """The greedy partition by trying every subset."""

    def sums(windows: list[int]) -> set[int]:
        return {
            sum(counts[w] for w in subset)
            for size in range(len(windows) + 1)
            for subset in itertools.combinations(windows, size)
        }

    remaining, groups = list(range(len(counts))), []
    while remaining:
        missing, group = max(s for s in sums(remaining) if s <= capacity), []
        for i in reversed(range(len(remaining))):
            if missing and missing not in sums(remaining[:i]):
                group.insert(0, remaining[i])
                missing -= counts[remaining[i]]
        groups.append(group)
        remaining = [w for w in remaining if w not in group]
    return groups


def random_lists(number: int, longest: int, largest: int) -> list[tuple[list[int], int]]:
    """Window counts and a capacity that fits them; small ranges, so that ties are common."""
    rng, lists = np.random.default_rng(0), []
    for _ in range(number):
        counts = rng.integers(1, largest + 1, rng.integers(1, longest + 1)).tolist()
        lists.append((counts, max(counts) + int(rng.integers(0, largest))))
    return lists


def test_pack_is_the_greedy_partition() -> None:
    for counts, capacity in random_lists(150, 7, 9):
        assert grouping.pack(counts, capacity) == slow_pack(counts, capacity), (counts, capacity)


@pytest.mark.parametrize(("counts", "capacity"), [([3, 0], 4), ([5], 4), ([1, 9, 2], 8), ([], 4)])
def test_pack_refuses_what_it_cannot_place(counts: list[int], capacity: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.{capacity}"):
        grouping.pack(counts, capacity)


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS.keys())
def test_search_finds_the_first_of_the_cheapest_sizes(cost: grouping.Cost) -> None:
    for counts, _ in random_lists(60, 14, 12):
        sizes = range(max(counts), sum(counts) + 1)
        priced = [(cost(len(grouping.pack(counts, size)), size), size) for size in sizes]
        size, groups = grouping.search_groups(counts, cost)
        assert (cost(len(groups), size), size) == min(priced), counts
        assert groups == grouping.pack(counts, size)


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS.keys())
def test_search_is_never_worse_than_the_released_size(cost: grouping.Cost) -> None:
    rng, better = np.random.default_rng(1), 0
    for trial in range(30):
        shift = (0, 3)[trial % 2]
        rows, columns = visible_tokens(56, 7, 0.75, rng.random(49))
        ids = grouping.window_ids(rows, columns, 7, shift)
        counts = np.unique(ids, return_counts=True)[1].tolist()
        size, groups = grouping.search_groups(counts, cost)
        released = grouping.released_groups(counts, 49)
        price = cost(len(released), min(49, max(counts)))
        assert cost(len(groups), size) <= price
        better += cost(len(groups), size) < price
    assert better


def test_released_rule_is_one_group_up_to_twice_the_window_area() -> None:
    assert grouping.released_groups([9, 9], 9) == [[0, 1]]
    assert grouping.released_groups([9, 9, 1], 9) == [[0], [1], [2]]
    assert grouping.released_groups([4, 4, 4, 4, 3], 9) == [[0], [1], [2], [3], [4]]


# ── windows ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("side", "window", "shift"), [(56, 7, 3), (28, 7, 0), (12, 6, 3), (9, 3, 1)]
)
def test_window_ids_are_swins_roll_and_region_mask(side: int, window: int, shift: int) -> None:
    rows, columns = np.divmod(np.arange(side**2), side)
    rolled = [(axis - shift) % side for axis in (rows, columns)]
    cells = [axis // window for axis in rolled]
    if shift:
        cells += [np.digitize(axis, [side - window, side - shift]) for axis in rolled]
    seen = np.stack(cells, 1)
    ids = grouping.window_ids(rows, columns, window, shift)
    together = (seen[:, None] == seen[None]).all(-1)
    np.testing.assert_array_equal(ids[:, None] == ids[None], together)


@pytest.mark.parametrize(
    ("side", "window", "shift"), [(56, 7, 3), (10, 3, 1), (8, 5, 2), (7, 7, 0)]
)
def test_windows_are_listed_row_by_row(side: int, window: int, shift: int) -> None:
    keep = np.random.default_rng(2).random((side, side)) < 0.3
    rows, columns = np.nonzero(keep)
    offset = (window - shift) % window
    places = [
        ((r + offset) // window, (c + offset) // window)
        for r, c in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    expected = [sorted(set(places)).index(place) for place in places]
    ids = grouping.window_ids(rows, columns, window, shift)
    assert np.unique(ids, return_inverse=True)[1].tolist() == expected


# ── plans ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sizing", SIZINGS.values(), ids=SIZINGS.keys())
@pytest.mark.parametrize(
    ("side", "units", "ratio", "window", "shift"),
    [
        (56, 7, 0.75, 7, 3),
        (28, 7, 0.6, 7, 0),
        (24, 3, 0.6, 3, 1),
        (16, 4, 0.0, 4, 2),
        (7, 7, 0.7, 7, 0),
    ],
)
def test_plan_keeps_every_token_in_its_window(
    side: int, units: int, ratio: float, window: int, shift: int, sizing: grouping.Sizing
) -> None:
    rows, columns = visible_tokens(side, units, ratio, np.random.default_rng(3).random(units**2))
    ids = grouping.window_ids(rows, columns, window, shift)
    plan = grouping.plan_groups(rows, columns, ids, window, sizing)
    groups, heads, size, keys = plan.apart.shape
    tokens = np.arange(len(rows))
    assert (heads, keys) == (1, size) and plan.index.shape == (groups, size, size)
    assert (plan.slots is None) == (plan.places is None)
    slots, places = (tokens, tokens) if plan.slots is None else (plan.slots, plan.places)
    assert slots.shape == (groups * size,) and np.isin(slots, tokens).all()
    assert plan.apart.dtype == np.float32
    assert slots.dtype == places.dtype == plan.index.dtype == np.int64

    # Every token has one slot of its own, where it stands.
    assert len(set(places.tolist())) == len(tokens)
    np.testing.assert_array_equal(slots[places], tokens)
    real = np.isin(np.arange(groups * size), places).reshape(groups, size)
    assert real.sum(1).max() == size

    # It sees its whole window and nothing else; padding sees something finite.
    assert set(np.unique(plan.apart)) <= {0.0, -np.inf}
    allowed = plan.apart[:, 0] == 0
    owner = np.where(real, ids[slots].reshape(groups, size), -1)
    both = real[:, :, None] & real[:, None, :]
    np.testing.assert_array_equal(allowed & both, (owner[:, :, None] == owner[:, None]) & both)
    assert not (allowed & (real[:, :, None] ^ real[:, None, :])).any()
    assert allowed.any(-1).all()
    seen = allowed.sum(-1).reshape(-1)[places]
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    np.testing.assert_array_equal(seen, counts[inverse])

    # Rows of the relative position table, spec 2.3.
    assert plan.index.min() >= 0 and plan.index.max() < (2 * window - 1) ** 2
    r, c = (axis[slots].reshape(groups, size) for axis in (rows, columns))
    dr, dc = r[:, :, None] - r[:, None], c[:, :, None] - c[:, None]
    index = (dr + window - 1) * (2 * window - 1) + dc + window - 1
    np.testing.assert_array_equal(plan.index[allowed & both], index[allowed & both])


def test_tokens_that_stand_in_order_are_not_moved() -> None:
    rows, columns = np.divmod(np.arange(16), 4)
    ids = grouping.window_ids(rows, columns, 4, 0)
    plan = grouping.plan_groups(rows, columns, ids, 4, grouping.cheapest_groups)
    assert plan.slots is None and plan.places is None and not plan.apart.any()
    ids = grouping.window_ids(rows, columns, 2, 0)
    plan = grouping.plan_groups(rows, columns, ids, 2, grouping.cheapest_groups)
    np.testing.assert_array_equal(plan.slots[:8], [0, 1, 4, 5, 2, 3, 6, 7])
