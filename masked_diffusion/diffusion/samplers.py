"""Samplers as small functions over a predictor of the posterior, and the loop that applies them.

A sampler knows no network, no guidance and no labels. It is given ``predict(x_t, t)``, with t an (N,) int64 tensor of
the process's own timesteps, which returns a :class:`Prediction`; and a noise source. The loops are generators, so
that every step can be looked at; :func:`last` keeps only the end. Their t are on the CPU, wherever x_t is: what
depends on the timestep alone is decided without waiting for the device.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
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
    """The part of a diffusion process that samplers need.

    Tables of its T steps, and alphas_cumprod as (N, 1, 1, 1) float32 at t, t - 1, t + 1.
    """

    betas: np.ndarray
    alphas_cumprod: np.ndarray

    def alpha_bar(self, t: Tensor, like: Tensor) -> Tensor: ...
    def alpha_bar_prev(self, t: Tensor, like: Tensor) -> Tensor: ...
    def alpha_bar_next(self, t: Tensor, like: Tensor) -> Tensor: ...


Predict = Callable[[Tensor, Tensor], Prediction]
RandnLike = Callable[[Tensor], Tensor]
StepFunction = Callable[[Predict, Tensor, Tensor, RandnLike], Step]


def on_device_of(like: Tensor, values: Tensor) -> Tensor:
    """Values where ``like`` is. The CPU does not wait for the copy of its own."""
    return values.to(like.device, non_blocking=values.device.type == "cpu")


def ddpm_step(predict: Predict, x_t: Tensor, t: Tensor, randn_like: RandnLike = torch.randn_like) -> Step:
    """Ancestral sampling of x_{t-1} (DDPM, 2006.11239, Algorithm 2). x_t: (N, C, H, W); t: (N,)."""
    prediction = predict(x_t, t)
    noise = randn_like(x_t)  # drawn even where it is multiplied by zero: the number of draws is part of the contract
    sample = prediction.mean + _not_last(t, x_t) * (0.5 * prediction.log_variance).exp() * noise
    return Step(sample, prediction.pred_xstart)


def _not_last(t: Tensor, x_t: Tensor) -> Tensor:
    """1 where a step ends in noise, 0 where it ends in x_0: (N, 1, 1, 1)."""
    return on_device_of(x_t, (t != 0).to(x_t.dtype)).view(-1, 1, 1, 1)


def ddim_step(
    schedule: Schedule, eta: float, predict: Predict, x_t: Tensor, t: Tensor, randn_like: RandnLike = torch.randn_like
) -> Step:
    """One step of Eq. 12 of DDIM (2010.02502); eta 0 is deterministic, eta 1 is DDPM's variance."""
    prediction = predict(x_t, t)
    alpha_bar, alpha_bar_prev = schedule.alpha_bar(t, x_t), schedule.alpha_bar_prev(t, x_t)
    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
    noise = randn_like(x_t)
    mean = prediction.pred_xstart * alpha_bar_prev.sqrt() + (1 - alpha_bar_prev - sigma**2).sqrt() * prediction.eps
    return Step(mean + _not_last(t, x_t) * sigma * noise, prediction.pred_xstart)


def ddim_reverse_step(schedule: Schedule, predict: Predict, x_t: Tensor, t: Tensor) -> Step:
    """x_{t+1} of the deterministic DDIM ODE, run from data to noise (DDIM, section 4.3)."""
    prediction = predict(x_t, t)
    alpha_bar_next = schedule.alpha_bar_next(t, x_t)
    sample = prediction.pred_xstart * alpha_bar_next.sqrt() + (1 - alpha_bar_next).sqrt() * prediction.eps
    return Step(sample, prediction.pred_xstart)


# ---------------------------------------------------------------------------------------------------------------------
# Fewer-step solvers of the probability-flow ODE, from diffusers. They take the noise prediction and no variance.
# ---------------------------------------------------------------------------------------------------------------------


def _scheduler(name: str, schedule: Schedule, **settings: Any) -> Any:
    """The diffusers scheduler of this class name, on exactly the timesteps of a process, T - 1 ... 0, and then x_0."""
    import diffusers

    steps = len(schedule.betas)
    scheduler = getattr(diffusers, name)(
        num_train_timesteps=steps, trained_betas=schedule.betas, timestep_spacing="trailing", **settings
    )
    # Its own product of the betas is float32, where few steps of a cosine schedule lose some percent of alpha_bar.
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.set_timesteps(steps)
    return scheduler


def multistep_step(
    scheduler: Any, predict: Predict, x_t: Tensor, t: Tensor, randn_like: RandnLike = torch.randn_like
) -> Step:
    """One step of a solver that remembers the predictions of the steps before it, in ``scheduler``.

    Where a step is much longer than the one before, as the last one of an evenly respaced process is, its memory
    misleads the solver (samples of Gaussian data come out 40% too wide in ten steps): it forgets and takes first order.
    """
    prediction = predict(x_t, t)
    i = int(t[0])
    if _longer_than_before(scheduler.sigmas, len(scheduler.timesteps) - 1 - i):
        scheduler.lower_order_nums = 0
    return Step(scheduler.step(prediction.eps, i, x_t).prev_sample, prediction.pred_xstart)


def _longer_than_before(sigmas: Tensor, step: int) -> bool:
    """Whether a step is over 1 + sqrt(2) times as long in log-SNR as the last: the limit of stable two-step methods."""
    if step == 0 or sigmas[step + 1] == 0:
        return False
    last, length = (sigmas[step - 1 : step + 1] / sigmas[step : step + 2]).log().tolist()
    return length > (1 + math.sqrt(2)) * last


def heun_step(
    sigmas: Tensor,
    schedule: Schedule,
    predict: Predict,
    x_t: Tensor,
    t: Tensor,
    randn_like: RandnLike = torch.randn_like,
) -> Step:
    """One step of Heun's method (EDM, 2206.00364, Alg. 1): Euler, then the mean of the slopes at both ends.

    It integrates x / sqrt(alpha_bar), whose noise level at each timestep is ``sigmas``, (T,) float32. It takes two
    predictions, but one at t = 0 and where :func:`_euler_is_better`.
    """
    prediction = predict(x_t, t)
    i = int(t[0])
    sigma, sigma_prev = sigmas[i], sigmas[i - 1] if i > 0 else torch.zeros(())
    x = x_t / schedule.alpha_bar(t, x_t).sqrt()
    slope = (x - (x - sigma * prediction.eps)) / sigma  # (x - D) / sigma
    x_prev = x + slope * (sigma_prev - sigma)
    scale_prev = schedule.alpha_bar_prev(t, x_t).sqrt()
    if i > 0 and not _euler_is_better(sigma, sigma_prev):
        slope_prev = (x_prev - (x_prev - sigma_prev * predict(x_prev * scale_prev, t - 1).eps)) / sigma_prev
        x_prev = x + (slope + slope_prev) / 2 * (sigma_prev - sigma)
    return Step(x_prev * scale_prev, prediction.pred_xstart)


def _euler_is_better(sigma: Tensor, sigma_prev: Tensor) -> bool:
    """Whether a step begins so far out in the noise that the slope at its end is wrong for most of it.

    Of Gaussian data of deviation s the mean of two slopes is the worse one for sigma over 5 sigma_prev, or, where
    sigma_prev is small, over 2.8 s. The first step of a cosine process is of this kind: at 25 steps it leads from
    20,000 to 16. Data has deviations between 0.5 and 1.
    """
    return bool(sigma > 5 * sigma_prev + 2)


def _dpm_solver(schedule: Schedule) -> StepFunction:
    """DPM-Solver++ (2211.01095), the second-order multistep variant 2M."""
    return partial(multistep_step, _scheduler("DPMSolverMultistepScheduler", schedule))


def _unipc(schedule: Schedule) -> StepFunction:
    """UniPC (2302.04867): a predictor of second order with its corrector, on x_0."""
    return partial(multistep_step, _scheduler("UniPCMultistepScheduler", schedule))


def _heun(schedule: Schedule) -> StepFunction:
    sigmas = np.sqrt((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    return partial(heun_step, torch.from_numpy(sigmas).float(), schedule)


class Sampler(NamedTuple):
    """A sampler and the objectives that it serves.

    start: makes the step function of one trajectory. Solvers have a memory: start anew for every batch. serves: names
    of ``objectives.OBJECTIVES``.
    """

    start: Callable[[Schedule], StepFunction]
    serves: tuple[str, ...]


SAMPLERS = {
    "ddpm": Sampler(lambda schedule: ddpm_step, ("ddpm",)),
    "ddim": Sampler(lambda schedule: partial(ddim_step, schedule, 0.0), ("ddpm",)),
    "dpmsolver++": Sampler(_dpm_solver, ("ddpm",)),
    "unipc": Sampler(_unipc, ("ddpm",)),
    "heun": Sampler(_heun, ("ddpm",)),
}


def check_serves(sampler: str, objective: str, flag: str = "--sampler") -> None:
    """Raise ValueError, listing those that do, where a sampler of SAMPLERS does not serve an objective."""
    if objective not in SAMPLERS[sampler].serves:
        fitting = ", ".join(name for name, entry in SAMPLERS.items() if objective in entry.serves)
        raise ValueError(f"{flag} {sampler}: it does not serve --objective {objective}; choose one of {fitting}")


@torch.no_grad()
def loop(
    step: StepFunction,
    predict: Predict,
    x_t: Tensor,
    levels: Iterable[float],
    randn_like: RandnLike = torch.randn_like,
) -> Iterator[Step]:
    """Apply ``step`` at each of ``levels`` in turn (descending to generate) and yield every state.

    x_t: (N, C, H, W), the starting noise. levels: of an objective's grid; integers, such as
    ``range(num - 1, -1, -1)``, are timesteps of a process.
    """
    for level in levels:
        dtype = torch.long if isinstance(level, int) else torch.float64
        state = step(predict, x_t, torch.full((len(x_t),), level, dtype=dtype), randn_like)
        yield state
        x_t = state.sample


def last(states: Iterable[Step]) -> Tensor:
    """The final sample of a loop. Raises ValueError for a loop of no steps."""
    final = deque(states, maxlen=1)
    if not final:
        raise ValueError("a sampling loop needs at least one step")
    return final[0].sample
