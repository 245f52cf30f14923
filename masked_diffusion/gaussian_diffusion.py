"""Compute with the Gaussian diffusion process: its tables, q, p and losses.

Sources: DDPM (2006.11239), learned variances (2102.09672), ADM's numerics. Tables are float64; formulas compute with
float32 entries. A model is a callable ``model(x_t, t, **model_kwargs)``.
"""

import enum
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masked_diffusion.diffusion import samplers
from masked_diffusion.diffusion.samplers import Prediction, on_device_of

Model = Callable[..., Tensor]
Terms = dict[str, Tensor]
Reduction = Callable[[Tensor], Tensor]  # (N, C, H, W) -> (N,)
# The estimate of x_0 and the noisy x, each (N, C, H, W) -> further terms of the loss by name, each (N,).
Extra = Callable[[Tensor, Tensor], dict[str, Tensor]]


class ModelMeanType(enum.Enum):
    """Meaning of the network's first C channels."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()
    VELOCITY = enum.auto()


class ModelVarType(enum.Enum):
    """Origin of the reverse process's variance."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()

    @property
    def is_learned(self) -> bool:
        return self in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


class LossType(enum.Enum):
    """Mean squared error (plus the variational term where the variance is learned), or the variational bound alone."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    @property
    def is_vb(self) -> bool:
        return self in (LossType.KL, LossType.RESCALED_KL)


def get_named_beta_schedule(name: str, num_steps: int) -> np.ndarray:
    """(num_steps,) float64 betas of ``linear`` or ``squaredcos_cap_v2`` (also ``cosine``).

    Raises ValueError for another name, listing the known ones, and for fewer than one step.
    """
    if num_steps < 1:
        raise ValueError(f"--diffusion_steps {num_steps}: must be at least 1")
    if name == "linear":
        scale = 1000 / num_steps  # the same noise range whatever the number of steps
        if scale * 0.02 >= 1:
            raise ValueError(f"--diffusion_steps {num_steps}: too few for --noise_schedule linear; 21 is the least")
        return np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)
    if name in ("squaredcos_cap_v2", "cosine"):
        s = 0.008
        alpha_bar = np.cos((np.arange(num_steps + 1) / num_steps + s) / (1 + s) * math.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise ValueError(f"--noise_schedule {name}: unknown; choose one of linear, squaredcos_cap_v2, cosine")


def add_terms(terms: Terms, further: Terms) -> None:
    """Put further terms beside those of a loss, and add them to it."""
    terms["loss"] = sum(further.values(), terms["loss"])
    terms |= further


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all but the batch dimension: (N, ...) -> (N,)."""
    return x.flatten(1).mean(dim=1)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) per element, in nats."""
    return 0.5 * (logvar2 - logvar1 - 1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def _approx_standard_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-likelihood in nats of 8-bit data under a Gaussian, per element.

    x: data in [-1, 1], each value a bin of +-1/255, the outer bins open. log_scale: log of the standard deviation.
    """
    centered, inv_std = x - mean, torch.exp(-log_scale)
    cdf_upper = _approx_standard_normal_cdf(inv_std * (centered + 1 / 255))
    cdf_lower = _approx_standard_normal_cdf(inv_std * (centered - 1 / 255))
    probability = torch.where(x < -0.999, cdf_upper, torch.where(x > 0.999, 1 - cdf_lower, cdf_upper - cdf_lower))
    return probability.clamp(min=1e-12).log()


class GaussianDiffusion:
    """A diffusion process of T = len(betas) steps.

    betas: (T,) in (0, 1]. min_snr_gamma: cap of the signal-to-noise ratio in min-SNR loss weighting (2303.09556);
    None weights all timesteps alike. Raises ValueError for betas of another shape or range.
    """

    def __init__(
        self,
        *,
        betas: np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        min_snr_gamma: float | None = None,
    ) -> None:
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas: expected a one-dimensional array of numbers in (0, 1]")
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.min_snr_gamma = min_snr_gamma

        self.betas = betas
        self.num_timesteps = len(betas)
        alphas = 1 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_0). Its variance is 0 at t = 0, so the log takes the next one there.
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        clipped = self.posterior_variance.copy()
        clipped[0] = clipped[1] if self.num_timesteps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(clipped)
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1 - self.alphas_cumprod)

        self.log_betas = np.log(betas)
        # betas with the posterior's variance at t = 0: a better decoder likelihood than beta_0
        self.fixed_large_variance = np.append(clipped[0], betas[1:])
        self.fixed_large_log_variance = np.log(self.fixed_large_variance)
        self._tables_on_device: dict[tuple[str, torch.device], Tensor] = {}

    def _at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """Look up ``self.table[t]`` as float32, (N, 1, ..., 1), with the dimensions and on the device of ``like``.

        t may be on that device or on the CPU. The table is copied to a device once.
        """
        key = (table, t.device)
        if key not in self._tables_on_device:
            self._tables_on_device[key] = torch.from_numpy(getattr(self, table)).to(t.device)
        values = on_device_of(like, self._tables_on_device[key][t].float())
        return values.view(-1, *(1,) * (like.dim() - 1))

    def alpha_bar(self, t: Tensor, like: Tensor) -> Tensor:
        return self._at("alphas_cumprod", t, like)

    def alpha_bar_prev(self, t: Tensor, like: Tensor) -> Tensor:
        return self._at("alphas_cumprod_prev", t, like)

    def alpha_bar_next(self, t: Tensor, like: Tensor) -> Tensor:
        return self._at("alphas_cumprod_next", t, like)

    def original_timesteps(self, t: Tensor) -> Tensor:
        """Map this process's timesteps to those that the model knows; a spaced process differs. t: (N,) int64."""
        return t

    # -- q: from data to noise -----------------------------------------------------------------------------------------

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log-variance of q(x_t | x_0). x_start: (N, C, H, W); t: (N,)."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = 1 - self.alpha_bar(t, x_start)
        return mean, variance.expand_as(mean), self._at("log_one_minus_alphas_cumprod", t, x_start).expand_as(mean)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t of q(x_t | x_0) (DDPM, Eq. 4). noise: (N, C, H, W) normal; None draws it."""
        noise = torch.randn_like(x_start) if noise is None else noise
        scaled = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        return scaled + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (DDPM, Eq. 7)."""
        coef1, coef2 = self._at("posterior_mean_coef1", t, x_t), self._at("posterior_mean_coef2", t, x_t)
        mean = coef1 * x_start + coef2 * x_t
        variance = self._at("posterior_variance", t, x_t).expand_as(mean)
        return mean, variance, self._at("posterior_log_variance_clipped", t, x_t).expand_as(mean)

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        recip = self._at("sqrt_recip_alphas_cumprod", t, x_t)
        return recip * x_t - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        recip = self._at("sqrt_recip_alphas_cumprod", t, x_t)
        return (recip * x_t - pred_xstart) / self._at("sqrt_recipm1_alphas_cumprod", t, x_t)

    # -- network output -> prediction -> target -> loss ----------------------------------------------------------------

    def _predict_xstart(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's estimate of x_0. output: its first C channels."""
        if self.model_mean_type is ModelMeanType.START_X:
            return output
        if self.model_mean_type is ModelMeanType.EPSILON:
            return self._predict_xstart_from_eps(x_t, t, output)
        if self.model_mean_type is ModelMeanType.VELOCITY:
            signal = self._at("sqrt_alphas_cumprod", t, x_t)
            return signal * x_t - self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * output
        coef1, coef2 = self._at("posterior_mean_coef1", t, x_t), self._at("posterior_mean_coef2", t, x_t)
        return (output - coef2 * x_t) / coef1

    def _target(self, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network's first C channels should be."""
        if self.model_mean_type is ModelMeanType.START_X:
            return x_start
        if self.model_mean_type is ModelMeanType.EPSILON:
            return noise
        if self.model_mean_type is ModelMeanType.VELOCITY:
            signal = self._at("sqrt_alphas_cumprod", t, x_t)
            return signal * noise - self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * x_start
        return self.q_posterior_mean_variance(x_start, x_t, t)[0]

    def _mse_weight(self, t: Tensor) -> Tensor | float:
        """Weight of the squared error per sample, (N,): min-SNR weighting (2303.09556, section 3.4), or 1."""
        if self.min_snr_gamma is None:
            return 1.0
        alpha_bar = self.alpha_bar(t, t)
        snr = alpha_bar / (1 - alpha_bar)
        capped = snr.clamp(max=self.min_snr_gamma)
        if self.model_mean_type is ModelMeanType.VELOCITY:
            return capped / (snr + 1)
        return capped if self.model_mean_type is ModelMeanType.START_X else capped / snr

    def _variance(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and log-variance of p(x_{t-1} | x_t). output: the network's variance channels, where learned."""
        if self.model_var_type is ModelVarType.LEARNED:
            return output.exp(), output
        if self.model_var_type is ModelVarType.LEARNED_RANGE:
            low = self._at("posterior_log_variance_clipped", t, x_t)
            high = self._at("log_betas", t, x_t)
            fraction = (output + 1) / 2  # the network's v in [-1, 1] interpolates between the two bounds
            log_variance = fraction * high + (1 - fraction) * low
            return log_variance.exp(), log_variance
        tables = ("posterior_variance", "posterior_log_variance_clipped")
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            tables = ("fixed_large_variance", "fixed_large_log_variance")
        variance, log_variance = (self._at(table, t, x_t).expand_as(x_t) for table in tables)
        return variance, log_variance

    def _split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """Network output -> (its mean channels, its variance channels)."""
        channels = x_t.shape[1]
        expected = 2 * channels if self.model_var_type.is_learned else channels
        if output.shape[1] != expected:
            raise ValueError(
                f"the model returned {output.shape[1]} channels, this process needs {expected}: "
                "--learn_sigma must be the same for both"
            )
        return output[:, :channels], output[:, channels:]

    def _p_mean_variance_of(
        self, output: Tensor, x_t: Tensor, t: Tensor, denoised_fn: Callable[[Tensor], Tensor] | None, clip: bool
    ) -> dict[str, Any]:
        mean_output, variance_output = self._split(output, x_t)
        variance, log_variance = self._variance(variance_output, x_t, t)
        pred_xstart = self._predict_xstart(mean_output, x_t, t)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip:
            pred_xstart = pred_xstart.clamp(-1, 1)
        if self.model_mean_type is ModelMeanType.PREVIOUS_X:
            mean = mean_output
        else:
            mean = self.q_posterior_mean_variance(pred_xstart, x_t, t)[0]
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def _vb_terms_bpd(self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, clip: bool) -> Terms:
        """One term of the variational bound in bits per dimension, (N,), and ``pred_xstart``.

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the decoder's negative log-likelihood.
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self._p_mean_variance_of(output, x_t, t, None, clip)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        nll = -discretized_gaussian_log_likelihood(x_start, out["mean"], 0.5 * out["log_variance"])
        bits = torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2)
        return {"output": bits, "pred_xstart": out["pred_xstart"]}

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        counts: Reduction = mean_flat,
        extra: Extra | None = None,
    ) -> Terms:
        """Compute the losses at timesteps t, each (N,): ``loss``, and its parts ``mse`` and ``vb`` where they exist.

        x_start: (N, C, H, W). t: (N,) int64 in [0, T). noise: (N, C, H, W) normal; None draws it. counts: reduces the
        squared error (N, C, H, W) to (N,); the variational terms are means over everything. extra: makes further terms
        beside the squared error.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self.original_timesteps(t), **(model_kwargs or {})).float()
        if self.loss_type.is_vb:
            scale = self.num_timesteps if self.loss_type is LossType.RESCALED_KL else 1.0
            return {"loss": scale * self._vb_terms_bpd(output, x_start, x_t, t, clip=False)["output"]}

        mean_output, variance_output = self._split(output, x_t)
        target = self._target(x_start, x_t, t, noise)
        terms = {"mse": self._mse_weight(t) * counts((target - mean_output) ** 2)}
        terms["loss"] = terms["mse"]
        if self.model_var_type.is_learned:
            # The variational term trains the variance only; the mean is left to the squared error.
            frozen = torch.cat([mean_output.detach(), variance_output], dim=1)
            scale = self.num_timesteps / 1000 if self.loss_type is LossType.RESCALED_MSE else 1.0
            terms["vb"] = scale * self._vb_terms_bpd(frozen, x_start, x_t, t, clip=False)["output"]
            terms["loss"] = terms["mse"] + terms["vb"]
        if extra is not None:
            add_terms(terms, extra(self._predict_xstart(mean_output, x_t, t), x_t))
        return terms

    # -- p: from noise to data -----------------------------------------------------------------------------------------

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return p(x_{t-1} | x_t) and the estimate of x_0.

        x: (N, C, H, W). t: (N,) int64, on the device of x or on the CPU. clip_denoised: clamp the estimate to [-1, 1].
        denoised_fn: applied to the estimate before the clamp. Returns ``mean, variance, log_variance, pred_xstart``,
        each of x's shape, and ``extra``: the second entry of a model that returns a pair, else None.
        """
        output = model(x, on_device_of(x, self.original_timesteps(t)), **(model_kwargs or {}))
        output, extra = output if isinstance(output, tuple) else (output, None)
        return {**self._p_mean_variance_of(output.float(), x, t, denoised_fn, clip_denoised), "extra": extra}

    def condition_mean(
        self,
        cond_fn: Callable[..., Tensor],
        p_mean_var: dict[str, Any],
        x: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Shift the mean along ``cond_fn(x, t) = grad log p(y | x)`` (classifier guidance, 2105.05233, Alg. 1)."""
        gradient = cond_fn(x, on_device_of(x, self.original_timesteps(t)), **(model_kwargs or {}))
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(
        self,
        cond_fn: Callable[..., Tensor],
        p_mean_var: dict[str, Any],
        x: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Shift the score of a prediction by ``cond_fn``, for DDIM (2105.05233, Alg. 2)."""
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        gradient = cond_fn(x, on_device_of(x, self.original_timesteps(t)), **(model_kwargs or {}))
        eps = eps - (1 - self.alpha_bar(t, x)).sqrt() * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    def predictor(
        self,
        model: Model,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        cond_on: str = "mean",
    ) -> samplers.Predict:
        """Wrap ``model`` into what the samplers call under this process.

        cond_on: what ``cond_fn`` shifts, the ``mean`` (DDPM) or the ``score`` (DDIM).
        """

        def predict(x_t: Tensor, t: Tensor) -> Prediction:
            out = self.p_mean_variance(model, x_t, t, clip_denoised, denoised_fn, model_kwargs)
            if cond_fn is not None and cond_on == "score":
                out = self.condition_score(cond_fn, out, x_t, t, model_kwargs)
            elif cond_fn is not None:
                out["mean"] = self.condition_mean(cond_fn, out, x_t, t, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            return Prediction(out["pred_xstart"], eps, out["mean"], out["log_variance"])

        return predict

    def p_sample(self, model: Model, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Terms:
        """Take one DDPM step from x_t = x. Further arguments as :meth:`predictor`. Returns ``sample, pred_xstart``."""
        return samplers.ddpm_step(self.predictor(model, *args, **kwargs), x, t)._asdict()

    def ddim_sample(self, model: Model, x: Tensor, t: Tensor, *args: Any, eta: float = 0.0, **kwargs: Any) -> Terms:
        """Take one DDIM step from x_t = x. Further arguments as :meth:`predictor`. Returns ``sample, pred_xstart``."""
        predict = self.predictor(model, *args, **{**kwargs, "cond_on": "score"})
        return samplers.ddim_step(self, eta, predict, x, t)._asdict()

    def ddim_reverse_sample(self, model: Model, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Terms:
        """Take one step of the DDIM ODE to x_{t+1}. Arguments as :meth:`predictor`. Returns ``sample, pred_xstart``."""
        predict = self.predictor(model, *args, **{**kwargs, "cond_on": "score"})
        return samplers.ddim_reverse_step(self, predict, x, t)._asdict()

    def p_sample_loop(self, model: Model, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Tensor:
        """Sample with DDPM, from noise to data. Arguments as :meth:`p_sample_loop_progressive`. Returns the last
        sample.
        """
        return samplers.last(_as_steps(self.p_sample_loop_progressive(model, shape, *args, **kwargs)))

    def ddim_sample_loop(self, model: Model, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Tensor:
        """Sample with DDIM, from noise to data. Returns the last sample.

        Arguments as :meth:`ddim_sample_loop_progressive`.
        """
        return samplers.last(_as_steps(self.ddim_sample_loop_progressive(model, shape, *args, **kwargs)))

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: tuple[int, ...],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[Terms]:
        """Yield ``{"sample", "pred_xstart"}`` after each DDPM step, from t = T - 1 to 0.

        shape: (N, C, H, W). noise: the start x_T; None draws it on ``device`` (None: the model's). progress: show a
        bar on stderr.
        """
        predict = self.predictor(model, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        yield from self._run(samplers.ddpm_step, predict, model, shape, noise, device, progress)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: tuple[int, ...],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[Terms]:
        """Yield ``{"sample", "pred_xstart"}`` after each DDIM step; arguments as :meth:`p_sample_loop_progressive`."""
        predict = self.predictor(model, clip_denoised, denoised_fn, cond_fn, model_kwargs, cond_on="score")
        step = partial(samplers.ddim_step, self, eta)
        yield from self._run(step, predict, model, shape, noise, device, progress)

    def _run(
        self,
        step: samplers.StepFunction,
        predict: samplers.Predict,
        model: Model,
        shape: tuple[int, ...],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
    ) -> Iterator[Terms]:
        if noise is None:
            noise = torch.randn(*shape, device=device or device_of(model))
        timesteps: Any = range(self.num_timesteps - 1, -1, -1)
        if progress:
            from tqdm.auto import tqdm

            timesteps = tqdm(timesteps)
        for state in samplers.loop(step, predict, noise, timesteps):
            yield state._asdict()

    # -- bits per dimension --------------------------------------------------------------------------------------------

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, (N,)."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        zero = torch.zeros_like(mean)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)

    @torch.no_grad()
    def calc_bpd_loop(
        self, model: Model, x_start: Tensor, clip_denoised: bool = True, model_kwargs: dict[str, Any] | None = None
    ) -> Terms:
        """Compute the whole variational bound in bits per dimension (DDPM, Eq. 5).

        x_start: (N, C, H, W) in [-1, 1]. Returns ``total_bpd, prior_bpd`` (N,) and ``vb, xstart_mse, mse`` (N, T),
        whose columns run from t = T - 1 to 0.
        """
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for i in range(self.num_timesteps - 1, -1, -1):
            t = torch.full((len(x_start),), i, device=x_start.device)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            output = model(x_t, self.original_timesteps(t), **(model_kwargs or {})).float()
            terms = self._vb_terms_bpd(output, x_start, x_t, t, clip_denoised)
            eps = self._predict_eps_from_xstart(x_t, t, terms["pred_xstart"])
            columns["vb"].append(terms["output"])
            columns["xstart_mse"].append(mean_flat((terms["pred_xstart"] - x_start) ** 2))
            columns["mse"].append(mean_flat((eps - noise) ** 2))
        per_step = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        prior_bpd = self._prior_bpd(x_start)
        return {"total_bpd": per_step["vb"].sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **per_step}


def _as_steps(states: Iterator[Terms]) -> Iterator[samplers.Step]:
    return (samplers.Step(**state) for state in states)


def device_of(model: Any) -> torch.device:
    """Device of a module's (or a module's method's) first parameter; the CPU for plain functions."""
    module = getattr(model, "__self__", model)
    parameter = next(module.parameters(), None) if isinstance(module, torch.nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device
