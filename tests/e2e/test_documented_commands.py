"""Every command of the README and of docs/ is run as it is written, shrunk only in sizes, paths, processes and steps.

Commands run in a folder that looks like the repository (links to its files), so that relative paths are the
documented ones: ``output_mdt_s2``, ``mdt_xl2_v1_ckpt.pt``, ``../dataeval``.
"""

import ast
import json
import os
import re
import shutil
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_arrays import GOLDENS
from PIL import Image
from support import COLOURS, REPO, TIMEOUT, call, environment, free_port, make_colour_folder, run_command, warm_python

from masked_diffusion.files import write_json
from masked_diffusion.models import MODELS

TUTORIAL = REPO / "docs" / "tutorial.md"  # test_tutorial.py goes through it
PAGES = [REPO / "README.md", *sorted({*(REPO / "docs").glob("*.md")} - {TUTORIAL}), REPO / "evaluations" / "README.md"]
RELIABILITY = REPO / "docs" / "reliability.md"
TROUBLESHOOTING = REPO / "docs" / "troubleshooting.md"
SIDE = 32  # of the images: latents of 4 x 4 behind the tiny autoencoder
METRICS = ["Inception Score", "FID", "sFID", "Precision", "Recall"]


# What is documented


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def documented_commands():
    """Commands in their order, each once: continued lines joined, comments and repeated spaces removed."""
    found = {}
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                text = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
                if text:
                    found.setdefault(text, page)
    return list(found)


COMMANDS = documented_commands()


# How each is shrunk


TRAINING = (
    f"--model MDT_Ti_2 --image_size {SIDE} --batch_size 2 --max_steps 1 --preview_samples 2 --preview_steps 2 "
    "--num_workers 0 --vae_path $TINY_VAE --device cpu"
)
SAMPLING = f"--image_size {SIDE} --num_samples 4 --batch_size 2 --num_sampling_steps 2 --few_steps True --device cpu"
ENCODING = f"--image_size {SIDE} --shard_size 5 --batch_size 2 --device cpu"
PUBLISHED = "--model MDT_Ti_2 --vae_path $TINY_VAE"  # a stand-in of the published file, which has no config.json
PICTURES = "--num_sampling_steps 2 --device cpu"
# Everywhere: data, number of processes and machines, addresses, sizes in file names.
SHRINK = [
    (r"/dataset/(\w+)", r"$DATA/\1"),
    (r"(--nproc_per_node=|mpiexec -n |NUM_GPUS=)\d+", r"\g<1>2"),
    (r"--nnodes=\d+", "--nnodes=1"),
    (r"first-machine:\d+", "127.0.0.1:$MASTER_PORT"),
    (r"MASTER_ADDR=first-machine", "MASTER_ADDR=127.0.0.1"),
    (r"MASTER_PORT=\d+", "MASTER_PORT=$MASTER_PORT"),
    (r"\bBATCH_SIZE=\d+", "BATCH_SIZE=2"),
    (r"samples_\d+x256x256x3", f"samples_12x{SIDE}x{SIDE}x3"),
]
SMALL_SHELL = {"MODEL": "MDT_Ti_2", "IMAGE_SIZE": SIDE, "BATCH_SIZE": 2, "NUM_NODE": 2, "GPU_PRE_NODE": 1}


@dataclass(frozen=True)
class Row:
    """A documented command. pattern: what tells it from others. flags: appended to it. environment: for scripts that
    take their settings from there. makes: a glob of what has to be there afterwards. says: a part of its stdout.
    beside: the pattern of a command that runs at the same time. elsewhere: where it is tested instead. without: a file
    or folder that must not be there.
    """

    pattern: str
    flags: str = ""
    environment: dict = field(default_factory=dict)
    makes: str = ""
    says: str = ""
    beside: str = ""
    elsewhere: str = ""
    without: str = ""


def trains(folder, flags=TRAINING, step=1):
    return {"flags": flags, "makes": f"{folder}/checkpoint{step:06d}.json"}


TABLE = [
    Row(r"--dry_run True", flags=TRAINING, says="nothing was written"),
    Row(r"--shard fsdp", **trains("output_sharded")),
    Row(r"--policy mdt", **trains("output_dit_mdt", TRAINING.replace("MDT_Ti_2", "DiT_Ti_2"))),
    Row(r"^bash run\.sh$", elsewhere="test_learning.py runs it"),
    Row(
        r"^OBJECTIVE=flow bash run\.sh$",
        elsewhere="test_launch_scripts.py sees the flag, test_learning.py (slow) runs it",
    ),
    Row(r"^bash run\.sh --shapes$", elsewhere="test_latent_path.py goes its way, test_learning.py (slow) runs it"),
    Row(r"^bash tests/run\.sh$", elsewhere="it is what runs the tests"),
    Row(r"^python scripts/make_api_page\.py", elsewhere="test_make_api_page.py builds a part of the pages"),
    Row(r"^python scripts/demo\.py", elsewhere="test_demo_in_browser.py opens the page, where gradio is installed"),
    Row(r"^pip install", elsewhere="tests/run.sh installs the package and its extras"),
    Row(r"^python infer_mdt\.py$", flags=PICTURES, makes="sample.png", without="mdt_xl2_v1_ckpt.pt"),
    Row(r"^source \.venv/bin/activate$", elsewhere="test_launch_scripts.py sees run.sh say it"),
    Row(r"^DATA_PATH=\S+ bash run\.sh --max_steps 400000$", elsewhere="first link of the chain below"),
    Row(r"^DATA_PATH=\S+ bash run\.sh$", elsewhere="first link of the chain below, which ends it"),
    Row(r"torch\.distributed\.launch .*image_train\.py", **trains("output_mdt_s2"), without="output_mdt_s2"),
    Row(
        r"bash run_ddp_master\.sh$",
        **trains("output_mdt_ti2"),
        environment={**SMALL_SHELL, "MASTER_ADDR": "127.0.0.1"},
        beside=r"bash run_ddp_worker\.sh",
    ),
    Row(r"RANK=1 bash run_ddp_worker\.sh$", elsewhere="runs beside the master"),
    Row(r"^MODEL_PATH=\S+ bash run_sample\.sh$", elsewhere="second link of the chain below"),
    Row(
        r"torch\.distributed\.launch .*image_sample\.py",
        flags=f"{SAMPLING} {PUBLISHED}",
        makes=f"output_mdt_xl2_eval/samples_4x{SIDE}x{SIDE}x3.npz",
    ),
    Row(r"^python evaluations/evaluator\.py \.\./dataeval/\S+ output_\S+$", says="Recall: "),
    Row(
        r"^python infer_mdt\.py --labels 207,360",
        flags=f"{PICTURES} {PUBLISHED} --image_size {SIDE}",
        makes="dogs_and_otters.png",
    ),
    Row(
        r"^python infer_mdt\.py --labels .golden retriever,otter. --seed",
        flags=f"{PICTURES} {PUBLISHED} --image_size {SIDE}",
        makes="sample.jpg",
    ),
    Row(
        r"^python infer_mdt\.py --labels 207 --sweep",
        flags=f"{PICTURES} {PUBLISHED} --image_size {SIDE}",
        makes="weights.png",
    ),
    Row(
        r"^python infer_mdt\.py --image photo\.png --mask mask\.png --labels 207",
        flags=f"{PICTURES} {PUBLISHED} --image_size {SIDE}",
        makes="sample.jpg",
    ),
    # docs/data.md
    Row(r"^OPENAI_LOGDIR=output_flowers DATA_PATH=", elsewhere="test_archives.py and test_remote_tars.py read them"),
    Row(r"--class_from filename", **trains("output_flat"), says="12 images, 3 classes (n01440764, "),
    Row(
        r"--init_from mdt_xl2_v1_ckpt\.pt --max_steps 100000$",
        **trains("output_flowers"),
        says="label table: 1 of 2 classes are known to mdt_xl2_v1_ckpt.pt by name (daisy); the others start anew",
        without="output_flowers",
    ),
    Row(
        r"^python scripts/check_data\.py",
        flags=f"--num_workers 0 --image_size {SIDE}",
        makes="imagenet_bad_files.txt",
        says="12 images, 3 classes (n01440764, ",
    ),
    Row(r"/landscapes --class_cond False", **trains("output_landscapes"), says="12 images, without classes"),
    Row(r"make_dataset\.py /dataset/flowers flowers\.zip$", makes="flowers.zip", says="flowers.zip: "),
    Row(
        r"make_dataset\.py flowers\.zip .*\.tar",
        elsewhere="scripts/test_make_dataset.py writes archives, and resizes images",
    ),
    Row(
        r"--normalize channel",
        flags=f"{ENCODING} --vae_path $TINY_VAE --num_workers 1",
        makes="latents_flowers256/latents.json",
    ),
    Row(r"--features dino\.pt2", elsewhere="data/test_exported_features.py keeps the features of a tiny network"),
    Row(
        r"encode_latents\.py (?!.*--normalize|.*--features|.*imagenet512)",
        flags=f"{ENCODING} --vae_path $TINY_VAE --num_workers 1",
        makes="latents_imagenet256/latents.json",
        without="latents_imagenet256",
    ),
    Row(
        r"train_autoencoder\.py",
        flags=f"--image_size {SIDE} --steps 2 --num_workers 0 --device cpu",
        makes="autoencoder_flowers64/config.json",
        says="autoencoder_flowers64",
    ),
    Row(
        r"image_train\.py --data_dir latents_imagenet512|--image_size 64 --vae_path none",
        elsewhere="e2e/test_resolutions.py runs both",
    ),
    Row(r"imagenet512\.zip", elsewhere="e2e/test_resolutions.py resizes and encodes"),
    Row(r"--data_dir latents_imagenet256", **trains("output_latents"), says="12 images, 3 classes (n01440764, "),
    # docs/training.md
    Row(
        r"^NUM_GPUS=4 .*bash run\.sh",
        **trains("output_mdt_s2", "--max_steps 1 --preview_samples 0 --vae_path $TINY_VAE --device cpu"),
        environment=SMALL_SHELL,
        without="output_mdt_s2",
    ),
    Row(
        r"--eval_interval 50000",
        flags=f"{TRAINING} --eval_interval 1 --eval_num_samples 4 --eval_sampling_steps 2 --eval_backend tensorflow",
        makes="output_mdt_s2/evaluation/000001/report.json",
        says="the best so far",
        without="output_mdt_s2",
    ),
    Row(r"^python scripts/read_digits\.py --graph", makes="digits.pb", says="held-back real digits read right"),
    Row(
        r"--eval_graph digits\.pb",
        flags="--lr_anneal_steps 2 --eval_interval 2 --eval_num_samples 4 --eval_sampling_steps 2 --num_workers 0",
        makes="output_digits/best.json",
        without="output_digits",
    ),
    Row(
        r"(image_sample|infer_mdt)\.py .*--guide_from (checkpoint|path_drop|masked|routed)",
        elsewhere="sampling/test_guides.py samples with each kind",
    ),
    Row(r"image_train\.py .*--preview_guide_from", elsewhere="test_train_util.py draws a preview of each kind"),
    Row(r"--ema_power 0\.05,0\.10$", elsewhere="runs/test_posthoc_ema.py trains with the flag"),
    Row(
        r"posthoc_ema\.py .*--std|--model_path output_mdt_s2_ema/posthoc_0\.07\.pt",
        elsewhere="runs/test_posthoc_ema.py makes the file, and samples it",
    ),
    Row(r"--sweep guide_from=null_label", elsewhere="sampling/test_gallery.py sweeps over the kinds"),
    Row(r"^python scripts/posthoc_ema\.py .*--sweep", elsewhere="sampling/test_scored_sets.py scores a series"),
    Row(r"^python scripts/guidance_sweep\.py", elsewhere="sampling/test_scored_sets.py scores each weight"),
    Row(
        r"^python scripts/compare_objectives\.py", elsewhere="scripts/test_compare_objectives.py runs it with few steps"
    ),
    Row(r"^python scripts/study\.py", elsewhere="scripts/test_study.py runs it with two arms and few steps"),
    Row(r"^python scripts/fid_curve\.py", makes="fid_curve.svg"),
    Row(r"^python scripts/on_track\.py", says="are in the band of"),
    Row(r"^for seed in 0 1 2; do", elsewhere="the digits' training of run.sh, which test_learning.py runs"),
    Row(r"^python scripts/make_card\.py", makes="my_recipe.json"),
    Row(
        r"torchrun --standalone .*image_train\.py .*--batch_size 32$",
        **trains("output_mdt_s2"),
        without="output_mdt_s2",
    ),
    Row(
        r"--microbatch 32",
        **trains("output_mdt_s2", TRAINING + " --batch_size 4 --microbatch 2"),
        without="output_mdt_s2",
    ),
    Row(r"mpiexec", **trains("output_mdt_s2"), without="output_mdt_s2"),
    Row(r"torchrun --nnodes=2", **trains("output_mdt_xl2"), without="output_mdt_xl2"),
    Row(r"srun", **trains("output_mdt_xl2"), without="output_mdt_xl2"),
    Row(
        r"--resume_checkpoint \S+/model400000\.pt", **trains("output_longer", f"{TRAINING} --max_steps 400001", 400001)
    ),
    Row(
        r"--freeze ",
        **trains("output_flowers_frozen", TRAINING),
        says="frozen: ",
    ),
    Row(
        r"--interpolate_pos True",
        **trains("output_mdt_xl2_512", f"{TRAINING} --image_size {2 * SIDE}"),
        says="they are resized, and such a model has to be trained on",
    ),
    # docs/checkpoints.md
    Row(r"--model SiT_XL_2", elsewhere="runs/test_family_defaults.py samples such a file"),
    Row(
        r"convert_checkpoint\.py .*--out mdt_xl2/",
        flags="--vae_path $TINY_VAE",
        makes="mdt_xl2/config.json",
        says="mdt_xl2_v1.safetensors",
    ),
    Row(
        r"convert_checkpoint\.py .*--out mdt_xl2_diffusers",
        flags="--vae_path $TINY_VAE",
        makes="mdt_xl2_diffusers/model_index.json",
    ),
    Row(
        r"convert_checkpoint\.py .*--diffusers_class dit_pipeline",
        flags="--vae_path $TINY_VAE",
        makes="dit_xl2_diffusers/model_index.json",
    ),
    # docs/sampling.md
    Row(
        r"torchrun --standalone .*image_sample\.py",
        flags=SAMPLING,
        makes=f"output_mdt_s2_eval/samples_4x{SIDE}x{SIDE}x3.npz",
    ),
    Row(r"--class_cond False --num_samples 16", flags=SAMPLING, makes=f"mdt-*/samples_4x{SIDE}x{SIDE}x3.npz"),
    Row(
        r"--use_ddim True --num_sampling_steps 50",
        flags=f"{SAMPLING} {PUBLISHED}",
        makes=f"mdt-*/samples_4x{SIDE}x{SIDE}x3.npz",
    ),
    Row(r"evaluator\.py flowers256\.npz", makes="output_flowers_eval/scores.json", says="Recall: "),
    Row(
        r"make_dataset\.py builtin:shapes-test|lower_half\.png",
        elsewhere="test_make_dataset.py and test_latent_path.py do the same with fewer images and steps",
    ),
    Row(r"^python infer_mdt\.py .* --out flowers\.png", flags=PICTURES, makes="flowers.png"),
    Row(r"--sampler unipc", flags=SAMPLING, makes=f"mdt-*/samples_4x{SIDE}x{SIDE}x3.npz"),
    Row(r"--guidance interval", flags=SAMPLING, makes=f"mdt-*/samples_4x{SIDE}x{SIDE}x3.npz"),
    Row(r"--image photo\.png --mask mask\.png --labels tulip", flags=PICTURES, makes="filled.png"),
    Row(r"^python infer_mdt\.py .*--sweep cfg_scale=1,2,4,8 ", flags=PICTURES, makes="guidance.png"),
    Row(r"^python infer_mdt\.py .*--sweep labels=", flags=PICTURES, makes="classes.png"),
    Row(r"^python infer_mdt\.py .*--out denoising\.gif", flags=PICTURES, makes="denoising.gif"),
    Row(r"visualize\.py reconstruction", flags=PICTURES, makes="reconstruction.png"),
    Row(r"visualize\.py relative_bias", makes="relative_bias.png", says="white is 0, full red"),
    # evaluations/README.md
    Row(r"evaluator\.py .* --backend torch$", elsewhere="test_evaluator_torch.py runs it on a full-size graph"),
    Row(
        r"make_reference\.py /dataset/flowers",
        flags=f"--image_size {SIDE} --no_cache",
        makes="REF_FLOWERS.npz",
    ),
    Row(r"--features classify_image_graph_def\.pb", says="KID (classify_image_graph_def): "),
    Row(r"--kid --ci 20", flags="--ci 2", makes="report.html", says="KID: "),
    Row(r"^python evaluations/evaluator\.py REF\.npz SAMPLE\.npz --out", makes="report.json", says="Recall: "),
]


def shrunk(text, row):
    for pattern, replacement in SHRINK:
        text = re.sub(pattern, replacement, text)
    return f"{text} {row.flags}".strip()


def rows_of(text):
    return [row for row in TABLE if re.search(row.pattern, text)]


RUN_HERE = [text for text in COMMANDS if not any(row.elsewhere for row in rows_of(text))]


# What they run on


@pytest.fixture(scope="module")
def images_by_name(module_folder):
    """What /dataset holds: ImageNet in folders, ADM's flat folder, one's own classes, images without any."""
    root = module_folder("dataset")
    colours = make_colour_folder(root / "imagenet", per_class=4)
    wordnet_ids = dict(zip(COLOURS, ("n01440764", "n01443537", "n01484850"), strict=True))
    for colour, wordnet_id in wordnet_ids.items():
        (colours / colour).rename(colours / wordnet_id)
    for name in ("imagenet_flat", "landscapes"):
        (root / name).mkdir()
    for path in sorted(colours.glob("*/*.png")):
        Image.open(path).save(root / "imagenet_flat" / f"{path.parent.name}_{path.stem}.JPEG")
        shutil.copy(path, root / "landscapes" / f"{path.parent.name}-{path.name}")
    for flower, wordnet_id in (("daisy", "n01440764"), ("tulip", "n01443537")):
        shutil.copytree(colours / wordnet_id, root / "flowers" / flower)
    return root


@pytest.fixture(scope="module")
def stub_graph(module_folder):
    path = module_folder("graph") / "classify_image_graph_def.pb"
    script = GOLDENS / "evaluator" / "stub_graph.py"
    done = run_command([sys.executable, str(script), str(path)], environment(""))
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def models(module_folder, images_by_name, tiny_vae):
    """Trained models under their documented names: two of one's own, and a file as the published one is."""
    root = module_folder("models")
    with pytest.MonkeyPatch.context() as patch:
        for name, data, step in (("output_mdt_s2", "imagenet", 400000), ("output_flowers", "flowers", 100000)):
            flags = TRAINING.replace("$TINY_VAE", str(tiny_vae)).split()
            flags += ["--mask_ratio", "0.3", "--decode_layer", "2", "--data_dir", images_by_name / data]
            assert call(patch, "scripts/image_train.py", root / name, *flags) == 0
            manifest = json.loads((root / name / "checkpoint000001.json").read_text())
            for path in root.glob(f"{name}/*000001.*"):
                path.rename(path.with_name(path.name.replace("000001", str(step))))
            files = {file.replace("000001", str(step)): facts for file, facts in manifest["files"].items()}
            write_json(root / name / f"checkpoint{step}.json", {**manifest, "step": step, "files": files})
            (root / name / "progress.csv").unlink()
        flags = ["--data_dir", images_by_name / "imagenet", "--vae_path", tiny_vae]
        flags += ["--out", root / "latents_imagenet256", *ENCODING.split()]
        assert call(patch, "scripts/encode_latents.py", root, *flags) == 0
    published = MODELS["MDT_Ti_2"](input_size=SIDE // 8, num_classes=1000, decode_layer=2, mask_ratio=0.3)
    torch.save(published.state_dict(), root / "mdt_xl2_v1_ckpt.pt")
    baseline = MODELS["DiT_Ti_2"](input_size=SIDE // 8, num_classes=1000)
    torch.save(baseline.state_dict(), root / "DiT-XL-2-256x256.pt")
    return root


def log_of_card():
    """The log of a run whose losses are the means of the digits' card."""
    card = json.loads((REPO / "docs" / "recipes" / "digits.json").read_text(encoding="utf-8"))
    losses = {name: column["mean"] for name, column in card["columns"].items() if "loss" in name}
    lines = [",".join(["step", "samples", "images_per_second", *losses])]
    for i, step in enumerate(card["columns"]["loss"]["steps"]):
        lines.append(",".join(map(str, [step, 64 * step, 100, *(means[i] for means in losses.values())])))
    return "\n".join(lines) + "\n"


@pytest.fixture
def workspace(tmp_path, images_by_name, stub_graph, models):
    """A folder like the repository's, with everything in it and beside it that the documents speak of."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for path in REPO.iterdir():
        if path.name in ("scripts", "evaluations", "docs", "infer_mdt.py") or path.suffix == ".sh":
            (folder / path.name).symlink_to(path)
    (folder / stub_graph.name).symlink_to(stub_graph)
    for path in models.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    (folder / "output_mdt_xl2").mkdir()
    shutil.copy(models / "mdt_xl2_v1_ckpt.pt", folder / "output_mdt_xl2")
    pixels = np.random.default_rng(0).integers(0, 256, (20, SIDE, SIDE, 3), dtype=np.uint8)
    (tmp_path / "dataeval").mkdir()
    for name in ("../dataeval/VIRTUAL_imagenet256_labeled", "flowers256", "REF"):
        np.savez(folder / f"{name}.npz", arr_0=pixels)
    for name in ("output_flowers_eval", "output_mdt_xl2_eval"):
        (folder / name).mkdir()
        np.savez(folder / name / f"samples_12x{SIDE}x{SIDE}x3.npz", arr_0=pixels[:12])
    np.savez(folder / "SAMPLE.npz", arr_0=pixels[:12])
    (folder / "digits.pb").symlink_to(stub_graph)
    np.savez(folder / "digits_test.npz", arr_0=pixels[:, :8, :8])
    for name in ("output_digits", "output_seed0", "output_seed1", "output_seed2"):
        (folder / name).mkdir()
        shutil.copy(folder / "output_mdt_s2" / "config.json", folder / name)
        (folder / name / "progress.csv").write_text(log_of_card())
    Image.fromarray(pixels[0]).save(folder / "photo.png")
    Image.fromarray(np.where(np.arange(SIDE) < 20, 255, 0).astype(np.uint8)[None].repeat(SIDE, axis=0)).save(
        folder / "mask.png"
    )
    return folder


SRUN = """#!/bin/bash
# Two processes with the variables that SLURM's srun sets.
while [[ "$1" == -* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost SLURM_JOB_ID=$((MASTER_PORT % 50000))
unset MASTER_PORT
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & processes+=($!); done
for process in "${processes[@]}"; do wait "$process" || exit; done
"""


def run_here(text, workspace, images_by_name, tiny_vae, **variables):
    """A command in the workspace, by the shell, with this Python as ``python``, warm but under mpiexec."""
    tools = workspace.parent / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "srun").write_text(SRUN)
    (tools / "srun").chmod(stat.S_IRWXU)
    variables = {"OPENAI_LOGDIR": "", "TINY_VAE": tiny_vae, "DATA": images_by_name} | variables
    env = environment(variables.pop("OPENAI_LOGDIR"), TF_CPP_MIN_LOG_LEVEL=3, **variables)
    folders = [
        tools,
        *([warm_python()] if warm_python() and "mpiexec" not in text else []),
        Path(sys.executable).parent,
    ]
    env["PATH"] = os.pathsep.join([*map(str, folders), env["PATH"]])
    env["VIRTUAL_ENV"] = env.get("VIRTUAL_ENV") or sys.prefix
    return run_command(["bash", "-euo", "pipefail", "-c", text], env, cwd=workspace, timeout=TIMEOUT)


# The tests


def test_every_documented_command_has_one_row_and_every_row_a_command():
    unclear = [text for text in COMMANDS if len(rows_of(text)) != 1]
    assert not unclear, "give each of these one row of TABLE, so that it is run:\n" + "\n".join(unclear)
    unused = [row.pattern for row in TABLE if not any(re.search(row.pattern, text) for text in COMMANDS)]
    assert not unused, f"rows of commands that are documented nowhere: {unused}"


@pytest.mark.e2e
@pytest.mark.parametrize("text", RUN_HERE, ids=lambda text: text[:70])
def test_a_documented_command_runs(text, workspace, images_by_name, tiny_vae):
    [row] = rows_of(text)
    if "mpiexec" in text:
        pytest.importorskip("mpi4py", reason="the processes find each other through mpi4py")
        if not (Path(sys.executable).parent / "mpiexec").exists() and not shutil.which("mpiexec"):
            pytest.skip("no mpiexec")
    if row.without:
        path = workspace / row.without
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    port = free_port()
    commands = [text, *(other for other in COMMANDS if row.beside and re.search(row.beside, other))]
    # PET_MASTER_PORT: the launcher's own variable, for commands that leave the port at its default.
    variables = {"MASTER_PORT": port, "PET_MASTER_PORT": port} | row.environment
    if "torchrun" in text or text.startswith("python"):
        variables["MASTER_ADDR"] = "127.0.0.1"
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(run_here, shrunk(command, row), workspace, images_by_name, tiny_vae, **variables)
            for command in commands
        ]
    for command, job in zip(commands, jobs, strict=True):
        done = job.result()
        assert done.returncode == 0, f"{shrunk(command, row)}\n{done.stdout}{done.stderr}"
        assert row.says in done.stdout, done.stdout
    if row.makes:
        assert list(workspace.glob(row.makes)), sorted(workspace.glob("*/*"))


@pytest.mark.parametrize("status, signalled, requeues", [(75, True, 1), (0, True, 0), (0, False, 0), (1, False, 0)])
def test_the_batch_job_of_slurm_queues_itself_again_after_it_was_told_to_save(tmp_path, status, signalled, requeues):
    [script] = blocks(REPO / "docs" / "training.md", "sh")
    told = "kill -USR1 $PPID\nwhile true; do sleep 0.02; done" if signalled else f"exit {status}"
    stubs = {
        "srun": f'trap "exit {status}" USR1\necho $$ > srun.pid\necho "$*" > srun.txt\n{told}',
        "scancel": '[ "$*" = "--signal=USR1 7" ] && kill -USR1 $(cat srun.pid)',
        "scontrol": 'echo "$*" >> scontrol.txt',
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    (tmp_path / "train.sh").write_text(script)
    env = environment("", SLURM_JOB_ID=7, PATH=f"{tmp_path}:{os.environ['PATH']}")
    done = run_command(["bash", "train.sh"], env, cwd=tmp_path, timeout=20)
    assert (done.returncode, done.stderr) == (status, "")
    queued = tmp_path / "scontrol.txt"
    assert (queued.read_text().splitlines() if queued.exists() else []) == ["requeue 7"] * requeues
    [interactive] = [text for text in COMMANDS if " srun " in text]
    training = "python scripts/image_train.py .* --batch_size 16"
    started = (tmp_path / "srun.txt").read_text()
    assert re.findall(training, started) == re.findall(training, interactive) != []


# Their programs are parts of a training, and run by test_change_one_thing.py, test_objectives_end_to_end.py and others.
PARTS = ("change_one_thing.md", "objectives.md", "policies.md")
PROGRAMS = [page for page in PAGES if blocks(page, "python") and page.name not in PARTS]


def run_program(text, **replacements):
    """A documented program, with each of the replaced words in it. Returns its names."""
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, str(new))
    names = {}
    exec(compile(text, "a documented program", "exec"), names)
    return names


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.name)
def test_a_documented_python_program_runs(page, images_by_name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    programs = [program for program in blocks(page, "python") if "/dataset/" in program]
    assert programs
    for program in programs:
        run_program(program, **{"/dataset/": f"{images_by_name}/", "256": SIDE, "10000": 6})
    with np.load(tmp_path / f"flowers{SIDE}.npz") as file:
        assert file["arr_0"].shape == (6, SIDE, SIDE, 3) and file["arr_0"].dtype == np.uint8


def test_the_documented_programs_export_a_network_and_read_its_features(
    images_by_name, tiny_vae, tmp_path, monkeypatch
):
    export, read = [text for text in blocks(REPO / "docs" / "data.md", "python") if "/dataset/" not in text]
    monkeypatch.chdir(tmp_path)
    run_program(export, **{"256": SIDE, "224": 28})["export"](torch.nn.AvgPool2d(14), "dino.pt2")
    flags = ["--data_dir", images_by_name / "flowers", "--vae_path", tiny_vae, "--out", "latents_flowers_dino"]
    flags += [*ENCODING.split(), "--num_workers", 0, "--features", "dino.pt2", "--trust_features", "True"]
    assert call(monkeypatch, "scripts/encode_latents.py", tmp_path, *flags) == 0
    names = run_program(
        read, **{"latents_flowers256_dino": "latents_flowers_dino", "256": SIDE, "batch_size=32": "batch_size=3"}
    )
    assert names["extra"]["features"].shape == (3, 3, 2, 2)


@pytest.mark.e2e
def test_the_published_chain_in_one_output_folder(workspace, images_by_name, tiny_vae):
    """Train with run.sh, sample twice and score twice with run_sample.sh, as the README has it."""
    [training] = [text for text in COMMANDS if re.search(r"^DATA_PATH=\S+ bash run\.sh --max_steps 400000$", text)]
    [sampling] = [text for text in COMMANDS if re.search(r"^MODEL_PATH=\S+ bash run_sample\.sh$", text)]
    variables = {**SMALL_SHELL, "NUM_GPUS": 2, "MASTER_PORT": free_port(), "OPENAI_LOGDIR": "output_chain"}
    flags = "--max_steps 2 --preview_samples 2 --preview_steps 2 --vae_path $TINY_VAE --device cpu --num_workers 0"
    done = run_here(shrunk(training, Row("", flags=flags)), workspace, images_by_name, tiny_vae, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 images, 3 classes (n01440764, n01443537, n01484850)" in done.stdout
    weights = "output_chain/ema_0.9999_000002.pt"
    variables |= {"NUM_SAMPLES": 6, "NUM_SAMPLING_STEPS": 2, "MASTER_PORT": free_port()}
    variables |= {"REFERENCE": "../dataeval/VIRTUAL_imagenet256_labeled.npz", "GRAPH": "classify_image_graph_def.pb"}
    command = re.sub(r"MODEL_PATH=\S+", f"MODEL_PATH={weights}", sampling)
    done = run_here(f"{command} --few_steps True --device cpu", workspace, images_by_name, tiny_vae, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    chain, name = workspace / "output_chain", f"samples_6x{SIDE}x{SIDE}x3"
    printed = re.findall(r"^(.*): ([-\d.e]+)$", done.stdout, re.MULTILINE)
    reports = [json.loads((chain / f"scores_{kind}.json").read_text()) for kind in ("guided", "unguided")]
    assert [found for found, _ in printed] == 2 * METRICS
    assert [float(value) for _, value in printed] == [r["metrics"][m] for r in reports for m in METRICS]
    assert all(np.isfinite(report["metrics"][metric]) for report in reports for metric in METRICS)
    guidance = [report["manifest"]["settings"]["guidance"] for report in reports]
    assert guidance[0]["cfg_scale"] == 3.8 and guidance[1] is None
    for report in reports:
        assert report["manifest"]["settings"]["weights"]["file"] == Path(weights).name
        assert report["sample"]["N"] == 6 and report["reference"]["N"] == 20
    # Everything of the chain is there: the guided set was moved aside, the training untouched.
    for left in (f"{name}.npz", f"{name}_1.npz", "manifest.json", "manifest_1.json", "checkpoint000002.json"):
        assert (chain / left).is_file(), left
    assert json.loads((chain / "manifest_1.json").read_text()) | {"samples": f"{name}.npz"} == reports[0]["manifest"]


# The troubleshooting page


def message(node):
    """A message in the source, with … for what is filled in; None for anything else."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    if not (isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))):
        return None
    return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts).replace("\n", " ")


def sources():
    folders = [REPO / "masked_diffusion", REPO / "evaluations"]
    names = (
        "image_train",
        "image_sample",
        "encode_latents",
        "train_autoencoder",
        "read_digits",
        "fid_curve",
        "guidance_sweep",
        "posthoc_ema",
        "on_track",
        "make_card",
        "check_data",
        "make_dataset",
        "demo",
        "make_api_page",
        "visualize",
        "convert_checkpoint",
        "study",
        "compare_objectives",
    )
    scripts = [REPO / f"scripts/{name}.py" for name in names]
    scripts += sorted((REPO / "scripts" / "studying").glob("*.py"))
    return [*(path for folder in folders for path in sorted(folder.rglob("*.py"))), *scripts, REPO / "infer_mdt.py"]


def quoted_messages():
    return re.findall(r"^\| `(.+?)` \|", TROUBLESHOOTING.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_message_has_a_cause_and_a_remedy_in_sentences():
    text = TROUBLESHOOTING.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `.+?` \| (.*?) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == len(quoted_messages())
    sentence = re.compile(r"[A-Z].*\.")
    assert not [cause for cause, _ in rows if not cause.endswith(".")]
    assert not [remedy for _, remedy in rows if not sentence.fullmatch(remedy) or "as it says" in remedy]


def finder(quote):
    """Whether a text has a quoted message; … stands for anything in both."""
    parts = quote.split("…")
    pattern, longest = re.compile(".*?".join(map(re.escape, parts))), max(parts, key=len)
    # Most texts do not have it, which is soon known.
    return lambda text: longest in text and pattern.search(text) is not None


def test_every_quoted_message_occurs_in_the_source():
    nodes = [node for path in sources() for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    templates = {text for node in nodes if node not in docstrings and (text := message(node))}
    quotes = quoted_messages()
    assert len(quotes) > 100
    gone = [quote for quote in quotes if not any(map(finder(quote), templates))]
    assert not gone, f"{TROUBLESHOOTING.name} quotes what nothing says: {gone}"


# Raised for callers of the functions, out of a command line's reach, or shown only inside another message.
NOT_FOR_USERS = """
betas: expected | crop fractions | the data set was opened for | has no order | hidden_size
must be at least 1 (images per process and step) | cannot be negative | must be between 0 and the number of ranks
this model has no null class | use_timesteps: | a sampling loop needs | so there are no images to read
no images to compute features of | statistics of different widths | a covariance needs | what arrived is not the graph
none of these folders can be written to | bytes arrived | of the .npy format | --data_dir: …
holds something else than its name says | expected uint8 images
pixels are none | perhaps a decompression bomb | times the other | pixels in floating point
"""


def test_every_message_for_users_is_on_the_page():
    quotes = [finder(quote) for quote in quoted_messages()]
    hidden = [text for line in NOT_FOR_USERS.strip().splitlines() for text in line.split(" | ")]
    kinds = (
        "ValueError",
        "NotNowError",
        "LoaderError",
        "FileNotFoundError",
        "PermissionError",
        "OSError",
        "ImportError",
        "ArgumentTypeError",
    )
    missing, used = [], set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            text, name = message(node.exc.args[0]), ast.unparse(node.exc.func).rpartition(".")[2]
            if text is None or name not in kinds:
                continue
            excused = [part for part in hidden if part in text]
            used.update(excused)
            if not excused and not any(quote(text) for quote in quotes):
                missing.append(f"{path.name}:{node.lineno} {text}")
    assert not missing, f"{TROUBLESHOOTING.name} does not explain:\n" + "\n".join(missing)
    assert not set(hidden) - used, "no such message any more"


def test_every_promise_names_tests_that_exist():
    [table] = re.findall(r"^## Promises\n(.*?)^## ", RELIABILITY.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    named = re.findall(r"`(test_\w+)(?:\.py)?`", table)
    files = list((REPO / "tests").rglob("test_*.py"))
    known = {path.stem for path in files} | {
        name
        for path in files
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) >= 12 and set(named) <= known


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#?)([^)]*)\)", text):
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), f"{page.name}: {target}"
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, f"{page.name}: {target}#{anchor}"
