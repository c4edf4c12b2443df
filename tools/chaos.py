"""Kill commands at random moments and print what was lost.

    python tools/chaos.py                        # 25 times each
    python tools/chaos.py --times 100 generate   # one of them, a hundred times
    python tools/chaos.py --json chaos.json      # the figures, for a program

Each command runs first undisturbed, which tells how long it takes; then again and again in the same
folder, and each time a signal (Ctrl-C, SIGTERM or SIGKILL) comes at a moment of that time, every
second one in its last fifth, where files are written. After the last an undisturbed run must
succeed and leave nothing but its results. The exit code is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
PATIENCE = 90.0  # seconds from a signal to the end of the process; machines may be busy

SMALL = ["--size", "64x64", "--frames", "9", "--steps", "3", "--device", "cpu"]
GENERATE = ["a red circle moving left", *SMALL, "--method", "svg2@0.5"]
COMPARE = ["a red circle moving left", *SMALL, "--method", "svg2@0.5"]

BUILD = """
import sys
from pathlib import Path
from svg_kernels._cache import build_once
build_once(Path(sys.argv[1]), ["90"])
"""
CLUSTER = """
import sys, torch, flash_kmeans
torch.set_num_threads(1)
rank, where, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
x = torch.randn(40_000, 32, generator=torch.Generator().manual_seed(rank))
found = flash_kmeans.kmeans_distributed(x, 64, max_iter=20, init="random")
torch.distributed.destroy_process_group()
print(f"{found.inertia.item():.6g}")
"""


@dataclass
class Tally:
    """What came of killing one command again and again.

    Attributes:
        killed: signals that arrived while it ran.
        finished: runs that were done before their signal.
        half_written: results that were there and not whole.
        lost: results of an earlier run that were gone or changed, or that a run claimed and did not
            leave.
        untrue: sentences that did not fit what was there.
        tracebacks: runs that printed one.
        hung: runs that did not end after their signal, or left a process behind.
        left_over: files beside the results after the next undisturbed run.
        notes: one line for each of these.
    """

    killed: int = 0
    finished: int = 0
    half_written: int = 0
    lost: int = 0
    untrue: int = 0
    tracebacks: int = 0
    hung: int = 0
    left_over: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        """Return how much went wrong."""
        spoiled = self.half_written + self.lost + self.left_over
        return spoiled + self.untrue + self.tracebacks + self.hung


@dataclass(frozen=True)
class Victim:
    """A command to be killed.

    Attributes:
        words: its command lines; more than one run together.
        check: called after each run with its exit code, what it said, and whether it was killed;
            returns the faults it sees as (field of `Tally`, sentence).
        leftovers: returns what is there beside the results.
        ready: called before each run.
    """

    words: Callable[[], Sequence[Sequence[str]]]
    check: Callable[[int, str], Iterator[tuple[str, str]]]
    leftovers: Callable[[], list[str]]
    ready: Callable[[], None] = lambda: None


def generate(place: Path) -> Victim:
    """Return `svg generate` over a clip that is there already."""
    clip = place / "out" / "clip.mp4"
    clip.parent.mkdir()
    state = {"before": b""}

    def ready() -> None:
        state["before"] = clip.read_bytes() if clip.exists() else b""

    def check(code: int, said: str) -> Iterator[tuple[str, str]]:
        after = clip.read_bytes() if clip.exists() else b""
        if state["before"] and not after:
            yield "lost", "the clip of the run before is gone"
        if after and not whole(clip):
            yield "half_written", "the clip cannot be read to its end"
        if "nothing was written" in said and after != state["before"]:
            yield "untrue", "nothing was written, it said, and the clip changed"
        if code == 0 and not after:
            yield "lost", "it ended well without a clip"

    return Victim(
        words=lambda: [
            [sys.executable, "-m", "svg_models", "generate", *GENERATE, "-o", str(clip)]
        ],
        check=check,
        leftovers=lambda: others(clip.parent, {"clip.mp4"}) + others(place / "tmp", set()),
        ready=ready,
    )


def compare(place: Path) -> Victim:
    """Return `svg compare` over a comparison that is there already."""
    folder = place / "out"
    folder.mkdir()
    results = {"index.html", "compare.json", "side-by-side.mp4", "dense.mp4", "svg2-50.mp4"}
    state: dict[str, dict[str, float]] = {"before": {}}

    def ready() -> None:
        state["before"] = times(folder, results)

    def check(code: int, said: str) -> Iterator[tuple[str, str]]:
        sweep(folder)  # a set of which the first has moved is completed by the next run
        before, after = state["before"], times(folder, results)
        if set(before) - set(after):
            yield "lost", f"gone: {sorted(set(before) - set(after))}"
        if after and set(after) != results:
            yield "half_written", f"only a part is there: {sorted(after)}"
        changed = {name for name in after if after[name] != before.get(name)}
        if changed and changed != results:
            yield "half_written", f"of two runs: only {sorted(changed)} are new"
        for name in set(after) & results:
            if not whole(folder / name):
                yield "half_written", f"{name} is not whole"
        if "nothing was written" in said and changed:
            yield "untrue", f"nothing was written, it said, and {sorted(changed)} changed"
        if code == 0 and set(after) != results:
            yield "lost", "it ended well without its files"

    return Victim(
        words=lambda: [
            [sys.executable, "-m", "svg_models", "compare", *COMPARE, "-o", str(folder)]
        ],
        check=check,
        leftovers=lambda: others(folder, results) + others(place / "tmp", set()),
        ready=ready,
    )


def build(place: Path) -> Victim:
    """Return the build of the compiled kernels, of two files so that it takes seconds."""
    sources, cache = place / "csrc", place / "cache"
    shutil.copytree(ROOT / "packages" / "svg-kernels" / "csrc", sources)
    for file in sources.rglob("*.cu"):
        if file.name not in ("device.cu", "gate_residual.cu"):
            file.unlink()

    def ready() -> None:
        if whole_library(cache):  # else the next build has to do with what is there
            shutil.rmtree(cache / "svg-kernels")

    def check(code: int, said: str) -> Iterator[tuple[str, str]]:
        if list(cache.glob("svg-kernels/*/*.so")) and not whole_library(cache):
            yield "half_written", "the library is not whole"
        if code == 0 and not whole_library(cache):
            yield "lost", "it ended well without a library"

    def leftovers() -> list[str]:
        known = {"libsvg_kernels.so", "ptxas.txt"}
        found = [
            path
            for path in (cache / "svg-kernels").rglob("*")
            if path.is_file() and path.name not in known and path.suffix != ".lock"
        ]
        scratch = [path for path in cache.glob("svg-kernels/*.*") if path.is_dir()]
        return [str(path.relative_to(cache)) for path in (*found, *scratch)]

    return Victim(
        words=lambda: [[sys.executable, "-c", BUILD, str(sources)]],
        check=check,
        leftovers=leftovers,
        ready=ready,
    )


def cluster(place: Path) -> Victim:
    """Return a k-means of two processes."""
    state = {"run": 0}

    def words() -> list[list[str]]:
        state["run"] += 1
        where = place / f"rendezvous-{state['run']}"
        out = str(place / "out")
        return [[sys.executable, "-c", CLUSTER, str(rank), str(where), out] for rank in (0, 1)]

    def check(code: int, said: str) -> Iterator[tuple[str, str]]:
        if code == 0:
            values = [line for line in said.split() if line.replace(".", "").isdigit()]
            if len(set(values)) > 1:
                yield "lost", f"the processes disagree: {values}"

    return Victim(words=words, check=check, leftovers=lambda: others(place / "tmp", set()))


VICTIMS: dict[str, Callable[[Path], Victim]] = {
    "generate": generate,
    "compare": compare,
    "build": build,
    "kmeans": cluster,
}


def torment(name: str, times: int, seed: int) -> Tally:
    """Kill one command `times` times and count what came of it."""
    draw, tally = random.Random(f"{seed} {name}"), Tally()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        place = Path(folder)
        (place / "tmp").mkdir()
        victim = VICTIMS[name](place)
        victim.ready()
        began = time.monotonic()
        code, said = run(victim.words(), place)
        took = time.monotonic() - began
        if code != 0:
            raise SystemExit(f"{name} fails undisturbed:\n{said}")
        for turn in range(times):
            low = 0.0 if turn % 2 else 0.8
            moment = draw.uniform(low, 1.05) * took
            number = draw.choice(SIGNALS)
            victim.ready()
            code, said = run(victim.words(), place, number, moment)
            finished = code == 0
            tally.finished += finished
            tally.killed += not finished
            faults = list(victim.check(code, said))
            expected = number != signal.SIGINT or moment > 0.25  # before that Python itself starts
            # A program that calls the library is Python's to end; the command `svg` is ours.
            if "Traceback" in said and name in ("generate", "compare") and expected:
                faults.append(("tracebacks", said.strip().splitlines()[-1]))
            if "did not end" in said:
                faults.append(("hung", said.strip().splitlines()[-1]))
            for what, sentence in faults:
                setattr(tally, what, getattr(tally, what) + 1)
                text = f"{name}, {number.name} after {moment:.2f} of {took:.2f} s: {sentence}"
                tally.notes.append(text)
        victim.ready()
        code, said = run(victim.words(), place)
        if code != 0:
            tally.lost += 1
            tally.notes.append(f"{name} fails undisturbed afterwards: {said[-300:]}")
        left = victim.leftovers()
        tally.left_over += len(left)
        tally.notes += [f"{name} leaves {path}" for path in left]
    return tally


def run(
    lines: Sequence[Sequence[str]],
    place: Path,
    number: signal.Signals | None = None,
    moment: float = 0.0,
) -> tuple[int, str]:
    """Run commands together, send them a signal, and wait until nothing of them is left.

    Returns:
        The first exit code that is not 0, and everything that was said.
    """
    settings = {
        "TMPDIR": str(place / "tmp"),
        "XDG_CACHE_HOME": str(place / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(place / "cache" / "inductor"),  # made when torch is imported
    }
    outputs = [tempfile.TemporaryFile() for _ in lines]  # noqa: SIM115 - closed when read
    processes = [
        subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | settings,
            start_new_session=True,
        )
        for line, output in zip(lines, outputs, strict=True)
    ]
    notes = ""
    with ended(processes):
        if number is not None:
            deadline = time.monotonic() + moment
            while time.monotonic() < deadline and any(p.poll() is None for p in processes):
                time.sleep(0.002)
            for process in processes:
                if process.poll() is None:
                    # A terminal sends Ctrl-C to every process of the group, `kill` to one.
                    send = os.killpg if number == signal.SIGINT else os.kill
                    send(process.pid, number)
        for process in processes:
            try:
                process.wait(PATIENCE if number is not None else 900)
            except subprocess.TimeoutExpired:
                notes += f"\nprocess {process.args!r:.60} did not end"
        left = survivors(place)
        notes += f"\n{left[0]} did not end" if left else ""
    codes = [process.returncode for process in processes]
    said = ""
    for output in outputs:
        output.seek(0)
        said += output.read().decode(errors="replace")
        output.close()
    return next((code for code in codes if code), 0), said + notes


@contextlib.contextmanager
def ended(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Leave no process behind, whatever happens."""
    try:
        yield
    finally:
        for process in processes:
            if group_lives(process.pid) or process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def survivors(place: Path) -> list[str]:
    """Return what still runs in this folder, some seconds after all was told to end."""
    for _ in range(100):
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(place).encode() in (process / "environ").read_bytes():
                    words = (process / "cmdline").read_bytes().split(b"\0")
                    if words[0]:  # else it has ended and nobody has asked for its status
                        found.append(b" ".join(words[:4]).decode(errors="replace")[:80])
        if not found:
            return []
        time.sleep(0.1)
    return found


def group_lives(group: int) -> bool:
    """Return whether a process group has members."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def whole(path: Path) -> bool:
    """Return whether a result is complete: a clip to its last frame, JSON, a page."""
    from svg_models.errors import SvgModelsError
    from svg_models.video import VideoFile

    if path.suffix == ".mp4":
        try:
            video = VideoFile.open(path)
            return video.frames == 9 == len(video.pictures(range(9), lambda _: 0))
        except SvgModelsError:
            return False
    text = path.read_text(encoding="utf-8")
    return text.rstrip().endswith("</html>" if path.suffix == ".html" else "}")


def whole_library(cache: Path) -> bool:
    """Return whether the cache holds a library, and that to its last byte."""
    found = list(cache.glob("svg-kernels/**/libsvg_kernels.so"))
    return bool(found) and all(whole_elf(path.read_bytes()) for path in found)


def whole_elf(data: bytes) -> bool:
    """Return whether a 64-bit ELF file ends where its section headers end, as linkers write it."""
    if len(data) < 64 or data[:5] != b"\x7fELF\x02":
        return False
    (offset,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    return bool(offset + size * count == len(data))


def sweep(folder: Path) -> None:
    """Do what the next run does first."""
    from svg_models.files import sweep as of_next_run

    of_next_run(folder)


def times(folder: Path, names: set[str]) -> dict[str, float]:
    """Return when each of these files was written, of those that are there."""
    return {n: (folder / n).stat().st_mtime_ns for n in names if (folder / n).exists()}


def others(folder: Path, results: set[str]) -> list[str]:
    """Return the names in a folder that are no results."""
    return sorted(path.name for path in folder.iterdir() if path.name not in results)


def table(tallies: dict[str, Tally]) -> str:
    """Return the figures as a table of the documentation."""
    columns = [name for name in asdict(Tally()) if name != "notes"]
    head = "| command | " + " | ".join(name.replace("_", " ") for name in columns) + " |"
    rows = [
        f"| {name} | " + " | ".join(str(getattr(tally, column)) for column in columns) + " |"
        for name, tally in tallies.items()
    ]
    return "\n".join([head, "| --- |" + " ---: |" * len(columns), *rows])


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"{', '.join(VICTIMS)}; all if none is given")
    parser.add_argument("--times", type=int, default=25, help="how often each is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    unknown = set(options.names) - set(VICTIMS)
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    names = options.names or list(VICTIMS)
    if shutil.which("nvcc") is None and not options.names:
        names.remove("build")
        print("no nvcc, so the build is left out", file=sys.stderr)
    tallies: dict[str, Tally] = {}
    for name in names:
        tallies[name] = torment(name, options.times, options.seed)
        print(table({name: tallies[name]}), *tallies[name].notes, sep="\n", flush=True)
        if options.json:
            figures = {name: asdict(tally) for name, tally in tallies.items()}
            options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if any(tally.faults for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
