# shellcheck shell=bash
# How run.sh and the run_ddp scripts start a training: a process that dies ends the others, and all start again from the
# last checkpoint, at most MAX_RESTARTS times. Signals reach the training, which has SHUTDOWN_SECONDS to save.

launcher=(python -m torch.distributed.launch --max-restarts="${MAX_RESTARTS:-3}")
if [[ $(python -m torch.distributed.launch --help) == *--signals-to-handle* ]]; then
  launcher+=(
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    --shutdown-timeout="${SHUTDOWN_SECONDS:-300}"
  )
fi
