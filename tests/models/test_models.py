from functools import cache

import numpy as np
import pytest
import torch
from golden_arrays import SEED, assert_golden, golden_json, golden_npz, named_array, set_golden_weights

from masked_diffusion import create_diffusion, models
from masked_diffusion.models import MDT, MODELS, DiT, MDTv2, SiT, create_model
from masked_diffusion.models.layers import TimestepEmbedder, sincos_position_table
from masked_diffusion.models.tokens import Draw, KeptTokens

# The published implementations of the three families, each with its numbers.
FAMILIES = {"MDT": (MDT, "model_v1"), "MDTv2": (MDTv2, "model_v2"), "DiT": (DiT, "model_dit")}
MASKED = ["MDT", "MDTv2"]


class Golden:
    """A family's golden numbers and the model they belong to."""

    def __init__(self, family):
        self.build, name = FAMILIES[family]
        self.info = golden_json(f"{name}.json")
        self.config = self.info["config"]
        self.masks = family in MASKED
        self.arrays = golden_npz(f"{name}.npz")
        self.null = torch.full_like(self.tensor("y"), self.config["num_classes"])

    def tensor(self, name):
        return torch.from_numpy(self.arrays[name])

    def inputs(self, suffix=""):
        return [self.tensor(name + suffix) for name in ("x", "t", "y")]

    def fresh(self, mask_ratio=0.3, **kwargs):
        return self.build(**self.config, **({"mask_ratio": mask_ratio} if self.masks else {}), **kwargs)

    def model(self, *args, **kwargs):
        return set_golden_weights(self.fresh(*args, **kwargs)).eval()


goldens = cache(Golden)
CONFIG, CONFIG_OF_DIT = goldens("MDT").config, goldens("DiT").config


@pytest.fixture(params=FAMILIES)
def golden(request):
    return goldens(request.param)


@pytest.fixture(params=MASKED)
def masked(request):
    return goldens(request.param)


@pytest.fixture
def model():
    return goldens("MDT").model()


def tensor(name):
    return goldens("MDT").tensor(name)


def test_state_dict_has_the_published_names_shapes_and_order(golden):
    state = golden.fresh().state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == golden.info["state_dict"]
    assert list(state) == list(golden.info["state_dict"])


BLOCKS_OF_XL = {
    "MDT": {"blocks": 28, "sideblocks": 1},
    "MDTv2": {"en_inblocks": 12, "en_outblocks": 12, "de_blocks": 4, "sideblocks": 1},
    "DiT": {"blocks": 28},
}


@pytest.mark.parametrize("image_size", [256, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_xl_files_load_strictly(family, image_size):
    """Their names are the golden's with more blocks; DiT-XL/2 for 256 x 256 prints 675,129,632 parameters."""
    with torch.device("meta"):
        model = MODELS[f"{family}_XL_2"](input_size=image_size // 8)
    state = model.state_dict()
    published = set()
    for name in goldens(family).info["state_dict"]:
        group, *rest = name.split(".")
        for number in range(BLOCKS_OF_XL[family].get(group, 1)):
            published.add(".".join([group, str(number), *rest[1:]]) if group in BLOCKS_OF_XL[family] else name)
    model.load_state_dict({name: torch.empty_like(state[name]) for name in published}, strict=True, assign=True)
    num_tokens = (image_size // 16) ** 2
    assert state["pos_embed"].shape == (1, num_tokens, 1152)
    if family == "DiT":
        assert sum(p.numel() for p in model.parameters()) == 675_129_632 + (num_tokens - 256) * 1152


def test_the_published_file_of_sit_loads_strictly():
    """SiT-XL-2-256x256.pt has DiT's names and shapes, the table of positions and the variance's channels among them."""
    with torch.device("meta"):
        model, published = (MODELS[f"{family}_XL_2"](input_size=32) for family in ("SiT", "DiT"))
    state = {name: torch.empty_like(value) for name, value in published.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)
    assert list(model.state_dict()) == list(state) and state["final_layer.linear.weight"].shape == (32, 1152)
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_sit_is_dits_network_whose_time_and_velocity_run_from_noise_to_data(learn_sigma):
    """SiT, 2401.08740: x_t = t x_0 + (1 - t) eps, and the network predicts x_0 - eps in its first channels."""
    dit = goldens("DiT").model()
    sit = SiT(**{**CONFIG_OF_DIT, "learn_sigma": learn_sigma}).eval()
    sit.load_state_dict(dit.state_dict())
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0.0, 0.25, 0.6, 1.0]), torch.tensor([0, 1, 2, 3])
    velocity = sit(x, 1000 * (1 - t), y)
    torch.testing.assert_close(velocity, -dit(x, t, y)[:, :4], rtol=1e-5, atol=1e-6)
    assert (velocity - sit(x, 1000 * t, y)).abs().max() > 1e-3
    guided = sit.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y]), cfg_scale=1.5)
    assert guided.shape == (8, 4, 8, 8)


def test_forward_equals_the_golden(golden):
    assert_golden(golden.model()(*golden.inputs()), golden.arrays["eval_forward"])


def test_forward_of_the_null_class_equals_the_golden(golden):
    x, t, _ = golden.inputs()
    assert_golden(golden.model()(x, t, golden.null), golden.arrays["eval_forward_null_class"])


def test_masked_forward_in_eval_mode_equals_the_golden(masked):
    model = masked.model()
    torch.manual_seed(SEED)
    assert_golden(model(*masked.inputs(), enable_mask=True), masked.arrays["masked_forward_eval"])


@pytest.mark.parametrize("suffix", ["", "_32"])
@pytest.mark.parametrize("enable_mask", [False, True])
def test_forward_in_train_mode_drops_labels_as_the_golden(masked, suffix, enable_mask):
    model = masked.model().train()
    torch.manual_seed(SEED)
    out = model(*masked.inputs(suffix.replace("_", "")), enable_mask=enable_mask)
    assert_golden(out, masked.arrays[("masked_forward_train" if enable_mask else "train_forward") + suffix])


def test_dit_in_train_mode_drops_labels_as_the_golden():
    golden = goldens("DiT")
    model = golden.model().train()
    torch.manual_seed(SEED)
    assert_golden(model(*golden.inputs("32")), golden.arrays["train_forward_32"])


@pytest.mark.parametrize("cfg_scale, scale_pow", [(3.8, 4.0), (1.0, 4.0), (4.0, 0.01), (1.5, 1.0)])
def test_guided_forward_equals_the_golden(masked, cfg_scale, scale_pow):
    x, t, y = masked.inputs()
    batch = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, masked.null])
    out = masked.model().forward_with_cfg(*batch, cfg_scale=cfg_scale, scale_pow=scale_pow)
    assert_golden(out, masked.arrays[f"cfg_{cfg_scale}_{scale_pow}"])


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5, 4.0])
def test_guided_forward_of_dit_has_a_constant_scale(cfg_scale):
    golden = goldens("DiT")
    x, t, y = golden.inputs()
    batch = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, golden.null])
    assert_golden(golden.model().forward_with_cfg(*batch, cfg_scale=cfg_scale), golden.arrays[f"cfg_{cfg_scale}"])


def test_forward_with_cfg_without_a_scale_is_a_plain_forward(golden):
    expected = golden.arrays.get("cfg_none", golden.arrays["eval_forward"])
    assert_golden(golden.model().forward_with_cfg(*golden.inputs()), expected)


def test_guided_forward_reads_only_the_first_half_of_the_latents(golden):
    x, t, y = golden.inputs()
    model, labels = golden.model(), torch.cat([y, golden.null])
    first = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), labels, cfg_scale=3.8)
    assert torch.equal(model.forward_with_cfg(torch.cat([x, 7 - x]), torch.cat([t, t]), labels, cfg_scale=3.8), first)


def test_losses_and_gradient_norms_equal_the_golden(golden):
    model = golden.model()
    diffusion = create_diffusion("", min_snr_gamma=5.0 if golden.build is MDTv2 else None)
    kwargs = {"y": golden.tensor("y")}
    x, tl = golden.tensor("x"), golden.tensor("tl")
    torch.manual_seed(SEED)
    views = {"loss": diffusion.training_losses(model, x, tl, kwargs, noise=golden.tensor("noise"))}
    if golden.masks:
        kwargs["enable_mask"] = True
        views["mloss"] = diffusion.training_losses(model, x, tl, kwargs, noise=golden.tensor("noise2"))
    for prefix, losses in views.items():
        for name in ("loss", "mse", "vb"):
            assert_golden(losses[name], golden.arrays[f"{prefix}_{name}"])
    sum(losses["loss"].mean() for losses in views.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert sorted(gradients) == golden.info["parameters_sorted"]
    norms = [0.0 if gradients[name] is None else gradients[name].norm() for name in sorted(gradients)]
    assert_golden(torch.tensor(norms), golden.arrays["grad_norms"])


LOOPS = {"ddpm50": ("50", None), "ddim25": ("ddim25", 0.0), "ddpm250": ("250", None), "ddim10_eta": ("10", 0.7)}


@pytest.mark.parametrize(
    "family, name", [*((f, name) for f in MASKED for name in LOOPS), ("DiT", "ddpm50"), ("DiT", "ddim25")]
)
def test_guided_sampling_loops_equal_the_goldens_over_their_whole_length(family, name):
    golden, (respacing, eta) = goldens(family), LOOPS[name]
    model = golden.model(mask_ratio=None) if golden.masks else golden.model()
    z = torch.from_numpy(named_array("z", (4, 4, golden.config["input_size"], golden.config["input_size"])))
    kwargs = {"y": torch.cat([golden.tensor("y"), golden.null]), "cfg_scale": 1.5}
    if golden.masks:
        kwargs |= {"cfg_scale": 3.8, "scale_pow": 4.0, "diffusion_steps": 1000}
    diffusion = create_diffusion(respacing)
    torch.manual_seed(SEED)
    arguments = (model.forward_with_cfg, (8, *z.shape[1:]), torch.cat([z, z]))
    if eta is None:
        sample = diffusion.p_sample_loop(*arguments, clip_denoised=False, model_kwargs=kwargs)
    else:
        sample = diffusion.ddim_sample_loop(*arguments, clip_denoised=False, model_kwargs=kwargs, eta=eta)
    expected = golden.arrays[f"sample_{name}"]
    assert_golden(sample[:4], expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    "call, kwargs",
    [
        ("MDT_S_2(mask_ratio=0.3, decode_layer=2)", {"mask_ratio": 0.3, "decode_layer": 2}),
        ("MDTv2_S_2(mask_ratio=0.3, decode_layer=6)", {"mask_ratio": 0.3, "decode_layer": 6}),
        ("DiT_S_2()", {}),
    ],
)
def test_a_fresh_model_is_initialised_as_published(call, kwargs):
    expected = golden_json("init.json")[call]
    model = create_model(call.partition("(")[0], **kwargs)
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == expected["total_parameters"]
    assert set(parameters) == set(expected["parameters"])
    table = torch.from_numpy(sincos_position_table(384, 16)).float()
    for name, published in expected["parameters"].items():
        value = parameters[name].detach()
        assert parameters[name].requires_grad == ("frozen" not in published), name
        if published == "zeros":
            assert not value.any(), name
        elif isinstance(published, str):
            assert published.startswith("sincos") and torch.equal(value[0], table), name
        else:
            tolerance = 0.05 if published["n"] > 10_000 else 0.2
            assert value.numel() == published["n"], name
            assert value.std().item() == pytest.approx(published["std"], rel=tolerance), name
            is_uniform = published["absmax"] < 1.9 * published["std"]
            if is_uniform:
                assert value.abs().max().item() == pytest.approx(3**0.5 * published["std"], rel=tolerance), name
            else:
                assert value.abs().max().item() > 2 * published["std"], name


def test_position_table_equals_the_golden():
    for name, table in golden_npz("sincos.npz").items():
        width, grid_size = map(int, name.split("x"))
        np.testing.assert_allclose(sincos_position_table(width, grid_size), table, atol=1e-12)


@pytest.mark.parametrize("mask_ratio", [0.3, None])
def test_every_trained_parameter_gets_a_gradient_from_the_pass_that_ends_a_step(golden, mask_ratio):
    model = golden.model(mask_ratio).train()
    kwargs = {"enable_mask": mask_ratio is not None} if golden.masks else {}
    model(*golden.inputs(), **kwargs).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_without_a_mask_ratio_the_side_interpolater_is_frozen_and_its_token_zero(masked):
    model = masked.fresh(mask_ratio=None)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith("sideblocks.")} | {"mask_token"}
    assert not model.mask_token.any()
    model = masked.model(mask_ratio=None)
    assert torch.equal(model(*masked.inputs(), enable_mask=True), model(*masked.inputs()))


def test_kept_tokens_come_back_to_where_they_were_and_masked_positions_get_the_filler():
    x = torch.randn(3, 10, 4)
    kept = KeptTokens.from_noise(torch.rand(3, 10), num_keep=6)
    restored = kept.come_back(kept.leave(x), torch.full((1, 1, 4), 7.0))
    assert kept.dropped.sum(dim=1).tolist() == [4, 4, 4]
    assert torch.equal(restored[~kept.dropped], x[~kept.dropped])
    assert (restored[kept.dropped] == 7).all()


def test_the_tokens_with_the_smallest_noise_are_kept():
    kept = KeptTokens.from_noise(torch.tensor([[0.9, 0.1, 0.5, 0.3]]), num_keep=2)
    assert kept.dropped.tolist() == [[True, False, True, False]]


def test_side_interpolater_changes_masked_positions_only(model):
    N, L, D = 4, 16, CONFIG["hidden_size"]
    kept = KeptTokens.from_noise(torch.rand(N, L), num_keep=11)
    x, c = torch.randn(N, 11, D), torch.randn(N, D)
    before = kept.come_back(x, model.mask_token) + model.decoder_pos_embed
    after = model.rejoin(model, x, torch.randn(N, L, D), c, Draw(kept))
    assert torch.equal(after[~kept.dropped], before[~kept.dropped])
    assert (after[kept.dropped] != before[kept.dropped]).any(dim=1).all()


def test_masking_nothing_encodes_as_without_a_mask(masked):
    model, inputs = masked.model(mask_ratio=0.0), masked.inputs()
    masked_out = model(*inputs, draw=model.draw(torch.rand(4, 16)))
    torch.testing.assert_close(masked_out, model(*inputs), rtol=1e-4, atol=1e-4)


def test_draws_that_are_passed_in_are_the_ones_used(masked):
    model, inputs = masked.model().train(), masked.inputs()
    torch.manual_seed(5)
    label_noise = torch.rand(4)
    ratio_noise = torch.rand(1).item() if masked.build is MDTv2 else 0.0
    draw = model.draw(torch.rand(4, 16), ratio_noise)
    torch.manual_seed(5)
    drawn = model(*inputs, enable_mask=True)
    assert torch.equal(model(*inputs, label_noise=label_noise, draw=draw), drawn)


@pytest.mark.parametrize("ratio_noise, num_keep", [(0.0, 11), (0.5, 9), (0.999, 8)])
def test_version_2_masks_up_to_a_fifth_more_and_version_1_does_not(ratio_noise, num_keep):
    """16 tokens: int(16 * (1 - 0.3)), int(16 * (1 - 0.4)), int(16 * (1 - 0.4998))."""
    for family, expected in (("MDT", 11), ("MDTv2", num_keep)):
        model, seen = goldens(family).model(), []
        blocks = model.blocks if family == "MDT" else model.en_inblocks
        blocks[0].register_forward_hook(lambda block, inputs, out, seen=seen: seen.append(out.shape[1]))
        model(*goldens(family).inputs(), draw=model.draw(torch.rand(4, 16), ratio_noise))
        assert seen == [expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32(model, dtype):
    x, t, y = tensor("x"), tensor("t"), tensor("y")
    with torch.autocast("cpu", dtype=dtype):
        out = model(x, t, y, draw=model.draw(torch.rand(4, 16)))
    assert out.isfinite().all()
    with torch.autocast("cpu", dtype=dtype):
        out = model(x, t, y)
    assert (out.float() - model(x, t, y)).abs().max() < 0.1 * out.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_halves_embeds_the_timesteps_that_it_is_given(dtype):
    """In bfloat16 999 is 1000, and the frequencies round."""
    embedder = TimestepEmbedder(8)
    t = torch.tensor([1, 500, 999])
    expected = embedder(t)
    halves = embedder.to(dtype)
    assert (halves(t).float() - expected).abs().max() < 0.02 * expected.abs().max()
    assert torch.equal(halves(t.float()), halves(t)) and halves(t).dtype == dtype


@pytest.mark.parametrize("name", MODELS)
def test_every_builder_has_the_shape_its_name_says(name):
    patch_size = int(name[-1])
    with torch.device("meta"):
        model = create_model(name, input_size=16, learn_sigma=False, decode_layer=2)
    assert type(model).__name__ == name.split("_")[0] and getattr(models, name) is MODELS[name]
    assert model.patch_size == patch_size
    assert model.num_tokens == (16 // patch_size) ** 2
    assert model.out_channels == (8 if name.startswith("SiT") else 4)  # whose files have a variance, unused


def test_the_smallest_model_runs_on_one_token_one_class_and_a_batch_of_one():
    kwargs = {"input_size": 2, "in_channels": 1, "hidden_size": 4, "depth": 2, "num_heads": 1, "num_classes": 1}
    model = MDT(**kwargs, decode_layer=1, mask_ratio=0.0)
    assert model(torch.randn(1, 1, 2, 2), torch.tensor([3]), torch.tensor([0]), enable_mask=True).shape == (1, 2, 2, 2)


def test_decode_layer_none_means_two_and_in_version_2_four():
    assert MDT(**CONFIG | {"decode_layer": None}).decode_layer == 2
    assert MDTv2(**CONFIG | {"decode_layer": None}).decode_layer == 4


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"decode_layer": 3}, "decode_layer 3: leaves 3 of 6 blocks for the encoder"),
        ({"decode_layer": 5}, "decode_layer 5: must be in 1 ... 4"),
        ({"mask_ratio": 0.75}, "mask_ratio 0.75: MDTv2 masks up to 0.2 more, which keeps none of the 16 tokens"),
        ({"mask_ratio": 1.0}, "mask_ratio 1.0: must be in"),
    ],
)
def test_version_2_refuses_unequal_halves_and_masks_that_may_keep_no_token(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MDTv2(**CONFIG | kwargs)


def test_dit_is_built_without_the_settings_of_masking():
    model = create_model("DiT_Ti_2", input_size=4, mask_ratio=0.3, decode_layer=2)
    assert model.mask_ratio is None and not any("decoder" in name for name in model.state_dict())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"decode_layer": 0}, "decode_layer 0: must be in 1 ... 5"),
        ({"decode_layer": 6}, "decode_layer 6: must be in 1 ... 5"),
        ({"mask_ratio": 1.0}, "mask_ratio 1.0: must be in"),
        ({"mask_ratio": -0.1}, "mask_ratio -0.1: must be in"),
        ({"mask_ratio": 0.99}, "keeps none of the 16 tokens"),
        ({"input_size": 9}, "input_size 9: must be a multiple of patch_size 2"),
        ({"hidden_size": 50}, "multiple of"),
        ({"num_heads": 5}, "multiple of num_heads 5"),
    ],
)
def test_impossible_shapes_are_refused_with_the_value_and_the_rule(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MDT(**CONFIG | kwargs)


def test_an_unknown_model_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="MDT_S2: unknown; choose one of MDT_XL_2, .*MDT_S_2.*MDTv2_XL_2.*DiT_XL_2"):
        create_model("MDT_S2")


def test_a_model_without_a_null_class_refuses_guidance():
    model = MDT(**CONFIG, class_dropout_prob=0.0)
    assert not model.has_null_class
    with pytest.raises(ValueError, match="no null class"):
        model.forward_with_cfg(tensor("x"), tensor("t"), tensor("y"), cfg_scale=2.0)


def test_an_expanded_bias_gives_equal_numbers_and_is_no_part_of_the_weights(golden):
    model, inputs = golden.model().requires_grad_(False), golden.inputs()
    masked = [{}, *({"draw": model.draw(torch.rand(4, 16), 0.5)} for _ in range(golden.masks))]
    before, names = [model(*inputs, **kwargs) for kwargs in masked], list(model.state_dict())
    model.expand_bias()
    assert all(torch.equal(model(*inputs, **kwargs), out) for kwargs, out in zip(masked, before, strict=True))
    assert list(model.state_dict()) == names


def test_an_expanded_bias_is_looked_up_once(model, monkeypatch):
    model.expand_bias()
    monkeypatch.setattr(torch.Tensor, "index_select", None)
    index = model.rel_index
    first = model.blocks[0].attn.rel_pos_bias
    assert first(index) is first(index)


@pytest.mark.parametrize("shape", [(16, 16), (3, 11, 11)])
def test_the_attention_bias_has_the_layout_that_fused_kernels_ask_for(model, shape):
    index = torch.randint(0, 49, shape, dtype=torch.int32)
    bias = model.blocks[0].attn.rel_pos_bias(index)
    assert bias.shape == (1 if len(shape) == 2 else 3, CONFIG["num_heads"], *shape[-2:])
    assert bias.stride()[-2:] == (shape[-1], 1)
    table = model.blocks[0].attn.rel_pos_bias.relative_position_bias_table
    assert torch.equal(bias[-1, :, 2, 5], table[index[..., 2, 5].reshape(-1)[-1]])
