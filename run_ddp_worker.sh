#!/usr/bin/env bash
# The published MDT-XL/2 training on several machines: the part of each machine but the first.
# Needs MASTER_ADDR (the first machine's name or address) and RANK (1, 2, ... for the second, third, ... machine).
# Settings are environment variables, which --help lists; arguments go to image_train.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/help.sh
source scripts/help.sh
help_if_asked run_ddp_worker.sh scripts/ddp.sh scripts/published.sh scripts/launcher.sh -- "$@"

: "${MASTER_ADDR:?set MASTER_ADDR to the name or address of the machine that runs run_ddp_master.sh}"
: "${RANK:?set RANK to the number of this machine: 1 for the second, 2 for the third, ...}"
# shellcheck source=scripts/ddp.sh
source scripts/ddp.sh
train_on_this_node "$@"
