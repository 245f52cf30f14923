"""Write the settings that make a checkpoint usable to ``config.json`` beside it, and read them back."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masked_diffusion.choices import FIRST_STREAM, PIXEL_SPACE, POLICIES, STREAM, check_objective, family_policy
from masked_diffusion.data.class_names import same_names
from masked_diffusion.data.image_files import EXTENSIONS_OF_0_1_0
from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.diffusion.process import DiffusionConfig
from masked_diffusion.settings import flag, setting

if TYPE_CHECKING:
    from masked_diffusion.diffusion.objectives import Objective
    from masked_diffusion.gaussian_diffusion import GaussianDiffusion
    from masked_diffusion.models.backbone import LatentTransformer

CONFIG_NAME = "config.json"
# Settings that the weights or the meaning of their output depend on.
FIXED_MODEL_SETTINGS = (
    "model",
    "image_size",
    "downsample",
    "in_channels",
    "num_classes",
    "decode_layer",
    "learn_sigma",
)
# What of the first stage says how its codes become latents.
LATENT_SCALES = ("scaling_factor", "shift_factor", "channel_mean", "channel_std")
FIXED_PROCESS_SETTINGS = ("diffusion_steps", "noise_schedule", "predict_xstart", "learn_sigma")


@dataclass(frozen=True)
class ModelConfig:
    """What a network is built from. Raises ValueError, naming the flag, for sizes that do not fit together.

    policy: how the model is trained, see :mod:`masked_diffusion.models.policies`; None is the family's own.
    route: between which blocks tokens are away, such as ``2,9``, under policies that take one.
    choose, path_drop, decoder: see :meth:`masked_diffusion.models.policies.Policy.with_options`.
    """

    model: str = field(
        metadata=flag(
            "MDT_S_2", "name of the model, such as MDT_S_2, MDT_XL_2; a training finds the patch of MDT_S", "model"
        )
    )
    image_size: int = field(metadata=flag(256, "side of the square images in pixels", "data"))
    downsample: int
    in_channels: int
    num_classes: int = field(metadata=flag(None, "number of classes, if more than the data has", "model", int | None))
    mask_ratio: float | None = setting(
        None, "share of the tokens to mask, such as 0.30; None trains without masking", "model"
    )
    decode_layer: int | None = setting(None, "decoder blocks; None means 2, for MDTv2 4", "model")
    learn_sigma: bool = True
    class_dropout_prob: float = 0.1
    policy: str | None = setting(
        None,
        f"which tokens leave in training, and how they come back: {', '.join(POLICIES)}; None is the model's own: mdt, "
        "mdtv2, or none for DiT and SiT",
        "model",
        str,  # "none" is a policy
    )
    route: str | None = setting(
        None,
        "LEAVE,BACK: before which blocks, counted from 0, tokens leave and come back; None is the policy's own",
        "model",
    )
    choose: str | None = setting(
        None,
        "how tokens are chosen: uniform, or cells (as many of each cell of neighbours); None is the policy's own",
        "model",
    )
    path_drop: float | None = setting(
        None,
        "probability that a sample's way through the route counts for nothing; None is the policy's own",
        "model",
    )
    decoder: str | None = setting(
        None,
        "of --policy maskdit: WIDTHxBLOCKS of a decoder beside the model, such as 512x8, or blocks, the last "
        "--decode_layer blocks of the model; None is 512x8, smaller for models smaller than S",
        "model",
    )

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.image_size % self.downsample:
            raise ValueError(
                f"--image_size {self.image_size}: must be a multiple of {self.downsample}, the first stage's"
            )
        if self.num_classes < 1:
            raise ValueError(f"--num_classes {self.num_classes}: must be at least 1")

    def build(self) -> "LatentTransformer":
        """A fresh model. Raises ValueError for an unknown name or a mask, decoder or patch that does not fit."""
        from masked_diffusion.models import create_model

        settings = dataclasses.asdict(self)
        name, input_size = settings.pop("model"), settings.pop("image_size") // settings.pop("downsample")
        try:
            return create_model(name, input_size=input_size, **settings)
        except ValueError as error:
            raise ValueError(_as_flags(str(error), self)) from None

    @property
    def policy_name(self) -> str:
        """The policy that the model is trained under."""
        return self.policy or family_policy(self.model)

    def record(self) -> dict[str, Any]:
        """All settings, for a manifest; of a policy those alone that family and policy do not have by themselves.

        So what 0.1.0, which had no policies, recorded of a model is what is recorded of it now.
        """
        from masked_diffusion.models.policies import POLICIES

        policy = POLICIES[self.policy_name]
        usual: dict[str, Any] = {"policy": family_policy(self.model), "route": None, "decoder": None}
        usual |= {"choose": policy.choose, "path_drop": policy.path_drop}
        settings = dataclasses.asdict(self)
        return {
            name: value for name, value in settings.items() if name not in usual or value not in (None, usual[name])
        }

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.image_size // self.downsample
        return (self.in_channels, side, side)


def _as_flags(message: str, config: ModelConfig) -> str:
    """Turn a model's message about an argument into one about the flag that a user knows."""
    if message.startswith("input_size"):
        return f"--image_size {config.image_size} --model {config.model}: {message}"
    return f"--{message}" if message.startswith(("decode_layer", "mask_ratio")) else message


@dataclass(frozen=True)
class RunConfig:
    """The content of ``config.json``.

    class_names: names of the classes, in the order of their labels; empty without classes or when unknown.
    first_stage: see :class:`masked_diffusion.first_stage.FirstStage`. training: the training's further settings.
    stream: of the random numbers of the run's previews and evaluations, see ``randomness.STREAMS``.
    objective: what the network predicts; a file without it is of ``ddpm``.
    """

    model: ModelConfig
    diffusion: DiffusionConfig
    first_stage: dict[str, Any]
    class_names: list[str] = dataclasses.field(default_factory=list)
    class_cond: bool = True
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    stream: int = STREAM
    objective: ObjectiveConfig = ObjectiveConfig()

    def __post_init__(self) -> None:
        check_objective(self.model.model, self.objective.objective)

    def build_objective(self, num_steps: int | None = None) -> "Objective":
        """The objective; num_steps: of a sampling, None for the training.

        Raises ValueError for a process that cannot be built or has fewer steps.
        """
        from masked_diffusion.diffusion.objectives import OBJECTIVES

        process = self.diffusion
        if num_steps is not None:
            process = dataclasses.replace(process, timestep_respacing=str(num_steps))

        def build(**changes: Any) -> "GaussianDiffusion":
            return dataclasses.replace(process, **changes).build()

        return OBJECTIVES[self.objective.objective](self.objective, build, num_steps)

    @property
    def most_steps(self) -> int | None:
        """Most steps of a sampling; None for any number."""
        return self.diffusion.diffusion_steps if self.objective.is_discrete else None

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "versions": library_versions()}

    @classmethod
    def from_json(cls, value: Any, source: Path) -> "RunConfig":
        """Raises ValueError, naming ``source``, when the value is no such configuration."""
        try:
            # Written before there was a choice.
            value = {"stream": FIRST_STREAM, "objective": {}, **value}
            fields = {field.name: value[field.name] for field in dataclasses.fields(cls)}
            fields["model"] = ModelConfig(**fields["model"])
            fields["diffusion"] = DiffusionConfig(**fields["diffusion"])
            fields["objective"] = ObjectiveConfig(**fields["objective"])
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{source}: not a configuration of this code ({error})") from None
        return cls(**fields)


def read_config(folder: Path) -> RunConfig | None:
    """The configuration beside the checkpoints in ``folder``, None where there is none.

    Raises ValueError for a file that is damaged or of another kind.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())  # of bytes: with the mark that some editors put before the text
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    return RunConfig.from_json(value, path)


def extensions_of(config: RunConfig) -> Sequence[str] | None:
    """Those of the kinds of image files that a run's training reads; None for all that this version reads."""
    if "extensions" in config.training:
        return config.training["extensions"]
    # Versions that recorded the hash of the data and no kinds read those of now.
    return None if "data_sha256" in config.training else EXTENSIONS_OF_0_1_0


def settings_of_both(
    former: RunConfig, now: RunConfig, part: str, names: Iterable[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Settings in a part of two configurations, such as ``diffusion``: the flag of each and its two values."""
    return ((f"--{name}", *(getattr(getattr(config, part), name) for config in (former, now))) for name in names)


def contradiction(former: RunConfig, now: RunConfig) -> str | None:
    """Name the first setting that makes two runs' weights or their meaning differ; None when there is none."""
    pairs = [
        *settings_of_both(former, now, "objective", ("objective", "sigma_data", "learned_uncertainty")),
        *settings_of_both(former, now, "model", FIXED_MODEL_SETTINGS),
        *settings_of_both(former, now, "diffusion", FIXED_PROCESS_SETTINGS),
        ("--policy", former.model.policy_name, now.model.policy_name),
        *settings_of_both(former, now, "model", ("route", "decoder")),
        *_latents_of_both(former, now),
        ("--class_cond", former.class_cond, now.class_cond),
    ]
    data = [[config.training.get(name) for name in ("data_dir", "num_images")] for config in (former, now)]
    if not same_names(former.class_names, now.class_names, same_images=data[0] == data[1]):
        pairs.append(("the list of class names", former.class_names, now.class_names))
    return _first_difference(pairs)


def difference_of_latents(former: RunConfig, now: RunConfig) -> str | None:
    """Name the first setting by which two runs' latents have another scale; None when there is none."""
    return _first_difference(_latents_of_both(former, now))


def _latents_of_both(former: RunConfig, now: RunConfig) -> list[tuple[str, Any, Any]]:
    old, new = former.first_stage, now.first_stage
    pairs: list[tuple[str, Any, Any]] = []
    if old.get("vae_path") == new.get("vae_path") == PIXEL_SPACE:  # a flag of the training; latents are told by number
        names = ["none" if stage.get("channel_mean") is None else "channel" for stage in (old, new)]
        pairs = [("--normalize", names[0], names[1])]
    return [*pairs, *((name, old.get(name), new.get(name)) for name in LATENT_SCALES)]


def _first_difference(pairs: Iterable[tuple[str, Any, Any]]) -> str | None:
    return next((f"{name} {_short(old)}, this one {_short(new)}" for name, old, new in pairs if old != new), None)


def check_resume(former: RunConfig, now: RunConfig, source: Path) -> None:
    """Raise ValueError, naming ``source`` and the setting, where a resumed run would silently become another one."""
    if difference := contradiction(former, now):
        raise ValueError(
            f"{source}: the run to resume has {difference}; resume with the same setting, or start a new run from its "
            "weights with --init_from"
        )


def changed_settings(former: RunConfig, now: RunConfig) -> list[str]:
    """Describe the training settings that a resumed run changes, for the log."""
    olds, news = (
        {
            **c.training,
            **dataclasses.asdict(c.objective),
            **{name: getattr(c.model, name) for name in ("mask_ratio", "choose", "path_drop")},
            "min_snr_gamma": c.diffusion.min_snr_gamma,
        }
        for c in (former, now)
    )
    if olds["choose"] is None:  # it was the policy's own
        del olds["choose"]
    return [
        f"{name} was {_short(olds[name])}, is {_short(new)}"
        for name, new in news.items()
        if name in olds and olds[name] != new
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:80] + "..."


def library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that results depend on."""
    versions = {}
    for name in ("masked-diffusion", "torch", "numpy", "timm", "diffusers", "pillow"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
