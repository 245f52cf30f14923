"""Train a model: build a run from checked flags, and start it."""

import argparse
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from masked_diffusion import dist_util, dry_run
from masked_diffusion.choices import CONSTANT, POLICIES
from masked_diffusion.data.bad_images import LIST_NAME, BadImages
from masked_diffusion.data.data_config import DataConfig
from masked_diffusion.data.data_statistics import deviation_of_latents, pixel_statistics
from masked_diffusion.data.data_stream import ReadAhead
from masked_diffusion.data.dataset import ImageDataset
from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.diffusion.process import DiffusionConfig
from masked_diffusion.dist_util import Ranks
from masked_diffusion.first_stage import CachedPosterior, ChannelStatistics, FirstStage, PixelSpace, load_first_stage
from masked_diffusion.image_datasets import load_data, open_dataset
from masked_diffusion.logger import HumanSink, Logger, chosen_sinks, named_folder, output_folder
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.processes import launchers
from masked_diffusion.processes.preemption import StopSignals
from masked_diffusion.randomness import DrawSpec, global_generator, recorded_stream
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.config import (
    CONFIG_NAME,
    ModelConfig,
    RunConfig,
    changed_settings,
    check_resume,
    difference_of_latents,
    extensions_of,
    read_config,
)
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.run_folder import check_folder, claim_folder, held, is_restart, note_job, own_folder
from masked_diffusion.runs.weights import fit_channels, fit_labels, fit_policy, fit_positions, freeze, recognise
from masked_diffusion.sampling.few_steps import few_steps_warning
from masked_diffusion.sampling.guides import open_away
from masked_diffusion.script_util import (
    args_to_dict,
    choose_num_workers,
    place_from_args,
)
from masked_diffusion.train_util import TrainLoop
from masked_diffusion.training.budget import Budget
from masked_diffusion.training.eval_config import EvalConfig
from masked_diffusion.training.guide_config import GuideConfig
from masked_diffusion.training.preview import Preview, preview_sampler
from masked_diffusion.training.train_config import TrainConfig, training_record
from masked_diffusion.training.training_eval import Evaluation

SHIFT_ONE = 4096  # numbers of a latent, 4 x 32 x 32, at which --time_shift auto is 1


@dataclass(frozen=True)
class Beginning:
    """Where a run is kept, and what it begins with; named as the flags."""

    out: str
    resume_checkpoint: str
    init_from: str | None
    overwrite: bool
    dry_run: bool

    def again(self) -> "Beginning":
        """What a job that is started again asks for: what the first start asked for must not undo its work."""
        return dataclasses.replace(self, overwrite=False, resume_checkpoint=self.resume_checkpoint or "auto")


class Asked(NamedTuple):
    """What the script made of its flags. model, objective: fields of ModelConfig and ObjectiveConfig that flags decide,
    before the data complete them. weights: how --init_from is read. idle: warnings of flags without effect. explicit:
    names of those that were given. command: what was given, alike for all attempts of a job. flags: what all ranks have
    to agree on."""

    config: TrainConfig
    eval_config: EvalConfig
    guides: GuideConfig
    data: DataConfig
    model: dict[str, Any]
    process: DiffusionConfig
    objective: dict[str, Any]
    beginning: Beginning
    weights: Request
    idle: list[str]
    explicit: set[str]
    command: str
    flags: str


def prepare(args: argparse.Namespace, asked: Asked, evaluator: Path, stack: contextlib.ExitStack) -> Callable[[], int]:
    """Check everything that input can get wrong, and build the run. Returns what starts it, or with --dry_run what
    tries it out. Raises ValueError or OSError."""
    # Machine
    config = asked.config
    place = place_from_args(args)
    device = dist_util.choose_device(args.device, place.local_rank)
    if device.type == "mps":
        raise ValueError("--device mps: a training counts in float64, which MPS does not have; use --device cpu")
    dist_util.allow_tf32(args.tf32)
    sinks = chosen_sinks()
    # Data and first stage
    former = former_config(asked.beginning, asked.command)
    dataset, first_stage = open_data(asked, args.image_size, args.vae_path, args.normalize, device, former)
    ranks = stack.enter_context(dist_util.joined_ranks(place, device, args.dist_url))
    ranks.from_main_patiently(dataset.check_source, f"comparing the images of {args.data_dir} with those encoded")
    data_hash = check_alike(asked.flags, args.data_dir, dataset, ranks)
    # Model and process
    further = args_to_dict(args, ("schedule_sampler", "freeze"))
    run_config, model = build_model(config, make_run_config(asked, dataset, first_stage, device, data_hash, further))
    objective = run_config.build_objective()
    schedule_sampler = objective.levels(args.schedule_sampler)
    # Where to start
    output = Output(asked.beginning, asked.command, ranks, stack)
    start = output.plan_start()
    config, run_config = with_former_finale(asked.explicit, start, config, run_config)
    messages = [*start.messages, *take_up(start, asked.weights, run_config, model, dataset)]
    state = ranks.from_main(lambda: checkpoint.read_state(start))
    run_config = with_recorded_stream(state, start, run_config)
    config = config.on_ranks(ranks.world_size, state)
    messages += changed_batch(asked.config, config, ranks)
    # Published checkpoints: full batches.
    position = state["position"] if state else start.step * config.batch_size * ranks.world_size
    bad_images = check_first_images(config, dataset, ranks, output.folder, position)
    signals = StopSignals()
    draws = draws_of(run_config, model, first_stage)
    data = open_stream(args.data_dir, args.num_workers, config, dataset, draws, ranks, position, signals)
    stack.callback(data.close)
    preview = open_preview(config, asked.guides, run_config, model, first_stage, device)
    evaluation = open_evaluation(asked, evaluator, run_config, model, first_stage, output)
    messages += costs_of(preview, evaluation, model)
    Budget(config, model, config.batch_size * ranks.world_size)  # what it refuses leaves the folder as it is
    # The folder and its lock
    messages += output.claim(run_config)
    # The log of another folder's run does not go on here.
    rows_kept = start.step if start.folder == output.folder else 0
    if not args.dry_run:  # which writes nothing
        messages += bad_images.take_up(resumed=rows_kept > 0)
    logger = open_logger(output.folder, rows_kept, sinks, args.dry_run) if ranks.is_main else Logger()
    stack.callback(logger.close)
    # The loop
    loop = TrainLoop(
        config=config, run_config=run_config, model=model, objective=objective, schedule_sampler=schedule_sampler,
        first_stage=first_stage, data=ReadAhead(data), bad_images=bad_images, ranks=ranks, logger=logger,
        folder=output.folder, start=start, position=position, evaluation=evaluation, signals=signals, preview=preview,
    )  # fmt: skip
    messages = [*warnings_of_run(asked, config, run_config, ranks), *messages]
    for message in [*describe(asked, run_config, dataset, model, ranks, output.folder), *messages]:
        logger.text(message)
    return partial(dry_run.report, loop, len(dataset)) if args.dry_run else loop.run


def warnings_of_run(asked: Asked, config: TrainConfig, run_config: RunConfig, ranks: Ranks) -> list[str]:
    """Flags without effect, also in this run and with its processes, and samplings of too few steps."""
    idle = [*asked.idle]
    if "finale_lr" in asked.explicit and not config.finale:
        idle.append("--finale_lr is ignored without --finale")
    if ranks.world_size == 1 and asked.explicit & {"shard", "use_zero"} and config.shard != "none":
        idle.append(f"--shard {config.shard} is ignored in a single process")
    if run_config.model.mask_ratio is None and POLICIES[run_config.model.policy_name].drops:
        idle.append(
            f"{run_config.model.model} trains on all tokens, because --mask_ratio is not given; give --mask_ratio 0.30 "
            "as the paper does, or --policy none"
        )
    few = []
    if config.preview_samples:
        sampler = preview_sampler(config, asked.guides, run_config)
        few.append(few_steps_warning(run_config, sampler, f"--preview_steps {config.preview_steps}"))
    if (scored := asked.eval_config).eval_interval:
        flags = f"--eval_sampler {scored.eval_sampler} --eval_sampling_steps {scored.eval_sampling_steps}"
        few.append(few_steps_warning(run_config, scored.sampler(run_config, asked.guides), flags))
    return [f"warning: {text}" for text in [*idle, *filter(None, few)]]


def open_preview(
    config: TrainConfig,
    guides: GuideConfig,
    run_config: RunConfig,
    model: LatentTransformer,
    first_stage: FirstStage,
    device: torch.device,
) -> Preview | None:
    """What draws the previews; None without. Raises ValueError or OSError."""
    if not config.preview_samples:
        return None
    sampler = preview_sampler(config, guides, run_config)
    away, _ = open_away(sampler, model, run_config, "this model", Request(), device, flag="--preview_guide_from")
    return Preview(config.preview_samples, sampler, run_config, first_stage, device, away)


def open_evaluation(
    asked: Asked,
    evaluator: Path,
    run_config: RunConfig,
    model: LatentTransformer,
    first_stage: FirstStage,
    output: "Output",
) -> Evaluation | None:
    """The evaluation that ``--eval_interval`` asks for, tried out; None without. Raises ValueError or OSError."""
    config = asked.eval_config
    if not config.eval_interval:
        return None
    sampler, ranks = config.sampler(run_config, asked.guides), output.ranks
    guide = open_away(sampler, model, run_config, "this model", Request(), ranks.device, flag="--eval_guide_from")
    evaluation = Evaluation(config, evaluator, run_config, first_stage, ranks, output.folder, sampler, *guide)
    evaluation.try_out(leave_no_trace=asked.beginning.dry_run)
    return evaluation


def costs_of(preview: Preview | None, evaluation: Evaluation | None, model: LatentTransformer) -> list[str]:
    """What an image of the previews and of the evaluations costs. Raises ValueError for guidance outside of the
    process."""
    parts = {"previews": preview, "evaluations": evaluation}
    passes = {name: part.sampler_of(model).passes() for name, part in parts.items() if part is not None}
    return [f"cost of {name}: {cost:g} passes of the model per image" for name, cost in passes.items()]


def former_config(asked: Beginning, command: str) -> RunConfig | None:
    """The configuration of the run to go on with; None for a new run."""
    folder = output_folder(out=asked.out)
    if is_restart(folder, launchers.job_of(os.environ, command), leave_no_trace=True):
        asked = asked.again()
    run = checkpoint.run_to_resume(folder, asked.resume_checkpoint, asked.overwrite)
    return read_config(run) if run is not None else None


def open_data(
    asked: Asked, image_size: int, vae_path: str, normalize: str, device: torch.device, former: RunConfig | None
) -> tuple[ImageDataset, FirstStage]:
    """The data and what encodes them. former: see :func:`former_config`; its run reads the kinds of image files that it
    began with. Raises ValueError or OSError."""
    data, init_from = asked.data, asked.beginning.init_from
    extensions = None if former is None else extensions_of(former)
    dataset = open_dataset(**dataclasses.asdict(data), image_size=image_size, extensions=extensions)
    first_stage: FirstStage = load_first_stage(vae_path, device, dataset.channels)
    if data.grey and not isinstance(first_stage, PixelSpace):
        raise ValueError(f"--grey True: the autoencoder of --vae_path {vae_path} reads colour; give --vae_path none")
    if dataset.encoded_by is not None:
        first_stage = CachedPosterior(first_stage, *dataset.encoded_by)
    if normalize == "channel":
        normalise_pixels(first_stage, dataset, former or (read_config(Path(init_from).parent) if init_from else None))
    return dataset, first_stage


def normalise_pixels(first_stage: FirstStage, dataset: ImageDataset, former: RunConfig | None) -> None:
    """Give each channel of the pixels mean 0 and deviation 1, by the numbers of the run that the weights come from, if
    it has any.

    Raises ValueError for an autoencoder, whose latents ``encode_latents.py`` normalises.
    """
    if not isinstance(first_stage, PixelSpace):
        raise ValueError(
            "--normalize channel: it is for pixels (--vae_path none); for an autoencoder, encode the images by "
            "scripts/encode_latents.py --normalize channel, and train on what it writes"
        )
    recorded = None if former is None else ChannelStatistics.recorded(former.first_stage)
    first_stage.normalise(recorded or pixel_statistics(dataset))


def check_alike(flags: str, data_dir: str, dataset: ImageDataset, ranks: Ranks) -> str:
    """The hash of the data. Raises ValueError on all ranks where one of them has other data or flags."""
    data_hash = dataset.fingerprint(os.path.expanduser(data_dir))  # noqa: PTH111  (it may be a bucket)
    ranks.check_alike({"data": data_hash, "flags": flags}, str(dataset))
    return data_hash


def build_model(config: TrainConfig, run_config: RunConfig) -> tuple[RunConfig, LatentTransformer]:
    """A fresh model, and the configuration that it turned out to have."""
    with global_generator(config.seed, "init"):
        model = run_config.model.build()
    patch_values, objective = model.in_channels * model.patch_size**2, run_config.objective
    model.policy.check_objective(objective.objective, patch_values, objective.learned_uncertainty)
    if model.policy.counts_kept and set(run_config.build_objective().loss_names) != {"loss", "mse"}:
        raise ValueError(
            f"--policy {run_config.model.policy_name}: only kept tokens count in its loss, and the variational term "
            "counts all; use --learn_sigma False, and no --use_kl"
        )
    # None stands for a default that may change; the checkpoint records what was built.
    built = dataclasses.replace(
        run_config.model,
        decode_layer=model.decode_layer or None,
        mask_ratio=model.mask_ratio,
        route=",".join(map(str, model.route)) if model.policy.takes_route else None,
        choose=model.policy.choose if model.policy.leaves else None,
        path_drop=model.policy.path_drop if model.rejoin.drops_path else None,
        decoder=model.decoder_form,
    )
    if config.ratio_schedule != CONSTANT and model.policy.choose == "cells":
        raise ValueError(
            f"--ratio_schedule {config.ratio_schedule}: --choose cells keeps as many tokens of each cell, which a "
            "ratio that moves cannot; use --choose uniform"
        )
    return dataclasses.replace(run_config, model=built), model


class Output:
    """The output folder of a training, which no other one writes to. A dry run leaves no trace there."""

    def __init__(self, asked: Beginning, command: str, ranks: Ranks, stack: contextlib.ExitStack) -> None:
        if launchers.was_restarted(os.environ) and not named_folder(asked.out):
            raise ValueError("OPENAI_LOGDIR is not set, so a job that is started again cannot find its run; set it")
        self._asked = asked
        self.ranks = ranks
        self._stack = stack
        self._job = launchers.job_of(os.environ, command)
        self.folder = ranks.from_main(lambda: own_folder(stack, asked.out, leave_no_trace=asked.dry_run))
        if ranks.from_main(self.folder.is_dir):  # a new one is made when all is checked
            ranks.from_main(self._hold)

    def _hold(self) -> None:
        if not self._asked.dry_run:
            self._stack.enter_context(held(self.folder, "training"))

    def plan_start(self) -> checkpoint.Start:
        """Where the training begins."""
        if self.ranks.from_main(lambda: is_restart(self.folder, self._job, leave_no_trace=self._asked.dry_run)):
            self._asked = self._asked.again()
        asked = (self._asked.resume_checkpoint, self._asked.init_from, self._asked.overwrite, self._asked.dry_run)
        return self.ranks.from_main(lambda: checkpoint.plan_start(self.folder, *asked))

    def claim(self, run_config: RunConfig) -> list[str]:
        """Make the folder this run's, after all is checked. Returns what the user has to be told."""
        self.ranks.from_main(self._hold)
        if self._asked.dry_run:
            return self.ranks.from_main(lambda: check_folder(self.folder, run_config, self._asked.overwrite))
        messages = self.ranks.from_main(lambda: claim_folder(self.folder, run_config))
        self.ranks.from_main(lambda: note_job(self.folder, self._job))
        return messages


def with_recorded_stream(state: dict[str, Any] | None, start: checkpoint.Start, run_config: RunConfig) -> RunConfig:
    """The configuration with the stream of random numbers that a resumed run began with. Raises ValueError."""
    if state is None:
        return run_config
    stream = recorded_stream(state, start.folder / checkpoint.state_file(start.step))
    return dataclasses.replace(run_config, stream=stream)


def with_former_finale(
    explicit: set[str], start: checkpoint.Start, config: TrainConfig, run_config: RunConfig
) -> tuple[TrainConfig, RunConfig]:
    """The configurations with the finale that a resumed run began with, unless a flag says another: the policy may have
    got one of its own since."""
    former = read_config(start.folder) if start.step and "finale" not in explicit else None
    if former is None:
        return config, run_config
    finale = former.training.get("finale", 0.0) if config.has_end else 0.0
    training = {**run_config.training, "finale": finale}
    return dataclasses.replace(config, finale=finale), dataclasses.replace(run_config, training=training)


def take_up(
    start: checkpoint.Start, weights: Request, run_config: RunConfig, model: LatentTransformer, dataset: ImageDataset
) -> list[str]:
    """Give a fresh model the weights that it starts from at step 0, and check that a resumed run stays the same one.

    Returns what the user has to be told.
    """
    messages: list[str] = []
    if start.step and (former := read_config(start.folder)) is not None:
        check_resume(former, run_config, start.folder / CONFIG_NAME)
        check_order(former.training.get("data_order"), dataset.order_record, start.folder / CONFIG_NAME)
        messages += [f"changed since that checkpoint: {change}" for change in changed_settings(former, run_config)]
        data_hash = run_config.training["data_sha256"]
        if former.training.get("data_sha256", data_hash) != data_hash:  # older checkpoints do not say
            messages.append("warning: the images, their labels or names are not those of that checkpoint's training")
    if start.init_from is not None:
        load_initial_weights(model, start.init_from, run_config, weights, messages.append)
    if expression := run_config.training["freeze"]:
        messages.append(f"frozen: {freeze(model, expression) / 1e6:.2f} M parameters")
    return messages


def check_order(former: dict[str, Any] | None, now: dict[str, Any] | None, config: Path) -> None:
    """Raise ValueError where a resumed run would go on in another order of its images."""
    if former == now:
        return
    said = [
        f"--shuffle_window {order['shuffle_window']} of remote archives" if order else "all images shuffled"
        for order in (former, now)
    ]
    if said[0] == said[1]:
        said[1] = "other places of the images in the archives"
    raise ValueError(
        f"{config}: the run to resume has another order of images ({said[0]}; now: {said[1]}), so it would go on "
        "at a wrong place; give the data and --shuffle_window of before, or start a new run with --init_from"
    )


def changed_batch(asked: TrainConfig, config: TrainConfig, ranks: Ranks) -> list[str]:
    if config.batch_size == asked.batch_size:
        return []
    return [
        f"the global batch stays {config.batch_size * ranks.world_size}: {config.batch_size} images for each of the "
        f"{ranks.world_size} processes"
    ]


def check_first_images(
    config: TrainConfig, dataset: ImageDataset, ranks: Ranks, folder: Path, position: int
) -> BadImages:
    """The run's record of bad images. Raises ValueError where too many of those that it begins with are bad."""
    order = dataset.order(config.seed)
    path = folder / LIST_NAME
    bad_images = BadImages(dataset, seed=config.seed, max_bad_share=config.max_bad_share, ranks=ranks, path=path)
    first = min(max(config.batch_size * ranks.world_size, 16), 64)  # of a tiny batch a bad image would be the half
    bad_images.check(order[i] for i in range(position, position + first))
    return bad_images


def draws_of(run_config: RunConfig, model: LatentTransformer, first_stage: FirstStage) -> DrawSpec:
    """The random numbers that come with each image."""
    policy = model.policy
    further = {"path_drop": policy.path_drop > 0, "second_level": policy.two_levels and model.mask_ratio is not None}
    return DrawSpec(run_config.model.latent_shape, model.num_tokens, first_stage.stochastic, **further)


def open_stream(
    data_dir: str,
    num_workers: int,
    config: TrainConfig,
    dataset: ImageDataset,
    draws: DrawSpec,
    ranks: Ranks,
    position: int,
    signals: StopSignals,
) -> Any:
    """This rank's batches from a position on."""
    return load_data(
        data_dir=data_dir,
        dataset=dataset,
        batch_size=config.batch_size,
        image_size=dataset.image_size,
        seed=config.seed,
        position=position,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_workers=choose_num_workers(num_workers),
        draws=draws,
        pin_memory=ranks.device.type == "cuda",
        asked_to_stop=signals.asked,
    )


def load_initial_weights(
    model: LatentTransformer, path: Path, run_config: RunConfig, asked: Request, report: Callable[[str], None]
) -> None:
    """--init_from: weights of the same model, perhaps of other classes, another resolution, grey instead of colour, or
    without a policy.

    Raises ValueError.
    """
    state = checkpoint.read_weights(path)
    former = read_config(path.parent)
    config = run_config.model
    shown = recognise(state, path).named(former.model.model if former else config.model)
    if shown.model != config.model:
        raise ValueError(f"--model {config.model}: the weights in --init_from {path} are of {shown.model}")
    if former is not None and (difference := difference_of_latents(former, run_config)):
        report(f"warning: the weights in --init_from {path} were trained on other latents: {difference}")
    state = fit_channels(state, model, path, report)
    state = fit_positions(state, model, path, asked.interpolate_pos, report)
    state = fit_labels(state, model, path, former.class_names if former else [], run_config.class_names, report)
    state = fit_policy(state, model, path, config.policy_name, report)
    checkpoint.load_weights(model, state, path, asked.drop_extra)


def make_run_config(
    asked: Asked,
    dataset: ImageDataset,
    first_stage: FirstStage,
    device: torch.device,
    data_hash: str,
    further: dict[str, Any],
) -> RunConfig:
    """What the checkpoints will say of themselves. further: settings of the training that have no dataclass.

    Raises ValueError where flags and data do not fit together.
    """
    num_classes, data = asked.model["num_classes"], asked.data
    if num_classes is not None and num_classes < dataset.num_classes:
        raise ValueError(
            f"--num_classes {num_classes}: the data has {dataset.num_classes}, so labels would be out of range"
        )
    if num_classes is not None and not data.class_cond:
        raise ValueError("--num_classes has no meaning with --class_cond False: leave one of them out")
    of_data = {"num_classes": num_classes or dataset.num_classes, "in_channels": first_stage.latent_channels}
    return RunConfig(
        model=ModelConfig(**{**asked.model, **of_data}, downsample=first_stage.downsample),
        diffusion=asked.process,
        objective=complete_objective(asked.objective, dataset, first_stage, device),
        first_stage=first_stage.description,
        class_names=dataset.class_names,
        class_cond=data.class_cond,
        training=training_record(
            asked.config,
            data_dir=data.data_dir,
            num_images=len(dataset),
            data_sha256=data_hash,
            extensions=list(dataset.extensions),
            **{name: getattr(data, name) for name in ("random_flip", "random_crop", "fast_decode", "grey")},
            **({} if dataset.order_record is None else {"data_order": dataset.order_record}),
            **further,
        ),
    )


def open_logger(folder: Path, start_step: int, sinks: Sequence[str], dry_run: bool) -> Logger:
    """The log of rank 0; that of a dry run is on stdout alone."""
    return Logger([HumanSink(sys.stdout)]) if dry_run else Logger.open(folder, start_step, sinks)


def complete_objective(
    asked: dict[str, Any], dataset: ImageDataset, first_stage: FirstStage, device: torch.device
) -> ObjectiveConfig:
    """The objective with what the data decides: ``--time_shift auto``, and ``--sigma_data`` where it is not given."""
    if asked["time_shift"] == "auto":
        side = dataset.image_size / first_stage.downsample
        asked = {**asked, "time_shift": math.sqrt(first_stage.latent_channels * side**2 / SHIFT_ONE)}
    objective = ObjectiveConfig(**asked)  # what it refuses is refused before data is measured
    if objective.objective == "edm" and objective.sigma_data is None:
        return dataclasses.replace(objective, sigma_data=deviation_of_latents(dataset, first_stage, device))
    return objective


def describe(
    asked: Asked,
    run_config: RunConfig,
    dataset: ImageDataset,
    model: LatentTransformer,
    ranks: Ranks,
    folder: Path,
) -> list[str]:
    """What a user wants confirmed before a long run."""
    where = f"{ranks.world_size} processes" if ranks.world_size > 1 else "one process"
    parameters = sum(p.numel() for p in model.parameters())
    defaulted = " (the default)" if asked.model["decode_layer"] is None else ""
    decoder = f", {model.decode_layer} decoder blocks{defaulted}" if model.decode_layer else ""
    masking = "no masking" if model.mask_ratio is None else f"mask ratio {model.mask_ratio}"
    masking = f"policy {run_config.model.policy_name}, {masking}"
    training = {name: run_config.training[name] for name in ("opt", "lr", "weight_decay", "grad_clip", "shard")}
    recipe = {**training, "min_snr_gamma": run_config.diffusion.min_snr_gamma}
    objective = run_config.objective
    sigma = f", sigma_data {objective.sigma_data}" if objective.sigma_data is not None else ""
    return [
        f"output folder: {folder}",
        f"device: {ranks.device}, {where}",
        f"data: {dataset}",
        *dataset.notes,
        f"model: {run_config.model.model}, {parameters / 1e6:.1f} M parameters, {masking}{decoder}",
        *([] if objective.objective == "ddpm" else [f"objective: {objective.objective}{sigma}"]),
        "recipe: " + ", ".join(f"{name} {value}" for name, value in recipe.items()),
        f"first stage: {run_config.first_stage}",
    ]
