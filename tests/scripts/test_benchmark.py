"""The benchmark script: that each case runs what it is named after, and what its line says. Nothing here is timed."""

import dataclasses
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarking import indexes, measuring, own_cases, settings
from benchmarking.settings import INDEX_FORMS, Settings
from benchmarking.setup import Timing, choose_precision, fresh_model
from support import call

from masked_diffusion import dist_util
from masked_diffusion.choices import POLICIES
from masked_diffusion.first_stage import Autoencoder
from masked_diffusion.image_datasets import open_dataset
from masked_diffusion.models import MDT
from masked_diffusion.randomness import STREAMS
from masked_diffusion.train_util import TrainLoop
from masked_diffusion.training.optimizers import EMA

BENCHMARK = "scripts/benchmark.py"
TINY = [
    "--model", "MDT_Ti_2", "--image_size", "8", "--downsample", "1", "--in_channels", "1", "--num_classes", "10",
    "--batch_size", "3", "--repeats", "2", "--warmup", "1", "--num_sampling_steps", "2", "--device", "cpu",
]  # fmt: skip
ROUNDS = 3  # repeats and warm-up
POSITIVE = ["median_seconds", "min_seconds", "max_seconds", "images_per_second", "peak_memory_bytes", "threads"]


@pytest.fixture
def measure(monkeypatch, tmp_path, capsys):
    """Measure tiny cases; later flags win. Returns the records."""

    def run(cases, *flags):
        assert call(monkeypatch, BENCHMARK, tmp_path, *TINY, "--case", cases, *flags) == 0
        records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [record["case"] for record in records] == cases.split(",")
        for record in records:
            assert all(record[name] > 0 for name in POSITIVE)
            assert record["min_seconds"] <= record["median_seconds"] <= record["max_seconds"]
            assert record["device"] == "cpu" and record["device_name"] and record["torch"] == torch.__version__
            assert (record["repeats"], record["warmup"]) == (2, 1)
        return records

    return run


@pytest.fixture
def passes(monkeypatch):
    """The model's forward passes: batch size, whether masked, training, autocast, with gradients."""
    seen = []
    forward = MDT.forward

    def spy(self, x, t, y, draw=None, **noises):
        autocast = torch.is_autocast_enabled("cpu")
        seen.append((len(x), draw is not None, self.training, autocast, torch.is_grad_enabled()))
        return forward(self, x, t, y, draw=draw, **noises)

    monkeypatch.setattr(MDT, "forward", spy)
    return seen


def test_policies_are_measured_beside_training_without_one(measure, monkeypatch):
    steps = calls_of(monkeypatch, TrainLoop, "train_step")
    (record,) = measure("policies", "--model", "DiT_Ti_2")
    names = [name for name in POLICIES if name != "none"]
    assert len(steps) == 2 * ROUNDS * len(names)
    assert all(record[f"{name}_to_none{clock}"] > 0 for name in names for clock in ("", "_cpu"))
    # Of 4 blocks, mdt's two views, and its side block.
    assert record["mdt_cost"] > 1.8 and record["deferred_cost"] < 0.6 and record["dual_timestep_cost"] < 1.1


def test_sources_are_the_same_images_in_each_form(measure, monkeypatch):
    import benchmarking.sources as cases

    streams = {}
    load_data = cases.load_data

    def spy(**settings):
        seen = streams.setdefault(Path(settings["data_dir"]).name + type(settings["dataset"].source).__name__, [])
        for images, extra in load_data(**settings):
            seen.append(images)
            yield images, extra

    monkeypatch.setattr(cases, "load_data", spy)
    (record,) = measure("sources")
    assert len(streams) == 10 and {len(seen) for seen in streams.values()} == {ROUNDS}
    in_blocks = streams.pop("images.tarRemoteTar")  # the same images in another order
    assert in_blocks[0].shape == streams["folderFolder"][0].shape
    folder, *others = streams.values()
    for seen in others:
        assert all(torch.equal(images, expected) for images, expected in zip(seen, folder, strict=True))
    parquets = ("parquet", "parquet_by_place", "parquet_zstd", "parquet_gzip")
    for form in ("zip", "tar", *parquets, "saved", "remote_tar", "npz"):
        assert record[f"{form}_speed"] > 0 and record[f"{form}_speed_cpu"] > 0 and record[f"{form}_median_seconds"] > 0


def test_each_case_that_can_be_asked_for_is_one_that_is_measured():
    assert set(settings.CASES) == set(measuring.CASES) and set(settings.IN_CHILDREN) == set(measuring.IN_CHILDREN)


def calls_of(monkeypatch, owner, name):
    calls = []
    original = getattr(owner, name)

    def spy(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    return calls


def test_train_step_is_a_step_of_the_training_loop_then_each_view_alone(measure, passes, monkeypatch):
    steps, updates = (calls_of(monkeypatch, *what) for what in ((TrainLoop, "train_step"), (EMA, "update")))
    (record,) = measure("train_step")
    assert len(steps) == len(updates) == steps[0][0].step == ROUNDS + 1  # the last one for its operations
    full, masked = ((3, enable_mask, True, False, True) for enable_mask in (False, True))
    assert passes == [full, masked] * ROUNDS + [full] * ROUNDS + [masked] * ROUNDS + [full, masked]
    assert record["step_gflop"] > 0 and "mfu" not in record  # of a CPU nobody states a peak
    assert record["images_per_second"] == pytest.approx(3 / record["median_seconds"])
    assert record["full_view_median_seconds"] > 0 and record["masked_view_median_seconds"] > 0
    assert (record["model"], record["image_size"], record["batch_size"]) == ("MDT_Ti_2", 8, 3)
    assert (record["dtype"], record["mask_ratio"]) == ("float32", 0.3)


def test_without_a_mask_ratio_there_is_no_masked_view(measure, passes):
    (record,) = measure("train_step", "--mask_ratio", "None")
    assert record["mask_ratio"] is None and "masked_view_median_seconds" not in record
    assert not any(enable_mask for _, enable_mask, *_ in passes)


def test_the_measured_model_starts_without_parameters_of_zeros():
    settings = Settings("MDT_Ti_2", image_size=8, downsample=1, in_channels=1, num_classes=7, decode_layer=1)
    model = fresh_model(settings)
    assert all(parameter.any() for parameter in model.parameters())
    assert (model.decode_layer, model.num_classes, model.in_channels) == (1, 7, 1)


def test_sample_is_guided_steps_extrapolated_to_250(measure, passes):
    (record,) = measure("sample")
    assert passes == [(6, False, False, False, False)] * 2 * ROUNDS  # conditional and not, two steps
    assert record["seconds_per_step"] == pytest.approx(record["median_seconds"] / 2)
    assert record["extrapolated_to_steps"] == 250
    assert record["seconds_per_image"] == pytest.approx(250 * record["seconds_per_step"] / 3)
    assert record["images_per_second"] == pytest.approx(1 / record["seconds_per_image"])


def test_ten_sampling_steps_are_measured_with_unconditional_halves_left_out(measure, passes):
    (record,) = measure("sample", "--num_sampling_steps", "10")
    calls = [batch for batch, *_ in passes]
    every, exact, near = [6] * 10, [3] + [6] * 9, [3] * 4 + [6] * 6
    # The warm-up runs each way in turn as the rounds do.
    assert calls == (every + exact + near) * ROUNDS
    for tolerance in ("0.0", "0.01"):
        assert (
            record[f"cfg_skip_tol_{tolerance}_median_seconds"] > 0 and record[f"cfg_skip_tol_{tolerance}_speedup"] > 0
        )


@pytest.mark.parametrize(("flag", "dtype"), [("--use_bf16", "bfloat16"), ("--use_fp16", "float16")])
def test_half_precision_reaches_the_network(measure, passes, flag, dtype):
    for case in ("train_step", "sample"):
        assert measure(case, flag, "True")[0]["dtype"] == dtype
    assert all(autocast for *_, autocast, _ in passes)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_is_batches_of_jpegs_with_what_a_training_step_draws(measure, monkeypatch, workers):
    batches, ways = [], []
    load_data = own_cases.load_data

    def spy(**settings):
        for batch in load_data(**settings):
            batches.append(batch)
            ways.append(settings["fast_decode"])
            yield batch

    monkeypatch.setattr(own_cases, "load_data", spy)
    (record,) = measure("data", "--num_workers", workers)
    # Whole rounds of the workers; without any, rounds of the two ways to decode in turn.
    assert ways == ([False] * ROUNDS * workers if workers else [False, True] * ROUNDS)
    for clock in ("", "_cpu"):
        for name in (f"fast_decode_speedup{clock}", f"fast_decode_speedup_without_draws{clock}"):
            assert (name in record) == (workers == 0)
    assert ("draws_median_seconds" in record) == (workers == 0)
    images, extras = batches[-1]
    assert images.shape == (3, 3, 8, 8) and images.std() > 0.05
    assert {"y", "t", "noise", "m_noise", "token_noise"} <= set(extras)
    assert record["num_workers"] == workers
    assert record["mean_file_bytes"] > 50_000
    assert record["images_per_second"] == pytest.approx(3 / record["median_seconds"])


def test_the_speedup_of_fast_decoding_is_the_median_of_the_rounds():
    exact, fast, draws = (
        Timing(seconds, 0, [2 * value for value in seconds])
        for seconds in ([9.0, 8.0, 14.0], [3.0, 5.0, 5.0], [1.0, 2.0, 1.0])
    )
    fields = own_cases.against_exact(exact, fast, draws)
    assert fields["fast_decode_speedup"] == fields["fast_decode_speedup_cpu"] == 2.8
    assert fields["fast_decode_speedup_without_draws"] == fields["fast_decode_speedup_without_draws_cpu"] == 13 / 4
    assert fields["fast_decode_median_seconds"] == 5 and fields["draws_median_seconds"] == 1


def test_assemble_writes_a_sample_set_of_the_given_size_and_leaves_nothing(measure, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (record,) = measure("assemble", "--num_samples", "7")
    assert record["num_samples"] == 7 and 0 < record["assemble_seconds"] < record["median_seconds"]
    assert record["npz_bytes"] > 7 * 8 * 8 * 3 + 7 * 8
    assert record["images_per_second"] == pytest.approx(7 / record["median_seconds"])
    assert not list(tmp_path.glob("*/samples*"))


def test_with_an_autoencoder_images_are_encoded_and_latents_decoded(measure, monkeypatch):
    encoded, decoded = (calls_of(monkeypatch, Autoencoder, name) for name in ("encode", "decode"))
    flags = ["--with_vae", "True", "--image_size", "32", "--downsample", "8", "--in_channels", "4"]
    assert measure("train_step", *flags)[0]["with_vae"] is True
    assert {tuple(images.shape) for _, images, *_ in encoded} == {(3, 3, 32, 32)}
    (record,) = measure("sample", *flags)
    assert [tuple(latents.shape) for _, latents in decoded] == [(3, 4, 4, 4)] * ROUNDS
    total = 250 * record["seconds_per_step"] + record["decode_median_seconds"]
    assert record["seconds_per_image"] == pytest.approx(total / 3)


@pytest.mark.e2e
def test_several_cases_are_measured_in_processes_of_their_own_and_also_written_to_a_file(measure, passes, tmp_path):
    out = tmp_path / "figures.jsonl"
    out.write_text("{}\n")
    records = measure("train_step,sample", "--out", out)
    assert not passes  # nothing ran in this process
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{}, *records]


def test_noise_is_drawn_from_the_present_and_from_the_former_stream(measure, monkeypatch):
    drawn = []

    def spied(stream, normals):
        return lambda *key: drawn.append(stream) or normals(*key)

    for stream, normals in list(STREAMS.items()):
        monkeypatch.setitem(STREAMS, stream, spied(stream, normals))
    [record] = measure("noise")
    assert record["to_former"] > 0 and record["draws_median_seconds"] > 0 and record["former_draws_median_seconds"] > 0
    # For each of three samples: its noise and its guidance's draws in guided steps, then its noise alone.
    assert drawn == ([2] * 6 + [1] * 6 + [2] * 3 + [1] * 3) * ROUNDS


@pytest.mark.parametrize(("status", "code"), [(2, 2), (-9, "case data: ended by signal 9 (9: probably out of memory)")])
def test_a_case_that_fails_in_its_process_fails_the_script(monkeypatch, status, code):
    monkeypatch.setattr(
        measuring.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, status, "")
    )
    with pytest.raises(SystemExit) as ended:
        measuring.in_child("data", TINY)
    assert ended.value.code == code


def test_encoding_is_measured_in_both_memory_formats(measure, monkeypatch):
    formats = []

    def moments(self, images):
        assert images.shape == (3, 3, 32, 32)
        formats.append(self.vae.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last))
        return original(self, images)

    original = Autoencoder.moments
    monkeypatch.setattr(Autoencoder, "moments", moments)
    (record,) = measure("encode", "--image_size", "32", "--downsample", "8", "--in_channels", "4")
    assert formats == [True, False] * ROUNDS
    assert record["encode_speedup"] > 0 and record["plain_median_seconds"] > 0


def test_ours_and_the_plain_path_are_measured_in_turn(measure):
    (record,) = measure("against_plain", "--in_channels", "4")
    names = ("speedup", "masked_to_full", "guided_speedup", "share_of_floor", "plain_share_of_floor")
    assert all(record[name + suffix] > 0 for name in names for suffix in ("", "_cpu"))
    assert record["share_of_floor"] < 1 and "cached_latents_speedup" not in record and "compiled_speedup" not in record


def test_a_compiled_step_is_measured_beside_one_that_is_not(measure, counter):
    (record,) = measure("against_plain", "--in_channels", "4", "--compile", "True")
    assert record["compiled_speedup"] > 0 and record["compiled_share_of_floor"] > 0
    assert counter.frame_count > 0 and record["compiled_step_median_seconds"] != record["median_seconds"]


def test_a_ratio_is_the_median_of_the_rounds():
    one, other = Timing([2.0, 90.0, 3.0], 0, [1.0, 1.0, 1.0]), Timing([1.0, 30.0, 1.0], 0, [2.0, 4.0, 5.0])
    assert one.ratios(other, "floor", scale=10.0) == {"floor": 30.0, "floor_cpu": 2.5}


def test_memory_and_scaling_compare_processes_of_their_own(monkeypatch, capsys, tmp_path):
    children = []

    def child(command, **_):
        children.append(command)
        plain, checkpointing = "plain_step" in command, "--grad_checkpointing" in command
        bytes_ = 1000 if plain else 300 if checkpointing else 600
        record = {"peak_memory_bytes": bytes_ + 500, "net_memory_bytes": bytes_, "median_seconds": 1.0}
        record["images_per_second"] = 3.0 if "torch.distributed.run" in command else 4.0
        return subprocess.CompletedProcess(command, 0, json.dumps(record) + "\n")

    monkeypatch.setattr(measuring.subprocess, "run", child)
    assert call(monkeypatch, BENCHMARK, tmp_path, *TINY, "--case", "memory,scaling") == 0
    memory, scaling = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (memory["case"], scaling["case"]) == ("memory", "scaling")
    assert memory["ours_to_plain_net_memory_bytes"] == 0.6
    assert memory["ours_checkpointing_to_plain_net_memory_bytes"] == 0.3
    assert scaling["scaling"] == 1.5
    assert len(children) == 5 and "--nproc_per_node=2" in children[-1]


def test_an_index_is_the_same_images_and_labels_in_each_form(monkeypatch):
    tiny = {"model": "MDT_Ti_2", "image_size": 8, "downsample": 1, "in_channels": 1, "num_classes": 10}
    settings, opened = Settings(index_images=150, **tiny), {}
    for name, few in (("CLASSES", 7), ("SHARDS", 4), ("TABLES", 3), ("NAMES_AT_ONCE", 40)):
        monkeypatch.setattr(indexes, name, few)

    def child(case, *flags):
        own = {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}

        def spy(*args, **kwargs):
            opened[own["index_form"]] = dataset = open_dataset(*args, **kwargs)
            return dataset

        monkeypatch.setattr(indexes, "open_dataset", spy)
        return measuring.record(case, dataclasses.replace(settings, **own), SimpleNamespace(device=torch.device("cpu")))

    record = indexes.index(child, settings)
    assert set(opened) == set(INDEX_FORMS)
    names, labels = list(opened["folder"].source.names), opened["folder"].labels.tolist()
    assert len(names) == 150 and {len(name) for name in names} == {33} and sorted(set(labels)) == [*range(7)]
    for form, dataset in opened.items():
        assert list(dataset.source.names) == names and dataset.labels.tolist() == labels
        assert record[f"{form}_median_seconds"] > 0 and record[f"{form}_building_bytes"] >= 0
    assert record["num_images"] == 150 and record["num_classes"] == 7


def test_a_trace_of_a_step_is_written(measure, tmp_path):
    measure("train_step", "--trace", tmp_path / "trace.json")
    assert "aten::addmm" in (tmp_path / "trace.json").read_text()


def test_tf32_is_the_scripts_default_unless_it_is_asked_for():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for asked, default, expected in ((None, True, True), (None, False, False), (True, False, True)):
            fields = choose_precision(Settings(tf32=asked), torch.device("cuda"), default)
            assert fields["tf32"] is torch.backends.cuda.matmul.allow_tf32 is expected
        assert not choose_precision(Settings(tf32=True), torch.device("cpu"), True)["tf32"]
    finally:
        dist_util.allow_tf32(before)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--case", "train_step,plain"], ["--case plain", "train_step, sample, data"]),
        (["--case", "plain_step", "--mask_ratio", "None"], ["--model MDT_Ti_2", "--mask_ratio"]),
        (["--case", "against_plain", "--model", "DiT_Ti_2"], ["--model DiT_Ti_2", "MDT"]),
        (["--case", ""], ["--case", "train_step, sample, data"]),
        (["--model", "MDT_Q_2"], ["--model MDT_Q_2", "MDT_S_2"]),
        (["--image_size", "7"], ["--image_size 7"]),
        (["--batch_size", "0"], ["--batch_size 0", "at least 1"]),
        (["--repeats", "0"], ["--repeats 0", "at least 1"]),
        (["--num_sampling_steps", "1001"], ["--num_sampling_steps 1001", "1000"]),
        (["--warmup", "-1"], ["--warmup -1", "negative"]),
        (["--num_workers", "-1"], ["--num_workers -1", "negative"]),
        (["--mask_ratio", "1"], ["--mask_ratio 1", "[0, 1)"]),
        (["--with_vae", "True"], ["--downsample 1", "--with_vae"]),
        (["--case", "encode"], ["--downsample 1", "--with_vae"]),
        (["--use_fp16", "True", "--use_bf16", "True"], ["--use_fp16", "choose one"]),
        (["--device", "tpu"], ["--device tpu", "cuda"]),
        (["--out", "missing/folder/file"], ["--out missing/folder/file", "No such file"]),
    ],
)
def test_bad_input_is_one_sentence(monkeypatch, tmp_path, capsys, flags, words):
    assert call(monkeypatch, BENCHMARK, tmp_path, *TINY, *flags) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert all(word in said.err for word in words), said.err
