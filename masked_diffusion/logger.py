"""Write the numbers of a run to its log targets, the sinks. A resumed run appends rows to those that are there."""

import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from masked_diffusion.files import atomic_write, move_aside
from masked_diffusion.processes.standard_streams import failed_streams

Row = Mapping[str, float]
WHOLE_NUMBERS = ("step", "samples", "skipped", "eval_num_samples")
# What the table on the terminal shows; files have all numbers.
ON_THE_TERMINAL = (
    "step",
    "samples",
    "loss",
    "m_loss",
    "grad_norm",
    "skipped",
    "lr",
    "images_per_second",
    "bad_images",
    "eval_fid",
)


class Sink:
    """A log target. Rows have the same names during a whole run. NaN stands where there was nothing to average."""

    def row(self, values: Row) -> None:
        raise NotImplementedError

    def text(self, message: str) -> None:
        """Write a message, where a sink has more than rows."""

    def close(self) -> None:
        """End what is held open between rows."""


def named_folder(out: str, environ: Mapping[str, str] | None = None) -> str:
    """Return the output folder that ``--out`` names, else ``OPENAI_LOGDIR``; empty where neither names one."""
    return out or (os.environ if environ is None else environ).get("OPENAI_LOGDIR", "")


def output_folder(environ: Mapping[str, str] | None = None, out: str = "") -> Path:
    """Return :func:`named_folder` (``~`` expanded), or a new dated name in the working folder. Makes no folder."""
    if named := named_folder(out, environ):
        return Path(named).expanduser().absolute()
    return Path(time.strftime("mdt-%Y-%m-%d-%H-%M-%S")).absolute()


def _plain(values: Row) -> dict[str, int | float | None]:
    """Turn values into what a file shows: counts become integers, NaN becomes nothing."""
    return {
        name: None if math.isnan(value) else int(value) if name in WHOLE_NUMBERS else value
        for name, value in values.items()
    }


class HumanSink(Sink):
    """Write a table per row, and messages, to a text stream. names: of the numbers to show; None for all."""

    def __init__(self, stream: TextIO, names: Sequence[str] | None = None) -> None:
        self._stream = stream
        self._names = names

    def row(self, values: Row) -> None:
        cells = {
            name: str(value) if isinstance(value, int) else f"{value:.6g}"
            for name, value in _plain(values).items()
            if value is not None and (self._names is None or name in self._names)
        }
        name_width = max(len(name) for name in cells)
        value_width = max(len(value) for value in cells.values())
        rule = "-" * (name_width + value_width + 7)
        lines = [f"| {name:<{name_width}} | {value:<{value_width}} |" for name, value in cells.items()]
        self.text("\n".join([rule, *lines, rule]))

    def text(self, message: str) -> None:
        self._stream.write(message + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._stream is not sys.stdout:
            self._stream.close()


class RowsFile(Sink):
    """A file of rows that only grows.

    When a run resumes, opening takes out the rows of the steps that will run again, and lines that a full disk or a
    power loss has damaged. damaged: a message about such lines; empty where there are none. A subclass turns rows into
    text and text into rows.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        self._names: list[str] = []
        self.damaged = ""
        if start_step == 0:
            move_aside(path)
        elif path.exists():
            rows, num_damaged = self._read()
            if num_damaged:
                [former] = move_aside(path)
                self.damaged = (
                    f"{path.name}: {num_damaged} damaged lines are left out, as a full disk, a kill or a power loss "
                    f"leaves them; the file as it was is {former.name}"
                )
            self._rewrite([row for row in rows if int(row["step"]) <= start_step])

    def row(self, values: Row) -> None:
        plain = _plain(values)
        if self._names and not set(plain) <= set(self._names):
            # Another setting than before the resume (a mask ratio, say) logs other names.
            self._rewrite(self._read()[0], extra_names=list(plain))
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._render([plain], header=not self._names))
        except OSError:  # half a row may be there, which the next one must not go on
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)
            raise
        self._names = self._names or list(plain)

    def _rewrite(self, rows: list[dict[str, Any]], extra_names: Sequence[str] = ()) -> None:
        self._names = list(dict.fromkeys([*(name for row in rows for name in row), *extra_names]))
        with atomic_write(self._path) as file:
            file.write(self._render(rows, header=bool(self._names)).encode())

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        return self._parse(lines_of(self._path))

    def _render(self, rows: Sequence[Mapping[str, Any]], header: bool) -> str:
        raise NotImplementedError

    def _parse(self, lines: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
        """The rows of lines, and the number of lines that hold none."""
        raise NotImplementedError


def lines_of(path: Path) -> list[str]:
    """Read the lines of a text file. An empty line replaces a last line that is not whole.

    A number that was cut off would be another number. Bytes that are no text are replaced.
    """
    *lines, unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [*lines, ""] if unfinished else lines


def parse_csv_rows(lines: Sequence[str]) -> tuple[list[dict[str, str]], int]:
    """Parse rows of numbers under the names in the first line. Returns them, and how many lines are no rows."""
    names = lines[0].split(",") if lines else []  # names and numbers, which have no commas
    rows, num_damaged = [], 0
    for line in lines[1:]:
        cells = line.split(",")
        try:
            row = dict(zip(names, cells, strict=True))
            int(row["step"])
            [float(cell) for cell in cells if cell]
        except (ValueError, KeyError):
            num_damaged += 1
        else:
            rows.append(row)
    return rows, num_damaged


class CSVSink(RowsFile):
    """``progress.csv``: one column per name."""

    def _render(self, rows: Sequence[Mapping[str, Any]], header: bool) -> str:
        out = io.StringIO(newline="")
        names = self._names or [name for row in rows[:1] for name in row]
        writer = csv.DictWriter(out, names, restval="")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def _parse(self, lines: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
        return parse_csv_rows(lines)


class JSONSink(RowsFile):
    """``progress.json``: one JSON object per line."""

    def _render(self, rows: Sequence[Mapping[str, Any]], header: bool) -> str:
        # JSON has no word for infinity.
        finite = [{k: None if v in (math.inf, -math.inf) else v for k, v in row.items()} for row in rows]
        return "".join(json.dumps(row) + "\n" for row in finite)

    def _parse(self, lines: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
        rows: list[dict[str, Any]] = []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                int(row["step"])
                rows.append(row)
        return rows, len(lines) - len(rows)


class TensorBoardSink(Sink):
    """Event files in ``tb/``, one scalar per name.

    Written with TensorBoard's own record writer: torch's SummaryWriter imports TensorFlow wherever it is installed.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000:020d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        # Steps from here on are about to run again: whatever an earlier file has of them does not count.
        self._write(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()

    def row(self, values: Row) -> None:
        scalars = [
            self._summary.Value(tag=name, simple_value=value) for name, value in values.items() if not math.isnan(value)
        ]
        self._write(step=int(values["step"]), summary=self._summary(value=scalars))

    def close(self) -> None:
        self._file.close()


class WandbSink(Sink):
    """A run of Weights & Biases, which keeps its files in the output folder and goes on when that is resumed.

    It shows no step twice: of those that run again after a resume, it keeps the first numbers. Raises ValueError where
    it cannot start, as without an account; ``WANDB_MODE=offline`` needs none.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        import wandb

        id_file = folder / "wandb_id.txt"
        if start_step == 0 or not id_file.is_file():
            with atomic_write(id_file) as file:
                file.write(secrets.token_hex(8).encode())
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "masked-diffusion"),
                name=folder.name,
                id=id_file.read_text().strip(),
                dir=folder,
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"OPENAI_LOG_FORMAT wandb: it cannot start ({reason}); log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error

    def row(self, values: Row) -> None:
        numbers = {name: value for name, value in values.items() if not math.isnan(value)}
        self._run.log(numbers, step=int(values["step"]))

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[Path, int], Sink]] = {
    "stdout": lambda folder, start_step: HumanSink(sys.stdout, ON_THE_TERMINAL),
    "log": lambda folder, start_step: HumanSink(
        (folder / "log.txt").open("a", encoding="utf-8", errors="backslashreplace")
    ),
    "csv": lambda folder, start_step: CSVSink(folder / "progress.csv", start_step),
    "json": lambda folder, start_step: JSONSink(folder / "progress.json", start_step),
    "tensorboard": lambda folder, start_step: TensorBoardSink(folder / "tb", start_step),
    "stdout-all": lambda folder, start_step: HumanSink(sys.stdout),
    "wandb": WandbSink,
}
USUAL_SINKS = ("stdout", "log", "csv", "json", "tensorboard")


def chosen_sinks(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the sinks that ``OPENAI_LOG_FORMAT`` names, a comma list; unset: the usual ones.

    Raises ValueError for an unknown one, and for one whose library is not installed.
    """
    text = (os.environ if environ is None else environ).get("OPENAI_LOG_FORMAT", "")
    names = [name.strip() for name in text.split(",") if name.strip()] or list(USUAL_SINKS)
    for name in names:
        if name not in SINKS:
            raise ValueError(f"OPENAI_LOG_FORMAT {text}: {name} is unknown; choose some of {', '.join(SINKS)}")
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"OPENAI_LOG_FORMAT {text}: wandb is not installed; install it with: pip install -e '.[wandb]'"
        )
    return names


class Logger:
    """All sinks of a run. Give sinks to rank 0 alone; other ranks log nowhere."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = list(sinks)
        self._told: set[str] = set()  # what is known not to be written

    @classmethod
    def open(cls, folder: Path, start_step: int, names: Sequence[str] | None = None) -> "Logger":
        """Open sinks in a folder, for a run that goes on after ``start_step``. Makes the folder.

        names: of the sinks; None takes those of the environment.
        """
        names = chosen_sinks() if names is None else names
        folder.mkdir(parents=True, exist_ok=True)
        sinks = [SINKS[name](folder, start_step) for name in names]
        logger = cls(sinks)
        for sink in sinks:
            if isinstance(sink, RowsFile) and sink.damaged:
                logger.text(sink.damaged)
        return logger

    def row(self, values: Row) -> None:
        """Log one row of numbers; ``step`` must be among them."""
        for sink in self._sinks:
            with self._surviving(sink):
                sink.row(values)
        self._tell_of_streams()

    def text(self, message: str) -> None:
        """Log a message for people."""
        for sink in self._sinks:
            with self._surviving(sink):
                sink.text(message)
        self._tell_of_streams()

    @contextlib.contextmanager
    def _surviving(self, sink: Sink) -> Iterator[None]:
        """A full disk costs log lines, not the run."""
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            message = f"{type(sink).__name__} could not write: {error}"
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stderr.write(message + "\n")
            self._tell(type(sink).__name__, message)

    def _tell_of_streams(self) -> None:
        for name, error in failed_streams().items():
            self._tell(name, f"{name} cannot be written ({error}); the run goes on")

    def _tell(self, who: str, message: str) -> None:
        """Say once in all that can still be written that something cannot."""
        if who not in self._told:
            self._told.add(who)
            self.text(message)

    def close(self) -> None:
        for sink in self._sinks:
            with self._surviving(sink):
                sink.close()
