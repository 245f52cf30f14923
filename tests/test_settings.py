"""Each default and each help stands once, in a dataclass: parsers, --help and the pipeline follow it."""

import dataclasses

import pytest
import torch
from support import script

from masked_diffusion import create_diffusion, diffusion_defaults, model_and_diffusion_defaults
from masked_diffusion.diffusion.process import DiffusionConfig
from masked_diffusion.runs.config import ModelConfig
from masked_diffusion.sampling.sampler_config import SamplerConfig
from masked_diffusion.script_util import GROUPS, MOST_USED, make_parser
from masked_diffusion.settings import Flag, flags_of, setting
from masked_diffusion.training.eval_config import EvalConfig
from masked_diffusion.training.train_config import TrainConfig

TRAIN, SAMPLE = "scripts/image_train.py", "scripts/image_sample.py"


@pytest.fixture
def fresh_script():
    """A script as it would start now: its flags are read from the dataclasses again."""
    return script.__wrapped__


def change_default(monkeypatch, cls, name, value):
    """What another default in the source of a dataclass would change."""
    fields = [field for field in dataclasses.fields(cls) if field.init and field.default is not dataclasses.MISSING]
    defaults = tuple(value if field.name == name else field.default for field in fields)
    monkeypatch.setattr(cls.__init__, "__defaults__", defaults)
    monkeypatch.setattr(cls.__dataclass_fields__[name], "default", value)
    monkeypatch.setattr(cls, name, value)


@pytest.mark.parametrize("path, cls, name, value, shown", [
    (TRAIN, TrainConfig, "lr", 7e-3, "0.007"),
    (TRAIN, TrainConfig, "opt", "adan", "'adan'"),
    (TRAIN, EvalConfig, "eval_batch_size", 77, "77"),
    (TRAIN, DiffusionConfig, "noise_schedule", "cosine", "'cosine'"),
    (TRAIN, ModelConfig, "mask_ratio", 0.25, "0.25"),
    (SAMPLE, SamplerConfig, "cfg_scale", 2.5, "2.5"),
    (SAMPLE, SamplerConfig, "num_sampling_steps", 33, "33"),
    ("scripts/convert_checkpoint.py", DiffusionConfig, "diffusion_steps", 500, "500"),
])  # fmt: skip
def test_parser_and_help_follow_the_default_of_the_dataclass(monkeypatch, fresh_script, path, cls, name, value, shown):
    assert getattr(fresh_script(path).create_argparser().parse_args([]), name) != value
    change_default(monkeypatch, cls, name, value)
    parser = fresh_script(path).create_argparser()
    assert getattr(parser.parse_args([]), name) == value
    text = " ".join(parser.format_help().split())
    assert f"{' '.join(flags_of(cls)[name].help.split())[:40]}" in text and f"(default: {shown})" in text


def test_the_front_door_follows_the_process_settings(monkeypatch):
    assert create_diffusion("").num_timesteps == 1000
    change_default(monkeypatch, DiffusionConfig, "diffusion_steps", 40)
    change_default(monkeypatch, TrainConfig, "use_fp16", True)
    assert diffusion_defaults()["diffusion_steps"] == 40
    assert model_and_diffusion_defaults()["diffusion_steps"] == 40 and model_and_diffusion_defaults()["use_fp16"]
    assert DiffusionConfig().build().num_timesteps == 40


def test_the_pipeline_of_diffusers_follows_the_guidance_settings(monkeypatch):
    from test_diffusers_format import pipeline_of, quiet, trained

    pipeline = quiet(pipeline_of(*trained(), None))

    def latents():
        generator = torch.Generator().manual_seed(0)
        return pipeline([1], num_inference_steps=2, output_type="latent", generator=generator).images

    before = latents()
    assert torch.equal(latents(), before)
    change_default(monkeypatch, SamplerConfig, "cfg_scale", 9.0)
    assert not torch.equal(latents(), before)


@pytest.mark.parametrize("path", [TRAIN, SAMPLE])
def test_help_shows_ten_most_used_flags_first_and_those_for_compatibility_last(path):
    text = script(path).create_argparser().format_help()
    headings = [title for title in GROUPS if f"\n{title}:\n" in text]
    assert headings[0] == MOST_USED and headings[-1] == "for compatibility only" and "machine" in headings
    assert [text.index(f"\n{title}:\n") for title in headings] == sorted(
        text.index(f"\n{title}:\n") for title in headings
    )
    groups = {group.title: group._group_actions for group in script(path).create_argparser()._action_groups}
    assert len(groups[MOST_USED]) == 10
    compatible = [action.dest for action in groups["for compatibility only"]]
    assert "dist_on_itp" in compatible and ("use_zero" in compatible or "use_ddim" in compatible)


def test_a_training_has_a_heading_for_each_concern():
    groups = script(TRAIN).create_argparser()._action_groups
    filled = {group.title for group in groups if group._group_actions}
    assert {"data", "model", "diffusion", "training", "saving", "evaluation", "machine"} <= filled


@dataclasses.dataclass(frozen=True)
class Example:
    rate: float | None = setting(0.5, "a rate", "training")
    count: int = setting(3, "a count", "model")
    inner: int = 4


@dataclasses.dataclass(frozen=True)
class Other:
    count: int = setting(5, "another count", "model")


def test_types_follow_the_annotations_and_the_first_of_two_equal_names_counts():
    flags = flags_of(Example, Other)
    assert list(flags) == ["rate", "count"] and flags["count"].help == "a count"
    parser = make_parser("", {**flags, "more": Flag(False, "a switch", "data")}, ["count"])
    args = parser.parse_args(["--rate", "none", "--count", "7", "--more", "yes"])
    assert (args.rate, args.count, args.more) == (None, 7, True)
    assert parser.parse_args([]).rate == 0.5
