"""DDPM and DDIM as small functions over a predictor of the posterior.

A sampler knows no network, no guidance and no labels. It is given ``predict(x_t, t)``, with t an (N,) int64 tensor of
the process's own timesteps, which returns a :class:`Prediction`; and a noise source. The loops are generators, so
that every step can be looked at; :func:`last` keeps only the end.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """What a step needs of the model at x_t, each of x_t's shape (N, C, H, W)."""

    mean: Tensor
    log_variance: Tensor
    pred_xstart: Tensor
    eps: Tensor


class Step(NamedTuple):
    """State after a step: ``sample`` is x_{t-1} (x_{t+1} for the reverse ODE), ``pred_xstart`` the estimate of x_0."""

    sample: Tensor
    pred_xstart: Tensor


class Schedule(Protocol):
    """The part of a diffusion process that DDIM needs: alphas_cumprod as (N, 1, 1, 1) float32 at t, t - 1, t + 1."""

    def alpha_bar(self, t: Tensor, like: Tensor) -> Tensor: ...
    def alpha_bar_prev(self, t: Tensor, like: Tensor) -> Tensor: ...
    def alpha_bar_next(self, t: Tensor, like: Tensor) -> Tensor: ...


Predict = Callable[[Tensor, Tensor], Prediction]
RandnLike = Callable[[Tensor], Tensor]
StepFunction = Callable[[Predict, Tensor, Tensor, RandnLike], Step]


def ddpm_step(predict: Predict, x_t: Tensor, t: Tensor, randn_like: RandnLike = torch.randn_like) -> Step:
    """Ancestral sampling of x_{t-1} (DDPM, 2006.11239, Algorithm 2). x_t: (N, C, H, W); t: (N,)."""
    prediction = predict(x_t, t)
    noise = randn_like(x_t)  # drawn even where it is multiplied by zero: the number of draws is part of the contract
    nonzero = (t != 0).to(x_t.dtype).view(-1, 1, 1, 1)
    sample = prediction.mean + nonzero * (0.5 * prediction.log_variance).exp() * noise
    return Step(sample, prediction.pred_xstart)


def ddim_step(
    schedule: Schedule, eta: float, predict: Predict, x_t: Tensor, t: Tensor, randn_like: RandnLike = torch.randn_like
) -> Step:
    """One step of Eq. 12 of DDIM (2010.02502); eta 0 is deterministic, eta 1 is DDPM's variance."""
    prediction = predict(x_t, t)
    alpha_bar, alpha_bar_prev = schedule.alpha_bar(t, x_t), schedule.alpha_bar_prev(t, x_t)
    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
    noise = randn_like(x_t)
    mean = prediction.pred_xstart * alpha_bar_prev.sqrt() + (1 - alpha_bar_prev - sigma**2).sqrt() * prediction.eps
    nonzero = (t != 0).to(x_t.dtype).view(-1, 1, 1, 1)
    return Step(mean + nonzero * sigma * noise, prediction.pred_xstart)


def ddim_reverse_step(schedule: Schedule, predict: Predict, x_t: Tensor, t: Tensor) -> Step:
    """x_{t+1} of the deterministic DDIM ODE, run from data to noise (DDIM, section 4.3)."""
    prediction = predict(x_t, t)
    alpha_bar_next = schedule.alpha_bar_next(t, x_t)
    sample = prediction.pred_xstart * alpha_bar_next.sqrt() + (1 - alpha_bar_next).sqrt() * prediction.eps
    return Step(sample, prediction.pred_xstart)


@torch.no_grad()
def loop(
    step: StepFunction,
    predict: Predict,
    x_t: Tensor,
    timesteps: Iterable[int],
    randn_like: RandnLike = torch.randn_like,
) -> Iterator[Step]:
    """Apply ``step`` at each of ``timesteps`` in turn (descending to generate) and yield every state.

    x_t: (N, C, H, W), the starting noise. timesteps: indices of the process, e.g. ``range(num - 1, -1, -1)``.
    """
    for i in timesteps:
        state = step(predict, x_t, torch.full((len(x_t),), i, device=x_t.device, dtype=torch.long), randn_like)
        yield state
        x_t = state.sample


def last(states: Iterable[Step]) -> Tensor:
    """The final sample of a loop. Raises ValueError for a loop of no steps."""
    final = deque(states, maxlen=1)
    if not final:
        raise ValueError("a sampling loop needs at least one step")
    return final[0].sample
