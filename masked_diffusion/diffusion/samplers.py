"""Samplers as small functions over a predictor of the posterior, and the loop that applies them.

A sampler knows no network, no guidance and no labels. It is given ``predict(x_t, t)``, with t an (N,) int64 tensor of
the process's own timesteps (or float64 levels of a continuous objective), which returns a :class:`Prediction`; and a
noise source. The loops are generators, so that every step can be looked at; :func:`last` keeps only the end. Their t
are on the CPU, wherever x_t is: what depends on the timestep alone is decided without waiting for the device.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from masked_diffusion.choices import DISCRETE_OBJECTIVES


class Prediction(NamedTuple):
    """What a step needs of the model at x_t, each of x_t's shape (N, C, H, W).

    mean, log_variance: of x_{t-1}, where the objective is a process of discrete steps.
    """

    pred_xstart: Tensor
    eps: Tensor
    mean: Tensor | None = None
    log_variance: Tensor | None = None


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
    assert prediction.mean is not None and prediction.log_variance is not None
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


# ---------------------------------------------------------------------------------------------------------------------
# Samplers on continuous levels. The state is float64; what the network is given is float32.
# ---------------------------------------------------------------------------------------------------------------------


class Path(Protocol):
    """The levels of one sampling and the path x = alpha x_0 + sigma eps that its objective takes between them."""

    levels: Sequence[float]

    def after(self, level: float) -> float:
        """The level that a step from this one leads to; 0 after the last."""
        ...

    def alpha(self, level: float) -> float: ...
    def sigma(self, level: float) -> float: ...
    def slope(self, prediction: Prediction) -> Tensor:
        """dx / dlevel of the probability-flow ODE."""
        ...


def euler_step(
    path: Path, predict: Predict, x: Tensor, level: Tensor, randn_like: RandnLike = torch.randn_like
) -> Step:
    """One step of Euler's method to the next level."""
    here = level[0].item()
    prediction = predict(x, level)
    return Step(x.double() + (path.after(here) - here) * path.slope(prediction), prediction.pred_xstart)


def heun_path_step(
    path: Path, predict: Predict, x: Tensor, level: Tensor, randn_like: RandnLike = torch.randn_like
) -> Step:
    """One step of Heun's method (EDM, 2206.00364, Alg. 1) in the objective's own variable; the last one is Euler's."""
    here = level[0].item()
    there = path.after(here)
    prediction = predict(x, level)
    slope = path.slope(prediction)
    x_next = x.double() + (there - here) * slope
    if there > 0:
        slope = (slope + path.slope(predict(x_next, torch.full_like(level, there)))) / 2
        x_next = x.double() + (there - here) * slope
    return Step(x_next, prediction.pred_xstart)


def ddim_path_step(
    path: Path, predict: Predict, x: Tensor, level: Tensor, randn_like: RandnLike = torch.randn_like
) -> Step:
    """The estimates of x_0 and of the noise, put together at the next level (DDIM, 2010.02502, with eta 0)."""
    there = path.after(level[0].item())
    prediction = predict(x, level)
    return Step(path.alpha(there) * prediction.pred_xstart + path.sigma(there) * prediction.eps, prediction.pred_xstart)


def euler_maruyama_step(
    path: Path, predict: Predict, x: Tensor, level: Tensor, randn_like: RandnLike = torch.randn_like
) -> Step:
    """One step of SiT's reverse SDE on the linear path (2401.08740, with w = sigma): g^2 = 2 t.

    Its drift is v - g^2 score / 2 = v + eps. The last step, to 0, adds no noise.
    """
    here = level[0].item()
    there = path.after(here)
    prediction = predict(x, level)
    x_next = x.double() - (here - there) * (path.slope(prediction) + prediction.eps)
    if there > 0:
        x_next = x_next + math.sqrt(2 * here * (here - there)) * randn_like(x)
    return Step(x_next, prediction.pred_xstart)


def _flow_solver(name: str, path: Path) -> StepFunction:
    """A solver of diffusers on the linear path, at exactly the levels of ``path``.

    No step between them is so much longer than the one before as to mislead its memory, see :func:`multistep_step`.
    """
    import diffusers

    scheduler = getattr(diffusers, name)(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(len(path.levels))
    # Where no signal is left its logarithm is infinite; so near to it, the first step is of first order.
    sigmas = torch.tensor([*path.levels, 0.0], dtype=torch.float64).clamp(max=1 - 1e-6)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)

    def step(predict: Predict, x: Tensor, level: Tensor, randn_like: RandnLike = torch.randn_like) -> Step:
        prediction = predict(x, level)
        i = path.levels.index(level[0].item())
        v = path.slope(prediction)
        return Step(scheduler.step(v, scheduler.timesteps[i], x.double()).prev_sample, prediction.pred_xstart)

    return step


class Sampler(NamedTuple):
    """A sampler.

    starts: for each objective that it serves, what makes the step function of one trajectory from a :class:`Schedule`
    or :class:`Path`. Solvers have a memory: start anew for every batch. last_level: where the last step begins; None
    for evenly spaced steps.
    """

    starts: dict[str, Callable[[Any], StepFunction]]
    last_level: float | None = None


def _on_steps(start: Callable[[Schedule], StepFunction]) -> dict[str, Callable[[Any], StepFunction]]:
    return dict.fromkeys(DISCRETE_OBJECTIVES, start)


def _on_paths(step: Callable[..., Step], *objectives: str) -> dict[str, Callable[[Any], StepFunction]]:
    return dict.fromkeys(objectives, partial(partial, step))


SAMPLERS = {
    "ddpm": Sampler(_on_steps(lambda schedule: ddpm_step)),
    "ddim": Sampler(
        _on_steps(lambda schedule: partial(ddim_step, schedule, 0.0)) | _on_paths(ddim_path_step, "flow", "edm")
    ),
    "dpmsolver++": Sampler(_on_steps(_dpm_solver) | {"flow": partial(_flow_solver, "DPMSolverMultistepScheduler")}),
    "unipc": Sampler(_on_steps(_unipc) | {"flow": partial(_flow_solver, "UniPCMultistepScheduler")}),
    "heun": Sampler(_on_steps(_heun) | _on_paths(heun_path_step, "flow", "edm")),
    "euler": Sampler(_on_paths(euler_step, "flow", "edm")),
    "euler_maruyama": Sampler(_on_paths(euler_maruyama_step, "flow"), last_level=0.04),
}


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
