"""The names that settings can choose among are those of what is built, and what settings know of each is so."""

import sys

import pytest
from support import run_command

import masked_diffusion
from masked_diffusion import choices, models
from masked_diffusion.data.latent_cache import DTYPES
from masked_diffusion.diffusion import guidance, objectives, samplers
from masked_diffusion.first_stage import KINDS
from masked_diffusion.models.policies import POLICIES
from masked_diffusion.randomness import STREAMS
from masked_diffusion.training.optimizers import MOMENTS, OPTIMIZERS


def test_the_names_are_those_of_what_is_built():
    assert list(choices.FAMILIES) == list(models.FAMILIES)
    assert list(choices.MODELS) == list(models.MODELS)
    assert list(choices.POLICIES) == list(POLICIES)
    assert list(choices.OBJECTIVES) == list(objectives.OBJECTIVES)
    assert list(choices.SAMPLERS) == list(samplers.SAMPLERS)
    assert list(choices.SCHEDULES) == list(guidance.SCHEDULES)
    assert list(choices.OPTIMIZERS) == list(OPTIMIZERS) == list(MOMENTS)
    assert list(choices.LATENT_DTYPES) == list(DTYPES)
    assert list(choices.AUTOENCODERS) == list(KINDS)
    assert max(STREAMS) == choices.STREAM and min(STREAMS) == choices.FIRST_STREAM


@pytest.mark.parametrize("name", choices.POLICIES)
def test_the_traits_of_a_policy_are_its_own(name):
    traits, policy = choices.POLICIES[name], POLICIES[name]
    for trait in set(traits._fields) - {"families"}:
        assert getattr(traits, trait) == getattr(policy, trait), trait


@pytest.mark.parametrize("name", choices.SAMPLERS)
def test_a_sampler_serves_the_objectives_that_it_has_steps_for(name):
    assert set(choices.SAMPLERS[name]) == set(samplers.SAMPLERS[name].starts)


@pytest.mark.parametrize("name", choices.FAMILIES)
def test_a_family_is_built_from_its_traits(name):
    family, traits = models.FAMILIES[name], choices.FAMILIES[name]
    assert (traits.policy, traits.has_decoder) == (family.FAMILY_POLICY, family.HAS_DECODER)


def test_the_package_is_imported_without_torch_and_has_what_it_had_in_0_1_0():
    done = run_command([sys.executable, "-c", "import sys, masked_diffusion\nsys.exit('torch' in sys.modules)"], None)
    assert done.returncode == 0, done.stderr
    assert masked_diffusion.gaussian_diffusion.GaussianDiffusion and masked_diffusion.respace.SpacedDiffusion
    assert masked_diffusion.create_diffusion("10").num_timesteps == 10
