from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# What stands beside the package in a checkout, and in the package's folder ``beside`` in a wheel, for the command mdt.
BESIDE = ("infer_mdt.py", "scripts/**/*.py", "evaluations/*.py", "docs/recipes/*.json")


class BuildWithScripts(build_py):
    """Copies the scripts into what is built; a package that is installed as ``-e`` finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        root = Path(__file__).resolve().parent
        for path in (path for pattern in BESIDE for path in sorted(root.glob(pattern))):
            target = Path(self.build_lib, "masked_diffusion", "beside", path.relative_to(root))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(path), str(target))


# On x86-64 Linux this TensorFlow also runs on the CPU alone; the evaluator imports it only when it computes features.
EVAL = ["tensorflow>=2.18", "scipy>=1.13"]
# The evaluator without TensorFlow: the 2015 Inception network as a torch module.
EVAL_TORCH = ["torch-fidelity>=0.4"]
# mpi4py needs an MPI library; PyPI's mpich wheel is one where the system has none.
MPI = ["mpi4py>=4.1"]
PLOT = ["matplotlib>=3.9"]
# The log target wandb.
WANDB = ["wandb>=0.19"]
# Images in parquet files.
PARQUET = ["pyarrow>=16"]
# The page of scripts/demo.py. It holds Pillow below 13, so the tests do without it, and skip what needs it.
DEMO = ["gradio>=6"]
# Pages of the docstrings, by scripts/make_api_page.py.
DOCS = ["pdoc>=15"]
# Run docs/tutorial.ipynb as Jupyter does.
NOTEBOOK = ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"]
TEST = [
    *EVAL,
    *EVAL_TORCH,
    *MPI,
    *PLOT,
    *WANDB,
    *PARQUET,
    *DOCS,
    *NOTEBOOK,
    "mpich>=4.2; sys_platform == 'linux'",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.9",
    "mypy>=1.11",
]

setup(
    name="masked-diffusion",
    version="0.1.0",
    description="Masked Diffusion Transformer: class-conditional image synthesis with masked latent modeling",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["masked_diffusion", "masked_diffusion.*"]),
    cmdclass={"build_py": BuildWithScripts},
    entry_points={"console_scripts": ["mdt = masked_diffusion.commands:main"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.9.1",
        "torchvision>=0.24.1",
        "timm>=1.0.9",
        "diffusers>=0.33",
        "safetensors>=0.4.5",
        "numpy>=2.0",
        "pillow>=10.3",
        "blobfile>=3.2",
        "tqdm>=4.66.3",
        "tensorboard>=2.18",
        "scikit-learn>=1.5",
        "scipy>=1.13",
    ],
    extras_require={
        "eval": EVAL,
        "eval-torch": EVAL_TORCH,
        "mpi": MPI,
        "plot": PLOT,
        "wandb": WANDB,
        "parquet": PARQUET,
        "demo": DEMO,
        "docs": DOCS,
        "test": TEST,
        "all": TEST,
    },
)
