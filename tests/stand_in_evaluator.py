"""The evaluator's command line without its libraries: a number for FID that is made of the samples' pixels.

EVALUATOR_FAILS: end with this sentence. EVALUATOR_SLEEPS: take so many seconds.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("reference", type=Path)
parser.add_argument("samples", type=Path)
parser.add_argument("--out", type=Path)
parser.add_argument("--backend")
parser.add_argument("--graph")
parser.add_argument("--no_cache", action="store_true")
options = parser.parse_args()
trial = options.out is None
if not trial:
    time.sleep(float(os.environ.get("EVALUATOR_SLEEPS", 0)))
if (sentence := os.environ.get("EVALUATOR_FAILS")) and not trial:
    sys.exit(f"evaluator.py: error: {sentence}")
with np.load(options.reference) as file:
    reference = file["arr_0"]
with np.load(options.samples) as file:
    pixels = file["arr_0"].astype(np.int64)
if not trial:
    order = np.arange(1, pixels.size + 1)
    metrics = {"FID": float((pixels.ravel() * order % 1009).sum()), "sFID": 2.0, "Inception Score": 3.0}
    if by_step := os.environ.get("EVALUATOR_SCORES"):  # "1=5,2=4": FID by step, which is the folder's name
        scores = dict(pair.split("=") for pair in by_step.split(","))
        metrics["FID"] = float(scores[str(int(options.samples.parent.name))])
    metrics |= {"Precision": None, "Recall": None, "N": len(reference)}
    options.out.write_text(json.dumps({"metrics": metrics, "launcher": os.environ.get("WORLD_SIZE")}))
