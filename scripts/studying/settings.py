"""What a study or a comparison of objectives is of: settings, checked without torch, which takes seconds to import."""

from dataclasses import dataclass
from typing import ClassVar

from masked_diffusion.choices import POLICIES, family_of
from masked_diffusion.sampling.sampler_config import SamplerConfig


@dataclass(frozen=True)
class Setting:
    """model: of the plain arm. budget: steps of the plain arm whose compute all arms have. seeds: runs of each arm."""

    model: str
    budget: float
    seeds: int


SETTINGS = {
    "tokens16": Setting("DiT_Mini_2", budget=1500, seeds=3),
    "tokens64": Setting("DiT_Micro_1", budget=700, seeds=2),
}
QUICK_BUDGET = 60.0
OTHER_SEEDS = 1000  # those of the control begin here
SAMPLES, QUICK_SAMPLES = 360, 60


@dataclass(frozen=True)
class Study:
    """What all runs of a study have in common, as its folder records it.

    budget: in steps of the plain arm. held_out_images: as many of the held-out data are measured at most. normalize:
    ``channel`` where pixels are standardised by the training images; latents are as they were encoded, ``none``.
    """

    model: str
    data_dir: str
    held_out_dir: str
    vae_path: str
    image_size: int
    budget: float
    batch_size: int
    held_out_images: int
    normalize: str
    adam_beta2: float = 0.99  # recorded, because studies of before had 0.999

    def __post_init__(self) -> None:
        if family_of(self.model) not in ("DiT", "SiT"):
            raise ValueError(f"--model {self.model}: all arms have one plain backbone; give a DiT_* or SiT_*")
        if not self.budget > 0:
            raise ValueError(f"--budget {self.budget}: must be positive, in steps of training without a policy")
        for name in ("batch_size", "held_out_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")

    def model_of(self, policy: str) -> str:
        """The model's name under a policy: MDTv2's needs the skips of its own family."""
        family = family_of(self.model)
        fitting = POLICIES[policy].families
        return self.model if family in fitting else self.model.replace(family, fitting[0], 1)


def held_out_of(data_dir: str) -> str:
    """The held-out part of built-in data. Raises ValueError for other data, which has to be named."""
    if not data_dir.startswith("builtin:"):
        raise ValueError(f"--data_dir {data_dir}: give the data to measure on with --held_out_dir")
    return f"{data_dir}-test"


@dataclass(frozen=True)
class Comparison:
    """What all trainings of a comparison of objectives have in common, as its folder records it.

    sampling_steps: a comma list. Raises ValueError for settings that no sample set can have.
    """

    steps: int
    sampling_steps: str
    num_samples: int
    cfg_scale: float
    held_out_images: int
    data_dir: str = "builtin:digits"
    held_out_dir: str = "builtin:digits-test"
    vae_path: str = "none"
    image_size: int = 8

    normalize: ClassVar[str] = "none"
    MOST_SAMPLING_STEPS: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        for number in self.lengths:
            SamplerConfig(num_sampling_steps=number, cfg_scale=self.cfg_scale)

    @property
    def lengths(self) -> list[int]:
        """Of the samplings, in steps. Raises ValueError for what is no list of numbers in range."""
        parts = self.sampling_steps.split(",")
        if not all(part.isdecimal() and 0 < int(part) <= self.MOST_SAMPLING_STEPS for part in parts):
            raise ValueError(
                f"--sampling_steps {self.sampling_steps}: expected a comma list of numbers from 1 to "
                f"{self.MOST_SAMPLING_STEPS}, such as 10,25,50"
            )
        return [int(part) for part in parts]
