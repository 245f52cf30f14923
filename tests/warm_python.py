"""A ``python`` whose processes begin with torch already imported, which is most of the time of a small program.

A server imports once. Each program is then a fork of it: a process of its own, with its own arguments, environment,
folder, standard streams, signals and exit status, that runs a file, ``-m MODULE`` or ``-c CODE`` as Python does.
Programs whose environment would make Python begin in another way, and other options, run under the real one.

It cannot show what happens while Python starts (tests/e2e/test_launchers.py does), and /proc tells the environment of
the server: tests that look for processes by theirs start real ones.
"""

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

IMPORTS = (
    "diffusers.models", "torch.distributed.elastic.multiprocessing", "scipy.stats", "scipy.linalg",
    "tensorboard.summary.writer.record_writer", "masked_diffusion.programs.image_train",
    "masked_diffusion.programs.image_sample",
)  # fmt: skip
# Variables that are heeded while Python or a library begins: all of these names, or that begin so.
EARLY = ("PYTHON", "LC_", "LANG", "LD_", "OMP_", "MKL_", "HF_", "MALLOC_")
FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")

# What stands in for ``python``: it hands its streams to the server, passes signals on, and ends as the program does.
CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
EARLY, THEN, FORWARDED = {early!r}, {then!r}, {forwarded!r}
arguments = sys.argv[1:]
program = arguments[1:] if arguments[:1] == ["-u"] else arguments
starts_as_usual = {{k: v for k, v in os.environ.items() if k.startswith(EARLY)}} == THEN
if not program or (program[0].startswith("-") and program[0] not in ("-m", "-c")) or not starts_as_usual:
    os.execv({python!r}, [{python!r}, *arguments])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = {{"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}}
server.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
server.sendall(json.dumps(request).encode() + b"\\n")
answer = server.makefile()
pid = int(answer.readline())
for name in FORWARDED:
    signal.signal(getattr(signal, name), lambda number, frame: os.kill(pid, number))
status = int(answer.readline())
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def early(environment):
    return {name: value for name, value in environment.items() if name.startswith(EARLY)}


class WarmPython:
    """The server. folder: holds ``python`` and ``torchrun``, for PATH."""

    def __init__(self, environment):
        self.folder = Path(tempfile.mkdtemp(prefix="warm"))  # short: the name of a socket may not be long
        address = str(self.folder / "socket")
        client = CLIENT.format(
            python=sys.executable, early=EARLY, then=early(environment), forwarded=FORWARDED, address=address
        )
        launcher = f'#!/bin/sh\nexec {self.folder}/python -m torch.distributed.run "$@"\n'
        for name, text in (("python", client), ("torchrun", launcher)):
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o700)
        command = [sys.executable, __file__, address, str(self.folder / "python")]
        # Its stdin ends when this process does, however that is.
        self._server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._server.stdout.readline() == b"ready\n"

    def close(self):
        self._server.communicate()


def next_program(address):
    """Serve. Returns, in a new process, the arguments of each program, which are to be run there."""
    assert len(os.listdir("/proc/self/task")) == 1  # a fork has no other threads, and waits for them in vain
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how the attendants end
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            if sys.stdin in select.select([server, sys.stdin], [], [])[0]:
                shutil.rmtree(Path(address).parent)
                os._exit(0)
            connection, _ = server.accept()
            if os.fork() == 0:
                break
            connection.close()
    with connection:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(3 * array.array("i").itemsize))
        streams = array.array("i", ancillary[0][2])
        request = json.loads(connection.makefile().readline())
        pid = os.fork()
        if pid:
            attend(pid, connection)
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    return request["arguments"]


def attend(pid, connection):
    """Tell the client its program's id and its end; end the program when the client is gone."""
    ended = os.pidfd_open(pid)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{pid}\n".encode())
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        for kill in (os.killpg, os.kill):  # the group, if it is one already
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def run(arguments):
    """As ``python ARGUMENTS`` does. Returns the exit status."""
    preemption._PARENT = os.getppid()  # read where it is imported
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    tempfile.tempdir = None
    if arguments[0] == "-u":
        arguments = arguments[1:]
        sys.stdout.reconfigure(write_through=True)
    if arguments[0] in ("-m", "-c"):
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], os.getcwd() if arguments[0] == "-m" else ""
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
    try:
        run_as_main(arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_as_main(arguments):
    if arguments[0] == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    address, sys.executable = sys.argv[1:]
    for name in IMPORTS:
        importlib.import_module(name)
    preemption = importlib.import_module("masked_diffusion.processes.preemption")
    gc.freeze()
    status = run(next_program(address))
    # As Python ends, but that nothing is taken down: that copies the memory of all that the server imported.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
