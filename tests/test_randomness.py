import subprocess
import sys

import numpy as np
import torch

from masked_diffusion.randomness import DrawSpec, SampleNoise, numpy_generator, torch_generator, training_draws

SPEC = DrawSpec(latent_shape=(4, 8, 8), num_tokens=16, posterior=True)


def test_a_key_gives_the_same_numbers_in_another_process():
    code = "from masked_diffusion.randomness import numpy_generator as g; print(g(0, 'noise', 3, 17).random())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) == numpy_generator(0, "noise", 3, 17).random()


def test_keys_with_equal_sums_or_digits_give_different_streams():
    keys = [(0, "noise", 1, 2), (0, "noise", 2, 1), (1, "noise", 0, 2), (0, "noise", 12), (0, "noise", 1, 21)]
    assert len({numpy_generator(*key).random() for key in keys}) == len(keys)
    assert len({torch.rand(1, generator=torch_generator(*key)).item() for key in keys}) == len(keys)


def test_training_draws_depend_on_seed_epoch_and_index_alone():
    draws = training_draws(SPEC, seed=0, epoch=2, index=5)
    again = training_draws(SPEC, seed=0, epoch=2, index=5)
    for name, value in draws.items():
        np.testing.assert_array_equal(value, again[name])
        for other in (training_draws(SPEC, 1, 2, 5), training_draws(SPEC, 0, 3, 5), training_draws(SPEC, 0, 2, 6)):
            assert not np.array_equal(value, other[name]), name


def test_the_two_views_and_the_posterior_have_noise_of_their_own():
    draws = training_draws(SPEC, 0, 0, 0)
    assert not np.array_equal(draws["noise"], draws["m_noise"])
    assert not np.array_equal(draws["noise"], draws["posterior"])
    assert draws["label_noise"] != draws["m_label_noise"]


def test_a_deterministic_first_stage_changes_no_other_draw():
    with_posterior = training_draws(SPEC, 0, 0, 0)
    without = training_draws(DrawSpec((4, 8, 8), 16, posterior=False), 0, 0, 0)
    assert "posterior" not in without
    for name, value in without.items():
        np.testing.assert_array_equal(value, with_posterior[name])


def test_a_samples_noise_does_not_depend_on_its_neighbours():
    together, alone = SampleNoise(7, [3, 4, 5]), SampleNoise(7, [4])
    x = torch.zeros(3, 2, 2)
    for _ in range(3):
        assert torch.equal(together.randn_like(x)[1:2], alone.randn_like(x[:1]))
