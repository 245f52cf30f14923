"""What the benchmark can be asked for. Only a model that is built imports torch, so that flags are checked at once."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from masked_diffusion.choices import family_of
from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.runs.config import DiffusionConfig, ModelConfig, RunConfig
from masked_diffusion.sampling.sampler_config import SamplerConfig
from masked_diffusion.script_util import optional, str2bool
from masked_diffusion.settings import setting
from masked_diffusion.training.train_config import TrainConfig

if TYPE_CHECKING:
    import torch

    from masked_diffusion.randomness import DrawSpec

# Names of the cases: the functions are those of benchmarking/measuring.py.
CASES = (
    "train_step", "sample", "data", "sources", "encode", "assemble", "noise", "plain_step", "against_plain", "policies",
    "index_of",
)  # fmt: skip
IN_CHILDREN = ("memory", "scaling", "index")
# Forms of the index case: what --data_dir and --labels_file are below the folder that it writes.
INDEX_FORMS = {
    "folder": ("folder", ""),
    "zip": ("images.zip", ""),
    "tar": ("tar", ""),
    "parquet": ("parquet", ""),
    "folder_dataset_json": ("labelled", ""),
    "zip_dataset_json": ("labelled.zip", ""),
    "folder_csv": ("folder", "labels.csv"),
    "folder_json_lines": ("folder", "labels.jsonl"),
}
# Cases that run the plain path.
NEED_PLAIN = ("plain_step", "against_plain", "memory")

SD_DOWNSAMPLE, SD_CHANNELS = 8, 4
# A published sampling run: figures of a few steps are extrapolated to it.
FULL_SAMPLING_STEPS = 250


@dataclass(frozen=True)
class Settings:
    """What is measured, named as the flags. Raises ValueError for what cannot be, before anything is."""

    model: str = setting("MDT_S_2", "")
    image_size: int = setting(256, "")
    downsample: int = setting(SD_DOWNSAMPLE, "image side / latent side; 1 for pixel space")
    in_channels: int = setting(SD_CHANNELS, "channels of the latents")
    num_classes: int = setting(1000, "")
    mask_ratio: float | None = setting(
        0.30, "share of the tokens masked in the second view; None measures training without masking"
    )
    decode_layer: int | None = setting(None, "decoder blocks; None means 2")
    policy: str | None = setting(None, "which tokens leave in training; None is the model's own", type=str)
    objective: str = setting("ddpm", "what the network learns to predict")
    batch_size: int = setting(4, "images per step")
    repeats: int = setting(5, "measurements, of which median, minimum and maximum are printed")
    warmup: int = setting(2, "rounds before the first measurement")
    num_sampling_steps: int = setting(4, f"steps that are measured, and extrapolated to {FULL_SAMPLING_STEPS}")
    num_samples: int = setting(1000, "images of the assemble case")
    num_workers: int = setting(0, "loader processes of the data case; 0 loads in the measured process")
    with_vae: bool = setting(
        False, "encode and decode with a Stable Diffusion autoencoder of random weights; False takes latents as given"
    )
    use_fp16: bool = setting(False, "autocast to float16")
    use_bf16: bool = setting(False, "autocast to bfloat16")
    compile: bool = setting(False, "compile the blocks in training")
    grad_checkpointing: bool = setting(False, "run the blocks again in backward")
    tf32: bool | None = setting(
        None,
        "allow TF32 on CUDA; None does as the scripts do: not in training, but in sampling",
        type=optional(str2bool),
    )
    trace: str = setting(
        "", "write torch's profile of a training step to this file, which chrome://tracing and Perfetto show"
    )

    index_images: int = setting(100_000, "images of the index case; they are not written, and not read")
    index_form: str = setting("folder", "form that the index_of case opens")
    index_dir: str = setting("", "where the forms are; the index case gives it to its processes")

    def __post_init__(self) -> None:
        counts = (
            "downsample",
            "in_channels",
            "batch_size",
            "repeats",
            "num_sampling_steps",
            "num_samples",
            "index_images",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("warmup", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must not be negative")
        if self.with_vae and (self.downsample, self.in_channels) != (SD_DOWNSAMPLE, SD_CHANNELS):
            raise ValueError(
                f"--downsample {self.downsample} --in_channels {self.in_channels}: the autoencoder of --with_vae True "
                f"has {SD_DOWNSAMPLE} and {SD_CHANNELS}; leave them out, or use --with_vae False"
            )
        if self.index_form not in INDEX_FORMS:
            raise ValueError(f"--index_form {self.index_form}: unknown; choose one of {', '.join(INDEX_FORMS)}")
        family_of(self.model)  # before torch is imported, which takes seconds
        import torch

        with torch.device("meta"):  # checked without the memory and the time that a model takes
            self.model_config.build()
        self.train_config, self.sampler_config.build_objective(self.run_config)

    @property
    def model_config(self) -> ModelConfig:
        settings = {name: getattr(self, name) for name in self.__dataclass_fields__ if name in MODEL_FIELDS}
        return ModelConfig(**settings, learn_sigma=self.objective == "ddpm")

    @property
    def run_config(self) -> RunConfig:
        objective = ObjectiveConfig(objective=self.objective)
        return RunConfig(self.model_config, DiffusionConfig(), first_stage={}, objective=objective)

    @property
    def train_config(self) -> TrainConfig:
        shared = ("batch_size", "use_fp16", "use_bf16", "compile", "grad_checkpointing")
        return TrainConfig(**{name: getattr(self, name) for name in shared})

    @property
    def sampler_config(self) -> SamplerConfig:
        """A sampler that guides at every step."""
        sampler = self.run_config.objective.default_sampler
        return SamplerConfig(self.num_sampling_steps, sampler, cfg_cond=True, guidance="constant")

    @property
    def draw_spec(self) -> "DrawSpec":
        import torch

        from masked_diffusion.randomness import DrawSpec

        with torch.device("meta"):
            model = self.model_config.build()
        further = {"path_drop": model.policy.path_drop > 0, "second_level": model.policy.two_levels}
        return DrawSpec(self.model_config.latent_shape, model.num_tokens, self.with_vae, **further)

    @property
    def dtype(self) -> "torch.dtype":
        """What the network computes in; parameters and losses are float32."""
        import torch

        return torch.float16 if self.use_fp16 else torch.bfloat16 if self.use_bf16 else torch.float32


MODEL_FIELDS = ModelConfig.__dataclass_fields__


def check_plain(settings: Settings) -> None:
    """Raises ValueError for a model that was not published in this form, or a training without masking."""
    if family_of(settings.model) != "MDT" or settings.mask_ratio is None:
        raise ValueError(
            f"--model {settings.model} --mask_ratio {settings.mask_ratio}: the plain path is that of MDT with masking; "
            "give a model such as MDT_S_2 and a mask ratio, or other cases"
        )


def with_autoencoder(settings: Settings) -> Settings:
    """Raises ValueError for latents that are not the autoencoder's."""
    return dataclasses.replace(settings, with_vae=True)
