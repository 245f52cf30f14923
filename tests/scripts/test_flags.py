"""The command line is a contract: people's scripts depend on the names and defaults of flags."""

import argparse

import pytest
from support import REPO, script

MODEL_AND_DIFFUSION = {
    "image_size": 256, "mask_ratio": None, "decode_layer": None, "class_cond": True, "use_fp16": False,
    "learn_sigma": True, "diffusion_steps": 1000, "noise_schedule": "linear", "timestep_respacing": "",
    "use_kl": False, "predict_xstart": False, "sigma_small": False, "rescale_learned_sigmas": False,
}  # fmt: skip
COLUMNS = {"image_column": "", "label_column": "", "max_image_bytes": 2**30}
LAUNCHER = {"local_rank": None, "rank": None, "world_size": None, "dist_url": "env://", "dist_on_itp": False}
CONTRACT = {
    "scripts/image_train.py": {
        **MODEL_AND_DIFFUSION, **LAUNCHER, "data_dir": "", "schedule_sampler": "uniform", "lr": 3e-4, "weight_decay": 0,
        "adam_beta2": 0.999,
        "lr_anneal_steps": 0, "max_compute": 0.0, "lr_warmup": 0, "lr_decay": 0.0, "batch_size": 1,
        "microbatch": -1, "ema_rate": "0.9999", "ema_warmup": False,
        "ema_power": "", "ema_snapshot_interval": 5000, "log_interval": 10,
        "save_interval": 10000, "resume_checkpoint": "auto", "fp16_scale_growth": 1e-3, "model": "MDT_S_2",
        "vae_path": "stabilityai/sd-vae-ft-mse", "seed": 0, "max_steps": 0, "use_bf16": False, "num_classes": None,
        "class_from": "auto", "labels_file": "", **COLUMNS, "shuffle_window": 10_000,
        "random_flip": True, "random_crop": False, "init_from": None,
        "num_workers": -1,
        "fast_decode": False, "grey": False, "normalize": "none",
        "device": "auto", "preview_samples": 16, "preview_steps": 25, "overwrite": False, "out": "", "tf32": False,
        "preview_guide_from": "null_label", "eval_guide_from": "null_label", "preview_cfg_scale": None,
        "guide_path": "", "guide_labels": "same", "guide_ratio": None, "guide_strong_ratio": 0.0,
        "guidance": None, "scale_pow": 4.0, "cfg_interval": None,
        "keep_checkpoints": 0, "keep_every": 0, "max_bad_steps": 10, "weights_format": "pt", "dry_run": False,
        "eval_interval": 0, "eval_num_samples": 10000, "eval_ref": "", "eval_graph": "", "eval_backend": "torch",
        "eval_sampler": "ddpm", "eval_sampling_steps": 250, "eval_cfg_scale": 0.0, "eval_batch_size": 32,
        "max_bad_share": 0.01, "opt": "adamw",
        "objective": "ddpm", "level_law": "uniform", "level_mean": 0.0, "level_std": 1.0, "time_shift": 1.0,
        "sigma_data": None, "p_mean": -1.2, "p_std": 1.2, "learned_uncertainty": False,
        "policy": None, "route": None, "choose": None, "path_drop": None, "decoder": None,
        "finale": None, "finale_lr": 1.0, "ratio_schedule": "const",
        "grad_clip": 0.0, "shard": "none", "use_zero": False, "min_snr_gamma": None,
        "interpolate_pos": False, "drop_extra": False, "freeze": "", "compile": False, "grad_checkpointing": False,
    },
    "scripts/encode_latents.py": {
        **LAUNCHER, "data_dir": "", "out": "", "image_size": 256, "vae_path": "stabilityai/sd-vae-ft-mse",
        "class_cond": True, "class_from": "auto", "labels_file": "", **COLUMNS, "random_flip": True, "dtype": "fp32",
        "normalize": "none", "features": "", "trust_features": False, "shard_size": 1024,
        "batch_size": 16, "num_workers": -1, "tf32": False, "device": "auto",
    },
    "scripts/train_autoencoder.py": {
        "data_dir": "", "out": "", "image_size": 32, "random_flip": True, "downsample": 2, "latent_channels": 4,
        "channels": 16, "crop": 32, "steps": 4000, "batch_size": 16, "lr": 5e-3, "kl_weight": 1e-3, "seed": 0,
        "num_workers": -1, "device": "auto",
    },
    "scripts/image_sample.py": {
        **MODEL_AND_DIFFUSION, **LAUNCHER, "objective": "ddpm",
        "num_sampling_steps": 250, "few_steps": False, "clip_denoised": False, "num_samples": 5000,
        "batch_size": 16, "use_ddim": False, "model_path": "", "model": "MDT_S_2", "cfg_scale": 3.8, "cfg_cond": False,
        "scale_pow": 4.0, "vae_decoder": "ema", "vae_path": None, "seed": 0, "labels": "random", "device": "auto",
        "out": "",
        "num_classes": None, "tf32": True, "sampler": "ddpm", "guidance": "power_cosine", "cfg_interval": None,
        "cfg_channels": 3, "cfg_skip_tol": 0.0, "interpolate_pos": False, "drop_extra": False, "compile": False,
        "guide_from": "null_label",
        "guide_path": "", "guide_labels": "same", "guide_ratio": None, "guide_strong_ratio": 0.0,
    },
    "scripts/convert_checkpoint.py": {
        "model_path": "", "out": "", "model": None,
        "decode_layer": None, "diffusion_steps": 1000, "noise_schedule": "linear",
        "predict_xstart": False, "sigma_small": False, "drop_extra": False, "vae_path": None, "diffusers_class": "ours",
    },
    "scripts/check_data.py": {
        "data_dir": "", "image_size": 256, "class_cond": True, "class_from": "auto", "labels_file": "", **COLUMNS,
        "num_workers": -1, "out": "",
    },
    "infer_mdt.py": {
        "model_path": "", "model": "MDT_XL_2", "image_size": 256, "labels": None, "cfg_scale": None, "scale_pow": None,
        "num_sampling_steps": None, "seed": 0, "out": None, "vae_path": None, "decode_layer": None, "device": "auto",
        "vae_decoder": "mse", "sampler": "ddpm", "guidance": "power_cosine", "cfg_interval": None, "cfg_channels": 3,
        "cfg_skip_tol": 0.0, "sweep": None, "frames": 0, "image": None, "mask": None, "inpaint_mode": "side",
        "interpolate_pos": False, "drop_extra": False, "guide_from": "null_label",
        "guide_path": "", "guide_labels": "same", "guide_ratio": None, "guide_strong_ratio": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("path", CONTRACT)
def test_flags_and_defaults_are_the_contract(path):
    assert vars(script(path).create_argparser().parse_args([])) == CONTRACT[path]


@pytest.mark.parametrize("path", CONTRACT)
def test_every_flag_has_help(path):
    for action in script(path).create_argparser()._actions:
        assert action.help and not action.help.startswith("(default"), action.dest


PARSERS = [
    path.relative_to(REPO).as_posix()
    for path in (*sorted((REPO / "scripts").glob("*.py")), REPO / "infer_mdt.py")
    if "def create_argparser" in path.read_text(encoding="utf-8")
]


def is_float_flag(action):
    try:
        return isinstance(action.type("0.5"), float)
    except (TypeError, ValueError, argparse.ArgumentTypeError):  # TypeError: a switch or a string, without a type
        return False


@pytest.mark.parametrize("path", PARSERS)
def test_every_float_flag_refuses_what_is_not_finite(path):
    for action in filter(is_float_flag, script(path).create_argparser()._actions):
        for text in ("nan", "inf", "-inf", "1e999"):
            with pytest.raises(argparse.ArgumentTypeError, match="expected a finite number"):
                action.type(text)


def test_the_float_flags_of_the_scripts_are_found():
    flags = {
        action.dest for path in PARSERS for action in script(path).create_argparser()._actions if is_float_flag(action)
    }
    assert {"cfg_scale", "scale_pow", "mask_ratio", "lr", "min_snr_gamma", "max_bad_share"} <= flags
