"""What every benchmark here shares: a device clock, interleaved peers, stored results, tables.

A measurement is a list of times of one callable on the device. Callables that are compared take
turns, each starts with a cold L2, and what is reported is the median with both quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# In cells of tables: the two numbers stay on one line.
PLUS_MINUS = "\N{NO-BREAK SPACE}\N{PLUS-MINUS SIGN}\N{NO-BREAK SPACE}"
_flush: torch.Tensor | None = None
# What an absent package, a missing compiler or a kernel that refuses its input raises.
UNAVAILABLE = (
    *(ImportError, RuntimeError, OSError, ValueError, AttributeError, TypeError),
    *(AssertionError, subprocess.SubprocessError),
)


def reason(error: BaseException) -> str:
    """Return the first line of what kept a peer from running; the whole goes to the log."""
    traceback.print_exception(error)
    if isinstance(error, ImportError):
        return f"not installed ({error})"
    return f"{type(error).__name__}: {[*str(error).strip().splitlines(), ''][0][:160]}"


def environment(commit: str | None = None) -> dict[str, Any]:
    """Describe the machine and the software a result was taken with."""
    gpu = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    import triton

    return {
        "gpu": gpu.name,
        "multiprocessors": gpu.multi_processor_count,
        "driver": _output(query).splitlines()[0],
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit or _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def flush_l2() -> None:
    """Overwrite far more memory than the L2 holds; long enough to hide the launches behind it."""
    global _flush
    if _flush is None:
        _flush = torch.empty(2**28, dtype=torch.int16, device="cuda")
    _flush.zero_()


def interleave(
    functions: Mapping[str, Callable[[], Any]], *, samples: int = 20, warmup: int = 3
) -> dict[str, list[float]]:
    """Time callables in turn, each with a cold L2; return milliseconds on the device by name."""
    for function in functions.values():
        for _ in range(warmup):
            function()
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in functions}
    for _ in range(samples):
        for name, function in functions.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush_l2()
            start.record()
            function()
            stop.record()
            pairs[name].append((start, stop))
    torch.cuda.synchronize()
    return {n: [a.elapsed_time(b) for a, b in events] for n, events in pairs.items()}


def summary(times: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of a list of times, unit kept."""
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def copy_bandwidth(gigabytes: float = 1.0) -> float:
    """Measure a device-to-device copy in GB/s, bytes read plus bytes written."""
    source = torch.randn(int(gigabytes * 5e8), device="cuda").bfloat16()
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.numel() * 2 / summary(times)["median"] / 1e6


def store(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, keys in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def stored(path: Path) -> dict[str, Any]:
    """Read a stored result.

    Raises:
        SystemExit: if there is none, or the file is something else.
    """
    try:
        result = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SystemExit(f"cannot read {path} ({error.strerror}); name a stored result") from error
    except ValueError as error:
        raise SystemExit(f"{path} is no stored result ({error}); name another") from error
    if not isinstance(result, dict):
        raise SystemExit(f"{path} is no stored result (it holds no JSON object); name another")
    return result


def load(gpu: str, name: str) -> dict[str, Any]:
    """Read a stored result, `benchmarks/results/<gpu>/<name>.json`; see `stored`."""
    return stored(RESULTS / gpu / f"{name}.json")


def named(kind: str, names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that one of some patterns is in, of any case; all if there is no pattern.

    Raises:
        SystemExit: if a pattern is none, or is in no name.
    """
    found: set[str] = set()
    for pattern in patterns:
        try:
            having = [name for name in names if re.search(pattern, name, re.IGNORECASE)]
        except re.error as error:
            raise SystemExit(f"{pattern} is no pattern of a {kind}'s name ({error})") from None
        if not having:
            raise SystemExit(f"no {kind} is named {pattern}; there are {'; '.join(names)}")
        found.update(having)
    return [name for name in names if name in found or not patterns]


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a whole number that is not below `least` from the command line."""

    def whole(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{least} or more is needed, got {number}")
        return number

    return whole


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def conditions(env: Mapping[str, Any]) -> str:
    """Return the sentence about machine and software that stands above a table."""
    return (
        f"{env['gpu']}, driver {env['driver']}, CUDA {env['cuda']}, torch {env['torch']}, "
        f"triton {env['triton']}, commit {env['commit']}, {env['date']}."
    )


def conditions_of(environments: Iterable[Mapping[str, Any]]) -> str:
    """Return the sentences about machine and software of several runs, with their commits."""
    commits: dict[str, list[str]] = {}
    for env in environments:
        told, commit = conditions({**env, "commit": "{}"}), str(env["commit"])
        if commit not in commits.setdefault(told, []):
            commits[told].append(commit)
    return " ".join(told.format(", ".join(found)) for told, found in commits.items())


def replace_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a Markdown file."""
    start, stop = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = path.read_text("utf-8").partition(start)
    _, found, after = rest.partition(stop)
    if not found:
        raise ValueError(f"{path} has no {start.strip()} ... {stop} to fill")
    path.write_text(f"{before}{start}{text.rstrip()}\n{stop}{after}", encoding="utf-8")
