"""The warm ``python`` of the tests runs programs as the real one does."""

import os
import signal
import sys
import time

import pytest
from support import begin, environment, run_command, warm_python


@pytest.fixture(autouse=True)
def _needs_one():
    if warm_python() is None:
        pytest.skip("needs pidfd_open, which Linux has")


SHOW = """
import json, os, sys
print(json.dumps([sys.argv, sys.path[0], os.getcwd(), os.environ["COLOUR"], __name__]))
print("no", file=sys.stderr)
sys.exit(7)
"""


def warm(*words, folder=None, **variables):
    return run_command([str(warm_python() / "python"), *words], environment("", **variables), cwd=folder)


def test_arguments_streams_folder_environment_and_status_are_those_of_the_program(tmp_path):
    (tmp_path / "show.py").write_text(SHOW)
    for words in (["show.py", "--a b", "ü"], ["-m", "show", "1"], ["-c", SHOW, "x"]):
        done = warm(*words, folder=tmp_path, COLOUR="red")
        real = run_command([sys.executable, *words], environment("", COLOUR="red"), cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (real.returncode, real.stdout, real.stderr)


def test_a_program_that_fails_says_so():
    failed, killed = warm("-c", "raise ValueError('x')"), warm("-c", "import os; os.kill(os.getpid(), 9)")
    assert failed.returncode == 1 and failed.stderr.endswith("ValueError: x\n")
    assert killed.returncode == -signal.SIGKILL


def test_a_signal_reaches_the_program():
    code = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\nprint(1, flush=True)\n"
    process = begin([warm_python() / "python", "-c", code + "signal.pause()"], environment(""))
    assert process.stdout.readline() == "1\n"
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 5


def test_a_program_ends_with_who_started_it():
    code = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(1000)"
    process = begin([warm_python() / "python", "-c", code], environment(""))
    pid = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=10)
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)


def test_a_program_begins_with_torch_and_in_another_language_or_with_other_options_as_usual():
    code = "import sys; print('torch' in sys.modules)"
    assert warm("-c", code).stdout == "True\n"
    assert warm("-c", code, LC_ALL="C").stdout == warm("-X", "dev", "-c", code).stdout == "False\n"
