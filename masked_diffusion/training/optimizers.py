"""Optimizers and weight averages that skip an update whose gradients are not finite, sharded or not."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from timm.optim import Adan
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from masked_diffusion.dist_util import Ranks
from masked_diffusion.training.sharding import shard_like, whole
from masked_diffusion.training.train_config import TrainConfig

# The class and its settings. A fused optimizer can be told on the device not to move.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "adan": (Adan, {"betas": (0.98, 0.92, 0.99), "eps": 1e-8}),
}
# Numbers that each keeps per parameter.
MOMENTS = {"adamw": 2, "adan": 4}
_ONLY_ADAN_KEEPS = "exp_avg_diff"
EMA_GROUP = 64


class GuardedOptimizer:
    """An optimizer that skips a step when a flag on the device says so.

    A single process ignores the config's ``shard``, and Adan its ``adam_beta2``.
    The state dict has the format of torch's optimizers, whatever the sharding.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: TrainConfig, ranks: Ranks) -> None:
        optimizer_class, settings = OPTIMIZERS[config.opt]
        settings = {**settings, "lr": config.lr, "weight_decay": config.weight_decay}
        settings |= {"betas": (0.9, config.adam_beta2)} if config.opt == "adamw" else {}
        self.lr = config.lr  # of the last update
        self._opt = config.opt
        self._ranks = ranks
        self.torch_optimizer: torch.optim.Optimizer
        if config.shard == "zero" and ranks.world_size > 1:
            self.torch_optimizer = ZeroRedundancyOptimizer(parameters, optimizer_class, **settings)
        else:
            self.torch_optimizer = optimizer_class(parameters, **settings)

    def step(self, lr: float, good: Tensor) -> None:
        """Update the parameters from their gradients. good: () bool; False leaves parameters and state unchanged.

        AdamW needs no wait of the host for ``good``; Adan does, because it counts its steps on the host.
        """
        self.lr = lr
        for group in self.torch_optimizer.param_groups:
            group["lr"] = lr
        if self._opt == "adamw":
            moving: Any = self._moving
            moving.grad_scale, moving.found_inf = None, (~good).float()
        elif not good.item():
            return
        self.torch_optimizer.step()

    def zero_grad(self) -> None:
        self.torch_optimizer.zero_grad(set_to_none=True)

    @property
    def _moving(self) -> torch.optim.Optimizer:
        """The optimizer of the parameters that this rank updates."""
        optimizer = self.torch_optimizer
        return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parameters, under ``zero`` on rank 0 only. Collective: every rank must call it."""
        if isinstance(self.torch_optimizer, ZeroRedundancyOptimizer):
            self.torch_optimizer.consolidate_state_dict(to=0)
            if not self._ranks.is_main:
                return {}
        return self.torch_optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> float:
        """Load the moments of a full state and keep this run's settings. Returns the learning rate saved in the state.

        Raises ValueError for the state of another optimizer, and what torch raises for that of another model.
        """
        for moments in state["state"].values():
            if (_ONLY_ADAN_KEEPS in moments) != (self._opt == "adan"):
                raise ValueError(f"it holds {', '.join(sorted(moments))}, which is not what --opt {self._opt} keeps")
        self.lr = former_lr = state["param_groups"][0]["lr"]
        for group, own in zip(state["param_groups"], self.torch_optimizer.param_groups, strict=True):
            group |= {name: value for name, value in own.items() if name != "params"}
        parameters = [parameter for group in self.torch_optimizer.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            moments = state["state"].get(index, {})
            moments |= {name: shard_like(value, parameter) for name, value in moments.items() if name != "step"}
        self.torch_optimizer.load_state_dict(state)
        for parameter, moments in self._moving.state.items():
            # A sharded optimizer loads it to the CPU, where fused kernels do not look.
            if "step" in moments:
                moments["step"] = moments["step"].to(parameter.device)
        return former_lr


class EMA:
    """Exponential moving average of a model's parameters, float32 like them.

    rate: its name, and its rate unless ``rate_of`` says the rate of update number 1, 2, ....
    """

    def __init__(self, model: nn.Module, rate: str, rate_of: Callable[[int], float] | None = None) -> None:
        self.rate = rate
        self._rate_of = rate_of or (lambda update: float(rate))
        self._parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        # In the order of the model's own state dict, buffers among them, so that the files are alike.
        self._state = {name: self._parameters.get(name, value) for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, good: Tensor, update: int = 1) -> None:
        """Average the parameters in. good: () bool on the model's device; False leaves the average unchanged.

        update: the number of the training's update, from 1.
        """
        weight = good * (1 - self._rate_of(update))
        parameters = [p.detach() for p in model.parameters()]
        for start in range(0, len(parameters), EMA_GROUP):  # in groups: each holds a copy of its size for a moment
            averaged = list(self._parameters.values())[start : start + EMA_GROUP]
            change = torch._foreach_sub(parameters[start : start + EMA_GROUP], averaged)
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(averaged, change)

    @contextlib.contextmanager
    def averaged_model(self, model: nn.Module) -> Iterator[Callable[..., Tensor]]:
        """Call ``model`` with the averaged weights, in eval mode and without gradients, inside this context.

        model: gives the structure; its own parameters are not used. Collective: every rank must enter. Shards are
        gathered while inside, which takes 4 bytes per parameter on each rank.
        """

        def averaged(*args: Any, **kwargs: Any) -> Tensor:
            return torch.func.functional_call(model, state, args, kwargs)

        state = {name: whole(value) for name, value in self._state.items()}
        model.eval()
        try:
            with torch.no_grad():
                yield averaged
        finally:
            model.train()

    def state_dict(self) -> dict[str, Tensor]:
        return self._state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self._parameters.items():
            value.copy_(shard_like(state[name], value))
