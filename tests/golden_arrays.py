"""Golden numbers, and the named random arrays they were computed from."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDENS = Path(__file__).parent / "goldens"
SEED = 1234


def golden_npz(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / name, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def golden_json(name: str) -> Any:
    return json.loads((GOLDENS / name).read_text())


def named_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"{SEED}:{name}".encode())))
    return generator.standard_normal(shape).astype(np.float32)


def set_golden_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Randomise a model: a fresh one returns zeros whatever its code does."""
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = torch.from_numpy(named_array(name, tuple(tensor.shape)) * 0.15)
    model.load_state_dict(state)
    return model


def assert_golden(actual: torch.Tensor | np.ndarray, expected: np.ndarray, rtol: float = 1e-4, atol: float = 1e-4):
    actual = actual.detach().cpu().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)
