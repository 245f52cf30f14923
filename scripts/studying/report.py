"""The report of a study: a page that needs no other file, a table of its runs, and what docs/study shows of it."""

import base64
import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from studying.plan import AGAIN, PLAIN, TREAD_FINALE, WEAKER, Run
from studying.settings import Study
from studying.verdicts import Verdict, judge, lack_of_power, pooled_deviation

from masked_diffusion.files import atomic_write

Results = Mapping[Run, dict[str, Any]]
TITLES = {
    WEAKER: "none, 60 % of the budget (control: must be worse)",
    AGAIN: "none, other seeds (control: must not differ)",
    TREAD_FINALE: "tread with a finale",
}
COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#999933", "#882255", "#888888")
SCALES = {"tflops": "training compute, TFLOPs (a multiply-add counts as one)", "seconds": "seconds of training"}
WIDTH, HEIGHT, LEFT, BOTTOM = 560, 340, 60, 45
STYLE = (
    "body{font:15px sans-serif;max-width:75em;margin:2em auto;padding:0 1em}td,th{padding:.2em .8em .2em 0;"
    "text-align:left}img{image-rendering:pixelated}pre{overflow:auto}"
)
CAUTIONS = (
    "This study ranks policies on the data, network and budget named above. It says nothing about ImageNet.",
    "Few tokens give sparse blocks little to save, and images this small have little redundancy. The order of the arms "
    "changes with the number of tokens and with the budget: run two settings, and half of the budget.",
    "All arms share one learning rate. It suits none of them best.",
    "Seconds are those of this machine and of whatever else ran on it.",
    "Training losses are not shown: under a policy that drops tokens they lie above the plain one's and say nothing.",
)


def errors_by_arm(results: Results) -> dict[str, list[float]]:
    """Held-out errors of the seeds of each arm."""
    errors: dict[str, list[float]] = {}
    for run, result in results.items():
        errors.setdefault(run.arm, []).append(result["error"])
    return errors


def verdicts_of(results: Results) -> list[Verdict]:
    """Empty as long as no plain run is finished."""
    errors = errors_by_arm(results)
    return judge(errors) if PLAIN in errors else []


def standing(results: Results, planned: int, quick: bool) -> str:
    """What the study as a whole is good for, in one sentence."""
    if len(results) < planned:
        return f"Unfinished: {len(results)} of {planned} runs. Verdicts are preliminary."
    if quick:
        return "A quick run shows the shape of the report. It claims nothing."
    if reasons := lack_of_power(verdicts_of(results)):
        return f"No power: {'; '.join(reasons)}. The verdicts below mean nothing."
    return "Both controls came out as they have to."


def summary(study: Study, results: Results) -> str:
    """What was trained and measured, in words."""
    deviation, df = pooled_deviation(errors_by_arm(results))
    pixels = ", pixels standardised by the training images" if study.normalize == "channel" else ""
    seeds = ", ".join(str(run.seed) for run in results if run.arm == PLAIN)
    spread = f"The pooled deviation of a seed is {deviation:.4f} ({df} degrees of freedom)." if df else ""
    return (
        f"{study.model} on {study.data_dir}{pixels}, flow objective, batches of {study.batch_size}. Each run has the "
        f"compute of {study.budget:g} steps of training without a policy. The seeds are {seeds}. What is measured is "
        f"the mean squared error of the velocity on at most {study.held_out_images} images of {study.held_out_dir}: "
        f"with averaged weights, on all tokens, at eight noise levels, with fixed noise. {spread}{of_samples(results)}"
    )


def of_samples(results: Results) -> str:
    """What the columns of samples mean, in words; empty where no samples were judged."""
    floors = [result["fd_floor"] for result in results.values() if "fd_floor" in result]
    if not floors:
        return ""
    return (
        " A classifier of the data reads samples that are drawn without guidance: the share read as the class that was "
        "asked for, and the Fréchet distance (FD) of its features from those of as many held-out images. As many "
        f"training images have an FD of {np.mean(floors):.3g}."
    )


HEADINGS = ("arm", "runs", "steps", "TFLOPs", "seconds", "MB kept", "read right", "FD", "held-out error", "to none",
            "least difference", "verdict")  # fmt: skip
# Of a run, where it has them: what a step keeps for its backward pass, and what the classifier finds.
FURTHER = {"memory_mb": ".1f", "read_right": ".1%", "fd": ".3g"}


def mean_of(results: Results, arm: str, name: str) -> float:
    """Mean of a number over the runs of an arm that have it; NaN where none has."""
    values = [result[name] for run, result in results.items() if run.arm == arm and name in result]
    return float(np.mean(values)) if values else math.nan


def words_of(verdict: Verdict, results: Results) -> str:
    """The verdict by the held-out error, and whether the samples contradict it."""
    gain = mean_of(results, PLAIN, "fd") - mean_of(results, verdict.arm, "fd")
    contradicted = (verdict.words == "better" and gain < 0) or (verdict.words == "worse" and gain > 0)
    return verdict.words + ", but FD says otherwise" * contradicted


def table_rows(results: Results) -> list[list[str]]:
    """A row for each arm under :data:`HEADINGS`, and its errors in the eight bins."""
    rows = []
    forms = {"step": ".0f", "tflops": ".4g", "seconds": ".0f", **FURTHER}
    for verdict in verdicts_of(results):
        of_arm = [result for run, result in results.items() if run.arm == verdict.arm]
        means = {name: mean_of(results, verdict.arm, name) for name in forms}
        bins = np.mean([result["bins"] for result in of_arm], axis=0)
        is_plain = verdict.arm == PLAIN
        rows.append(
            [
                TITLES.get(verdict.arm, verdict.arm),
                str(len(of_arm)),
                *("" if math.isnan(mean) else f"{mean:{forms[name]}}" for name, mean in means.items()),
                f"{verdict.mean:.4f}",
                "" if is_plain else f"{verdict.difference:+.4f}",
                "" if is_plain or math.isnan(verdict.least) else f"{verdict.least:.4f}",
                "" if is_plain else words_of(verdict, results),
                *(f"{value:.3f}" for value in bins),
            ]
        )
    return rows


def bin_headings(count: int) -> list[str]:
    return [f"t {(number + 0.5) / count:.2f}" for number in range(count)]


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{heading}</th>" for heading in headings)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def curves(results: Results, scale: str) -> str:
    """Held-out error against compute or seconds: a line per arm, with the band of its seeds. An SVG element."""
    arms = list(dict.fromkeys(run.arm for run in results))
    lines = {}
    for arm in arms:
        of_arm = [result["curve"] for run, result in results.items() if run.arm == arm]
        points = min(len(curve) for curve in of_arm)
        of_arm = [curve[-points:] for curve in of_arm]
        x = np.mean([[point[scale] for point in curve] for curve in of_arm], axis=0)
        y = np.array([[point["error"] for point in curve] for curve in of_arm])
        lines[arm] = (x, y.mean(axis=0), y.min(axis=0), y.max(axis=0))
    # The first point of a run is far above the others, and would press them together.
    high = max(line[3][min(1, len(line[3]) - 1)] for line in lines.values())
    low = min(line[2].min() for line in lines.values())
    span = max(high - low, 1e-9)
    low, high = low - 0.05 * span, high + 0.05 * span
    right = max(line[0].max() for line in lines.values())

    def px(x: float) -> float:
        return LEFT + x / right * (WIDTH - LEFT - 10)

    def py(y: float) -> float:
        return 10 + (high - min(max(y, low), high)) / (high - low) * (HEIGHT - BOTTOM - 10)

    parts = [_axes(low, high, right, px, py, SCALES[scale])]
    for number, (arm, (x, mean, least, most)) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        dashes = " stroke-dasharray='5 3'" if number >= len(COLOURS) else ""
        band = [*zip(x, most, strict=True), *reversed(list(zip(x, least, strict=True)))]
        parts.append(f"<polygon points='{_points(band, px, py)}' fill='{colour}' fill-opacity='.12'/>")
        line = _points(list(zip(x, mean, strict=True)), px, py)
        parts.append(f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='1.5'{dashes}/>")
        row = 16 + 17 * number
        parts.append(f"<path d='M{WIDTH + 8} {row}h20' stroke='{colour}' stroke-width='2'{dashes}/>")
        parts.append(f"<text x='{WIDTH + 34}' y='{row + 4}'>{html.escape(arm)}</text>")
    height = max(HEIGHT, 20 + 17 * len(lines))
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH + 160} {height}' width='{WIDTH + 160}' "
        f"font-family='sans-serif' font-size='12'>{''.join(parts)}</svg>"
    )


def _points(points: Sequence[tuple[float, float]], px: Any, py: Any) -> str:
    return " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)


def _axes(low: float, high: float, right: float, px: Any, py: Any, name: str) -> str:
    bottom = HEIGHT - BOTTOM
    parts = [f"<path d='M{LEFT} 10V{bottom}H{WIDTH - 10}' fill='none' stroke='#444'/>"]
    for share in np.linspace(0, 1, 5):
        x, y = share * right, low + share * (high - low)
        parts.append(f"<text x='{px(x):.0f}' y='{bottom + 16}' text-anchor='middle'>{x:.3g}</text>")
        parts.append(f"<text x='{LEFT - 6}' y='{py(y) + 4:.0f}' text-anchor='end'>{y:.3f}</text>")
        parts.append(f"<path d='M{LEFT} {py(y):.1f}H{WIDTH - 10}' stroke='#ddd'/>")
    parts.append(f"<text x='{(LEFT + WIDTH) / 2:.0f}' y='{bottom + 36}' text-anchor='middle'>{name}</text>")
    parts.append(
        f"<text transform='translate(14 {HEIGHT / 2:.0f}) rotate(-90)' text-anchor='middle'>held-out error</text>"
    )
    return "".join(parts)


def write_report(folder: Path, study: Study, results: Results, planned: int, quick: bool) -> None:
    """Write ``report.html`` and ``results.csv``. planned: number of the study's runs."""
    pictures: list[str] = []
    configs: list[str] = []
    for run in results:
        run_folder = folder / "runs" / run.name
        if not any(f"<h3>{run.arm}</h3>" in picture for picture in pictures):
            data = base64.b64encode((run_folder / "samples.png").read_bytes()).decode()
            pictures.append(f"<h3>{run.arm}</h3><img alt='samples' src='data:image/png;base64,{data}'>")
        config = html.escape((run_folder / "config.json").read_text(encoding="utf-8"))
        configs.append(f"<details><summary>{run.name}</summary><pre>{config}</pre></details>")
    rows = table_rows(results)
    verdicts = html_table(HEADINGS, [row[: len(HEADINGS)] for row in rows])
    levels = bin_headings(len(rows[0]) - len(HEADINGS) if rows else 0)
    by_level = html_table(["arm", *levels], [[row[0], *row[len(HEADINGS) :]] for row in rows])
    graphs = "".join(f"<h2>Against {words}</h2>{curves(results, scale)}" for scale, words in SCALES.items())
    cautions = "".join(f"<li>{text}</li>" for text in CAUTIONS)
    page = (
        f"<!doctype html><meta charset='utf-8'><title>Study of policies</title><style>{STYLE}</style>"
        f"<h1>Policies at equal compute</h1><p><b>{standing(results, planned, quick)}</b></p>"
        f"<p>{summary(study, results)}</p>{verdicts}{graphs}<p>Bands reach from the best to the worst seed.</p>"
        f"<h2>Error by noise level, 1 being noise</h2>{by_level}<h2>Read with care</h2><ul>{cautions}</ul>"
        f"<h2>Samples</h2>{''.join(pictures)}"
        f"<h2>Every run's configuration</h2>{''.join(configs)}\n"
    )
    with atomic_write(folder / "report.html") as file:
        file.write(page.encode())
    with atomic_write(folder / "results.csv") as file:
        file.write(_csv(results).encode())


def _csv(results: Results) -> str:
    """A line per run."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    bins = len(next(iter(results.values()))["bins"])
    names = ["tflops", "plain_samples", "seconds", "error"]
    further = [*FURTHER, "fd_floor"]
    writer.writerow(["arm", "seed", "steps", *names, *(f"error_bin{i}" for i in range(bins)), *further])
    for run, result in results.items():
        numbers = [result[name] for name in ("step", *names)]
        writer.writerow([run.arm, run.seed, *numbers, *result["bins"], *(result.get(name, "") for name in further)])
    return out.getvalue()


def publish(folder: Path, name: str, study: Study, results: Results, planned: int) -> None:
    """Write the table as ``name.md`` and the curves over compute as ``name.svg``, for docs/study."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row[: len(HEADINGS)] for row in table_rows(results)]
    lines = ["| " + " | ".join(cells) + " |" for cells in [list(HEADINGS), ["---"] * len(HEADINGS), *rows]]
    text = (
        f"# {name}\n\n{standing(results, planned, quick=False)}\n\n{summary(study, results)}\n\n"
        + "\n".join(lines)
        + f"\n\n![held-out error against compute]({name}.svg)\n\nBands reach from the best to the worst seed. "
        "A multiply-add counts as one.\n"
    )
    with atomic_write(folder / f"{name}.md") as file:
        file.write(text.encode())
    with atomic_write(folder / f"{name}.svg") as file:
        file.write(curves(results, "tflops").encode())


def read_result(path: Path) -> dict[str, Any] | None:
    """What a finished run has recorded; None where it is not finished."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and "curve" in result else None
