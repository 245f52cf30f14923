#!/usr/bin/env bash
# The published MDT-XL/2 training on NUM_NODE machines of GPU_PRE_NODE GPUs: this is the first machine's part.
# Start it here, and run_ddp_worker.sh on the others, with RANK the number of the machine (0 here).
# Settings are environment variables, which --help lists; arguments go to image_train.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/help.sh
source scripts/help.sh
help_if_asked run_ddp_master.sh scripts/ddp.sh scripts/published.sh scripts/launcher.sh -- "$@"

export MASTER_ADDR="${MASTER_ADDR:-$(hostname)}"
export RANK="${RANK:-0}"
# shellcheck source=scripts/ddp.sh
source scripts/ddp.sh
train_on_this_node "$@"
