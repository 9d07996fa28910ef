"""What the golden tests of every method share: stored answers, and how to compare with them.

A fixture holds what released code answered in float32 and, in most, in float64 too: arrays, and in
`meta` what they belong to. It may lack any that another of its kind has. So a check compares what
is there; a fixture of which nothing was compared fails, and so does one with an array left over.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

TWINS = ("64", "_f64")  # endings of an array's name in float64
Zero = Callable[[str, Tensor], Tensor]


def numbers(x: object) -> np.ndarray:
    return x.detach().double().numpy() if isinstance(x, Tensor) else np.asarray(x)


def same(ours: object, stored: object, message: str = "") -> None:
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(stored), err_msg=message)


def near(
    ours: object, stored: object, *, rtol: float | np.ndarray = 0.0,
    atol: float | np.ndarray = 0.0, message: str = "",
) -> None:  # fmt: skip
    ours, stored = numbers(ours), numbers(stored)
    assert ours.shape == stored.shape, f"{message}: {ours.shape}, not {stored.shape}"
    error, allowed = np.abs(ours - stored), atol + rtol * np.abs(stored)
    # Written so that NaN is an error.
    bad = np.argwhere(~(error <= allowed)).tolist()
    assert not bad, f"{message}: {len(bad)} differ, as {bad[:9]}; by up to {error.max()}"


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A model without storage: names, shapes and counts only."""
    with torch.device("meta"):
        return make()


class Fixture:
    """Arrays and `meta` of one file; what was taken or told counts as compared."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as stored:
            self.arrays = dict(stored)
        self.meta = json.loads(str(self.arrays.pop("meta")))
        self.compared = 0

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def take(self, name: str) -> np.ndarray:
        """An array to compare with; nobody else gets it."""
        self.compared += 1
        return self.arrays.pop(name)

    def told(self, key: str, default: object = None) -> object:
        """An entry of `meta` to compare with."""
        value = self.meta.get(key)
        self.compared += value is not None
        return default if value is None else value

    def named(self, prefix: str) -> list[str]:
        return [name for name in self.arrays if name.startswith(prefix)]

    def answers(self, name: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(name, answer, four times the spread between float32 and float64) of both, if there."""
        found = {n: self.take(n) for n in (name, *(name + t for t in TWINS)) if n in self}
        if f"{name}_float64" in self.meta:
            found[f"{name}_float64"] = np.asarray(self.told(f"{name}_float64"))
        spread = 4 * np.ptp(np.stack(list(found.values())), axis=0) if found else 0.0
        for key, value in found.items():
            yield key, value, spread

    def near(self, name: str, ours: object, *, rtol: float = 0.0, atol: float = 0.0) -> None:
        """Compare with `name` and its float64 twin, with what there is of them."""
        for key, stored, spread in self.answers(name):
            bound = np.maximum(atol + rtol * np.abs(stored), spread)
            near(ours, stored, atol=bound, message=key)

    def finish(self) -> None:
        assert not self.arrays, f"nothing compares {sorted(self.arrays)}"
        assert self.compared, "the file holds nothing that could be compared"


def check_statistics(x: Tensor, stored: np.ndarray, rtol: float, name: str) -> None:
    """[L2 norm, mean, standard deviation], the mean relative to the deviation."""
    x = x.detach().double()
    ours = [x.norm().item(), x.mean().item(), x.std(correction=0).item()]
    near(ours, stored, atol=rtol * np.array([stored[0], stored[2], stored[2]]), message=name)


@contextlib.contextmanager
def watched(sites: dict[str, tuple[nn.Module, str]]) -> Iterator[dict[str, Tensor]]:
    """What passes the sites, name -> (module, "in" or "out"), inside the context."""
    found, hooks = {}, []
    for name, (module, end) in sites.items():

        def keep(_: nn.Module, args: tuple, *out: Tensor, name: str = name) -> None:
            found[name] = (out or args)[0].detach()

        hook = module.register_forward_pre_hook if end == "in" else module.register_forward_hook
        hooks.append(hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


# ── gradients and one step of the optimizer ─────────────────────────────────────────────
# Some elements have a gradient of exactly zero, say a bias that softmax does not see. In float32
# rounding noise is left of it, another one on every CPU, of which AdamW makes steps of up to the
# learning rate. So these elements are put back to where they were. Float64 has no such noise, so
# there the norms agree closely; a float32 norm may differ by what such steps can do, no more.
# The few elements whose gradient is by chance as small as its rounding error are in doubt, too:
# lr g / (|g| + eps), a first step, is known only as well as g. That is added up element by element.

EPS = 1e-8  # of AdamW
ROUNDING = 4e-6  # of a gradient, relative to the root mean square of its tensor


def key_third(name: str, parameter: Tensor) -> Tensor:
    """Which elements of a parameter have a gradient of exactly zero: the keys' in a qkv bias."""
    zero = torch.zeros_like(parameter, dtype=torch.bool)
    if name.endswith("qkv.bias"):
        zero.view(3, -1)[1] = True
    return zero


def norms(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.array([t.detach().double().norm().item() for t in tensors])


def trained(fixture: Fixture, model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters in the order of the stored norms."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    keys = fixture.told("grad_keys", list(parameters))
    assert parameters.keys() == set(keys)
    return {key: parameters[key] for key in keys}


def check_gradients(
    fixture: Fixture, model: nn.Module, rtol: float, zero: Zero = key_third
) -> None:
    """Norm of every gradient, without the elements that must be zero: those are, but for noise."""
    parameters = trained(fixture, model)
    for key in fixture.told("keys_without_grad", []):
        assert dict(model.named_parameters())[key].grad is None, key
    total = np.linalg.norm(norms([p.grad for p in parameters.values()]))
    ours, empty = [], []
    for key, p in parameters.items():
        at, gradient = zero(key, p), p.grad.clone()
        gradient[at] = 0
        ours += norms([gradient]).tolist()
        empty.append(bool(at.all()))  # nothing but noise, which is stored, too
        noise = p.grad[at].double().norm().item()
        assert noise <= rtol * (total if empty[-1] else ours[-1]), f"{key} must have no gradient"
    fixture.near("grad_norms", ours, rtol=rtol, atol=rtol * total * np.array(empty))
    fixture.near("grad_total_norm", total, rtol=rtol)


def doubt(p: Tensor, lr: float) -> tuple[float, float]:
    """How far the norms of `p` and of its step are unknown, because its gradient is rounded."""
    error, moved, squares = ROUNDING * p.grad.double().square().mean().sqrt(), 0.0, 0.0
    # Part by part, so that all of a part stays in the cache.
    for x, g in zip(p.flatten().split(2**15), p.grad.flatten().abs().split(2**15), strict=True):
        g = g.double()
        low, high = torch.where(g == 0, 0, g - error), torch.where(g == 0, 0, g + error)
        steps = high / (high + EPS) - low / (low.abs() + EPS)
        moved += (x.double().abs() * steps).sum().item()
        squares += steps.square().sum().item()
    return lr * moved / max(p.double().norm().item(), 1e-30), lr * math.sqrt(squares)


def take_step(
    model: nn.Module, groups: list[dict], betas: tuple[float, float], lr: float = 1e-3,
    zero: Zero = key_third,
) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    """One step of AdamW at `lr` times each group's lr_scale, elements of no gradient put back.

    Returns for each parameter how far its norm may be off, by steps of noise and by doubt, and how
    far by doubt the norm of its step.
    """
    rates = {p: group for group in groups for p in group["params"]}
    named = {key: p for key, p in model.named_parameters() if p in rates}
    before = {key: p.detach().clone() for key, p in named.items()}
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    torch.optim.AdamW(groups, betas=betas, eps=EPS).step()
    reach = {}
    with torch.no_grad():
        for key, p in named.items():
            at, rate = zero(key, p), rates[p]["lr"]
            p[at] = before[key][at] * (1 - rate * rates[p]["weight_decay"])
            p.grad[at] = 0
            reach[key] = rate * math.sqrt(at.sum()), *doubt(p, rate)
    return reach


def check_after_step(
    fixture: Fixture, name: str, ours: dict[str, Tensor],
    reach: dict[str, tuple[float, float, float]], rtol: float,
) -> None:  # fmt: skip
    """Norms stored as `name`: only those in float32 contain steps of noise."""
    noise, doubts, _ = np.array([reach[key] for key in ours]).T
    for key, stored, spread in fixture.answers(name):
        bound = rtol * stored + doubts + (0 if key.endswith(TWINS) else noise)
        bound = np.maximum(bound, np.where(noise, 0, spread))  # that spread is noise as well
        near(norms(list(ours.values())), stored, atol=bound, message=key)


def names_in(model: nn.Module, group: dict) -> list[str]:
    ids = {id(p) for p in group["params"]}
    return [name for name, p in model.named_parameters() if id(p) in ids]


# ── every kernel ────────────────────────────────────────────────────────────────────────


def main(words: Sequence[str]) -> int:
    """`python -m tests.golden [words of pytest]`: all golden tests under every kernel of the CPU,
    with one thread and with two; 1 if any run fails."""
    failed = 0
    for kernel, threads in itertools.product(("default", "avx2", ""), "12"):
        changes = {"ATEN_CPU_CAPABILITY": kernel, "OMP_NUM_THREADS": threads}
        env = {k: v for k, v in (os.environ | changes).items() if v or k not in changes}
        print(f"ATEN_CPU_CAPABILITY={kernel} OMP_NUM_THREADS={threads}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-k", "golden", *words]
        failed |= subprocess.run(command, env=env).returncode
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
