"""Collect a training's numbers on the device until they are read."""

import math
from typing import Any

import torch
from torch import Tensor

from masked_diffusion.dist_util import Ranks

QUARTILES = 4


class Meter:
    """Keep running means on the device: losses of each view, over all levels of noise and by quartile (``_q0`` ...
    ``_q3``), the gradient's norm, and the number of skipped updates.

    The names are fixed from the start, so a quartile that no image hit still takes part in the reduction over ranks.
    """

    def __init__(self, loss_names: list[str], ranks: Ranks) -> None:
        self._losses = loss_names
        self._ranks = ranks
        self._quartiles = torch.arange(QUARTILES, device=ranks.device)
        self._sums = torch.zeros(len(loss_names), QUARTILES, dtype=torch.float64, device=ranks.device)
        self._counts = torch.zeros(QUARTILES, dtype=torch.float64, device=ranks.device)
        self._updates = torch.zeros(3, dtype=torch.float64, device=ranks.device)  # sum of norms, made, skipped

    def add_losses(self, share: Tensor, losses: dict[str, Tensor]) -> None:
        """share: (n,) float64 in [0, 1), the share of noise; losses: name -> (n,)."""
        # Not one_hot, which reads its input on a CPU to check the range.
        quartile = ((share[:, None] * QUARTILES).floor() == self._quartiles).double()  # (n, 4)
        self._sums += torch.stack([losses[name].double() for name in self._losses]) @ quartile
        self._counts += quartile.sum(dim=0)

    def add_update(self, norm: Tensor, good: Tensor) -> None:
        """Add an update. norm, good: (), equal on all ranks; a norm that is not finite marks a skipped update."""
        self._updates += torch.stack([torch.where(good, norm, 0), good, ~good]).double()

    def state_dict(self) -> dict[str, Any]:
        """What all ranks have collected since the last flush. Collective: every rank must call it."""
        sums = self._ranks.sum_(torch.cat([self._sums.flatten(), self._counts]))
        return {"names": list(self._losses), "sums": sums, "updates": self._updates.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was collected, so that a row covers the steps before a restart, too.

        A run that goes on with other losses starts its row anew.
        """
        if state["names"] != self._losses:
            return
        if self._ranks.is_main:  # for all ranks of then, however many there are now
            sums = state["sums"].to(self._sums.device)
            self._sums.copy_(sums[:-QUARTILES].view_as(self._sums))
            self._counts.copy_(sums[-QUARTILES:])
        self._updates.copy_(state["updates"])

    def flush(self) -> dict[str, float]:
        """Return means over all ranks since the last flush (NaN without values), and the number of ``skipped`` updates.

        Collective: every rank must call it. It reduces once and copies to the host once.
        """
        numbers = torch.cat([self._sums.flatten(), self._counts, self._updates])
        *values, norms, made, skipped = self._ranks.sum_(numbers).tolist()
        for running in (self._sums, self._counts, self._updates):
            running.zero_()
        counts = values[-QUARTILES:]
        row = {}
        for i, name in enumerate(self._losses):
            sums = values[QUARTILES * i : QUARTILES * (i + 1)]
            row[name] = _mean(sum(sums), sum(counts))
            row |= {f"{name}_q{q}": _mean(sums[q], counts[q]) for q in range(QUARTILES)}
        return row | {"grad_norm": _mean(norms, made), "skipped": skipped / self._ranks.world_size}


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan


class DelayedFlag:
    """Read a flag on the host one step after the device set it, so that the host never waits for a step."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._host = torch.zeros((), dtype=torch.bool, pin_memory=self._on_gpu)
        self._value = self._host.numpy()  # the same memory
        # The host sleeps until the event, instead of keeping a core busy that loader processes could use.
        self._arrived = torch.cuda.Event(blocking=True) if self._on_gpu else None

    def put(self, flag: Tensor) -> None:
        """flag: () bool on the device."""
        self._host.copy_(flag, non_blocking=self._on_gpu)
        if self._arrived is not None:
            self._arrived.record()

    def get(self) -> bool:
        """Return the flag that was put last."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)
