"""Settings of the training loop."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from masked_diffusion.choices import (
    CONSTANT,
    GUIDE_FROM,
    LONGEST_STD,
    OPTIMIZERS,
    SHARDINGS,
    WEIGHTS_FORMATS,
    check_std,
    ratio_schedule,
)
from masked_diffusion.settings import setting

if TYPE_CHECKING:
    import torch

TERA = 10**12


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop, named as the flags. batch_size: per process. microbatch: at most so many images
    in one pass; -1 for the whole batch. max_steps, lr_anneal_steps: 0 for no end, no annealing. grad_clip: largest norm
    of the whole model's gradient, 0 for any. max_compute: TFLOPs, a multiply-add counting as one; 0 for no end.
    lr_warmup: steps. lr_decay: last share of the run in which lr falls linearly to 0. ema_rate: rates of averages,
    ``none`` for none. ema_power: lengths of averages, empty for none. finale: last share of the run in which no token
    leaves; finale_lr: factor of the learning rate there. ratio_schedule: see
    :func:`masked_diffusion.models.policies.ratio_schedule`."""

    opt: str = setting("adamw", "optimizer: " + " or ".join(OPTIMIZERS) + "; MDTv2 has adan by default", "training")
    lr: float = setting(3e-4, "learning rate; DiT has 1e-4 by default", "training")
    weight_decay: float = setting(0.0, "weight decay of the optimizer, decoupled", "training")
    adam_beta2: float = setting(
        0.999, "decay of AdamW's mean of squared gradients, such as 0.99 for a short run", "training"
    )
    grad_clip: float = setting(
        0.0, "largest norm of the whole model's gradient; 0 = any; MDTv2 has 1 by default", "training"
    )
    shard: str = setting(
        "none",
        "what several processes share out: none; zero, the optimizer's state; fsdp, weights, gradients and EMA, "
        "too; MDTv2 has zero by default",
        "machine",
    )
    lr_anneal_steps: int = setting(0, "end the run here, with lr falling linearly to 0; 0 = constant lr", "training")
    max_steps: int = setting(0, "end the run here; 0 = never", "training")
    max_compute: float = setting(
        0.0,
        "end the run when its training has taken so many TFLOPs, a multiply-add counting as one, in place of "
        "--max_steps; 0 = never",
        "training",
    )
    lr_warmup: int = setting(0, "steps in which lr rises linearly from 0 at the start", "training")
    lr_decay: float = setting(
        0.0,
        "last share of the run in which lr falls linearly to 0, such as 0.2; needs --max_steps or --max_compute",
        "training",
    )
    finale: float = setting(
        0.0,
        "last share of the run in which no token leaves, such as 0.1; needs --max_steps, --max_compute or "
        "--lr_anneal_steps",
        "training",
    )
    finale_lr: float = setting(1.0, "factor of the learning rate in the --finale, such as 0.5", "training")
    ratio_schedule: str = setting(
        CONSTANT,
        "how the mask ratio follows the progress of the run: const, cosine:K (falls as cos(pi x / 2)^K) or linear "
        "(rises from 0); all but const need an end of the run, as --finale does",
        "training",
    )
    batch_size: int = setting(1, "images per process and step", "training")
    microbatch: int = setting(-1, "images per pass, to save memory; -1 = the whole batch", "training")
    ema_rate: str = setting("0.9999", "rate, or comma list of rates; none with --ema_power", "training")
    ema_warmup: bool = setting(
        False,
        "let the rate of --ema_rate begin at 0.1 and rise as s/(9 + s) with the update s, for short runs",
        "training",
    )
    ema_power: str = setting(
        "",
        "lengths of power-function averages, as a share of the training, such as 0.05,0.10; their snapshots give any "
        "other length (scripts/posthoc_ema.py)",
        "training",
    )
    ema_snapshot_interval: int = setting(5000, "steps between snapshots of the averages of --ema_power", "saving")
    log_interval: int = setting(10, "steps between rows of the log", "saving")
    save_interval: int = setting(10000, "steps between checkpoints; a last one is always written", "saving")
    use_fp16: bool = setting(False, "compute in float16 with a gradient scaler; weights stay float32", "machine")
    fp16_scale_growth: float = setting(1e-3, "log2 of the loss scale's growth per step under --use_fp16", "machine")
    use_bf16: bool = setting(False, "compute in bfloat16; weights stay float32", "machine")
    compile: bool = setting(
        False, "compile the blocks: some minutes at the start, then faster steps; results differ by rounding", "machine"
    )
    grad_checkpointing: bool = setting(
        False, "run each block again in backward: less memory, a third more time, the same results", "machine"
    )
    seed: int = setting(0, "determines order, crops, noise and the fresh weights", "training")
    max_bad_steps: int = setting(
        10, "stop after so many steps in a row without finite gradients; 0 = never", "training"
    )
    max_bad_share: float = setting(
        0.01, "stop when more than this share of the images cannot be read (one always may, unless it is 0)", "data"
    )
    keep_checkpoints: int = setting(
        0, "keep only so many of the newest checkpoints (two at least); 0 keeps all", "saving"
    )
    keep_every: int = setting(
        0, "with --keep_checkpoints, also keep those of steps divisible by this; 0 for none", "saving"
    )
    weights_format: str = setting("pt", "of model and EMA files: pt or safetensors", "saving")
    preview_samples: int = setting(16, "images in the grid drawn at every save; 0 = none", "saving")
    preview_steps: int = setting(25, "sampling steps of that grid", "saving")
    preview_guide_from: str = setting(
        "null_label",
        "what that grid is guided away from, such as masked; see --guide_from of image_sample.py",
        "saving",
    )
    preview_cfg_scale: float | None = setting(
        None, "largest weight of that grid's guidance; None is that of the model's family", "saving"
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_interval", "save_interval", "preview_steps", "ema_snapshot_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in (
            "weight_decay",
            "grad_clip",
            "lr_anneal_steps",
            "max_steps",
            "max_compute",
            "lr_warmup",
            "preview_samples",
            "keep_checkpoints",
            "keep_every",
            "max_bad_steps",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must not be negative")
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(f"--adam_beta2 {self.adam_beta2}: must be in [0, 1), such as 0.99")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"--max_bad_share {self.max_bad_share}: must be in [0, 1], a share of the images")
        for name, choices in (("opt", OPTIMIZERS), ("shard", SHARDINGS), ("preview_guide_from", GUIDE_FROM)):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)}: unknown; choose one of {', '.join(choices)}")
        self._check_end()
        if self.preview_cfg_scale is not None and self.preview_cfg_scale < 0:
            raise ValueError(f"--preview_cfg_scale {self.preview_cfg_scale}: must be 0 or more, such as 1.5")
        if not self.lr > 0:
            raise ValueError(f"--lr {self.lr}: must be positive")
        if self.keep_every and not self.keep_checkpoints:
            raise ValueError(f"--keep_every {self.keep_every}: needs --keep_checkpoints; without it all are kept")
        if self.microbatch == 0 or self.microbatch < -1:
            raise ValueError(f"--microbatch {self.microbatch}: must be at least 1, or -1 for the whole batch")
        if self.use_fp16 and self.use_bf16:
            raise ValueError("--use_fp16 and --use_bf16: choose one")
        if self.weights_format not in WEIGHTS_FORMATS:
            known = ", ".join(WEIGHTS_FORMATS)
            raise ValueError(f"--weights_format {self.weights_format}: unknown; choose one of {known}")
        for rate in self.ema_rates:
            try:
                valid = 0 <= float(rate) < 1
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"--ema_rate {self.ema_rate}: expected numbers in [0, 1), separated by commas")
        if not self.ema_rates and not self.ema_powers:
            raise ValueError(f"--ema_rate {self.ema_rate}: without --ema_power there would be no average")
        for std in self.ema_powers:
            try:
                check_std(float(std))
            except ValueError:
                raise ValueError(
                    f"--ema_power {self.ema_power}: expected numbers in (0, {LONGEST_STD}], separated by commas"
                ) from None

    def _check_end(self) -> None:
        """Raise ValueError for ends that exclude each other, and shares of a run that has none."""
        if not 0 <= self.finale <= 1:
            raise ValueError(f"--finale {self.finale}: must be in [0, 1], a share of the run")
        if self.finale and not self.has_end:
            raise ValueError(
                f"--finale {self.finale}: the run has no end; give --max_steps, --max_compute or --lr_anneal_steps"
            )
        if not self.finale_lr > 0:
            raise ValueError(f"--finale_lr {self.finale_lr}: must be positive, a factor of the learning rate")
        ratio_schedule(self.ratio_schedule)  # refuses what is none
        if self.ratio_schedule != CONSTANT and not self.has_end:
            raise ValueError(
                f"--ratio_schedule {self.ratio_schedule}: the run has no end; give --max_steps, --max_compute or "
                "--lr_anneal_steps"
            )
        if self.max_compute and self.last_step is not None:
            raise ValueError(
                f"--max_compute {self.max_compute}: the end is given in steps, too; leave out --max_steps and "
                "--lr_anneal_steps"
            )
        if not 0 <= self.lr_decay <= 1:
            raise ValueError(f"--lr_decay {self.lr_decay}: must be in [0, 1], a share of the run")
        if self.lr_decay and (self.lr_anneal_steps or not self.has_end):
            raise ValueError(
                f"--lr_decay {self.lr_decay}: give the end with --max_steps or --max_compute, and no --lr_anneal_steps"
            )

    @property
    def ema_rates(self) -> list[str]:
        """The rates as they were written, which is how files are named after them."""
        if self.ema_rate.strip().lower() == "none":
            return []
        return list(dict.fromkeys(rate.strip() for rate in self.ema_rate.split(",")))

    @property
    def ema_powers(self) -> list[str]:
        """The lengths as they were written."""
        return list(dict.fromkeys(std.strip() for std in self.ema_power.split(",") if std.strip()))

    @property
    def half(self) -> "torch.dtype | None":
        """What autocast computes in, None for full precision."""
        import torch

        return torch.float16 if self.use_fp16 else torch.bfloat16 if self.use_bf16 else None

    @property
    def last_step(self) -> int | None:
        """Where the run ends, None for never, or where compute decides."""
        ends = [end for end in (self.lr_anneal_steps, self.max_steps) if end]
        return min(ends) if ends else None

    @property
    def max_multiply_adds(self) -> int:
        """``max_compute`` as a whole number."""
        return round(self.max_compute * TERA)

    @property
    def has_end(self) -> bool:
        return bool(self.max_compute) or self.last_step is not None

    def on_ranks(self, world_size: int, former: dict[str, Any] | None) -> "TrainConfig":
        """These settings with the global batch of the run that is resumed, when only the number of processes changed.

        former: the checkpoint's ``batch_size`` (the flag) and ``global_batch``, None where there are none. A pass
        never holds more images than it did. Raises ValueError when the processes cannot share the batch equally.
        """
        if former is None or former.get("batch_size") != self.batch_size:
            return self
        global_batch = former["global_batch"]
        if global_batch % world_size:
            raise ValueError(
                f"the run to resume has a global batch of {global_batch}, which {world_size} processes cannot share "
                "equally: start another number of them, or choose a new batch with --batch_size"
            )
        batch_size = global_batch // world_size
        microbatch = self.batch_size if self.microbatch < 0 and batch_size > self.batch_size else self.microbatch
        return dataclasses.replace(self, batch_size=batch_size, microbatch=microbatch)

    @property
    def lr_changes(self) -> bool:
        """Whether the learning rate is another one in the course of the run."""
        in_finale = self.finale and self.finale_lr != 1
        return bool(self.lr_anneal_steps or self.lr_warmup or self.lr_decay or in_finale)

    def lr_at(self, step: int, done: float) -> float:
        """Learning rate of the update after ``step`` completed ones, when this share of the run is done."""
        lr = self.lr
        if self.lr_anneal_steps:
            lr *= 1 - step / self.lr_anneal_steps
        if self.lr_warmup:
            lr *= min(1.0, (step + 1) / self.lr_warmup)
        if self.lr_decay:
            lr *= min(1.0, (1 - done) / self.lr_decay)
        return lr


def training_record(config: TrainConfig, **further: Any) -> dict[str, Any]:
    """What ``config.json`` says of the training beside model, process and data."""
    return {**dataclasses.asdict(config), **further}
