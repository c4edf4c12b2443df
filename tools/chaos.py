"""Kill commands at random moments and print what was lost.

    python tools/chaos.py                        # 25 times each
    python tools/chaos.py --times 100 generate   # one of them, a hundred times
    python tools/chaos.py --json chaos.json      # the figures, for a program

Each command runs first undisturbed, which tells how much it computes and when its files change,
then again and again in the same folder until so many runs were killed by a signal (Ctrl-C, SIGTERM
or SIGKILL). Of three moments in turn one lies anywhere in the run, one in its last fifth, and one
behind a change of its files. The former are counted in seconds of the processor, which other work
on the machine does not stretch. Of two processes that work together every second time only one gets
the signal, be it one that the command has started. After the last an undisturbed run must succeed
and leave nothing but its results. The exit code is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
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
import datetime, sys, torch, flash_kmeans
torch.set_num_threads(1)
rank, where = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo",
    init_method=f"file://{where}",
    rank=rank,
    world_size=2,
    timeout=datetime.timedelta(seconds=20),  # how long one waits for another that was killed
)
draw = torch.Generator().manual_seed(rank)
x = torch.randn(40_000, 32, generator=draw)
found = flash_kmeans.kmeans_distributed(x, 64, max_iter=20, init="random", generator=draw)
torch.distributed.destroy_process_group()
print(f"inertia {found.inertia.item():.6g}")
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
        writes: the folder in which its files appear, if it writes any.
        starts: whether it starts processes, of which every second time one is killed in its place.
    """

    words: Callable[[], Sequence[Sequence[str]]]
    check: Callable[[int, str], Iterator[tuple[str, str]]]
    leftovers: Callable[[], list[str]]
    ready: Callable[[], None] = lambda: None
    writes: Path | None = None
    starts: bool = False


@dataclass(frozen=True)
class Moment:
    """When a signal is sent.

    Attributes:
        computed: after so many seconds of the processor.
        change: or after so many changes in the folder that the command writes, 0 for neither,
        later: and so many seconds.
    """

    computed: float = 0.0
    change: int = 0
    later: float = 0.0

    def __str__(self) -> str:
        if self.change:
            return f"{self.later * 1e3:.0f} ms after change {self.change} of its files"
        return f"after {self.computed:.2f} s"


@dataclass
class Effort:
    """What an undisturbed run took.

    Attributes:
        computed: seconds of the processor.
        pauses: seconds from each change of its files to the next one, or to its end.
    """

    computed: float = 0.0
    pauses: list[float] = field(default_factory=list)


def generate(place: Path, *more: str) -> Victim:
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
            [sys.executable, "-m", "svg_models", "generate", *GENERATE, *more, "-o", str(clip)]
        ],
        check=check,
        leftovers=lambda: others(clip.parent, {"clip.mp4"}) + others(place / "tmp", set()),
        ready=ready,
        writes=clip.parent,
        starts="--gpus" in more,
    )


def ranks(place: Path) -> Victim:
    """Return `svg generate` by two processes."""
    return generate(place, "--gpus", "2")


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
        writes=folder,
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
        writes=cache / "svg-kernels",
    )


def cluster(place: Path) -> Victim:
    """Return a k-means of two processes."""
    state, values = {"run": 0}, set[float]()

    def words() -> list[list[str]]:
        state["run"] += 1
        where = place / f"rendezvous-{state['run']}"
        return [[sys.executable, "-c", CLUSTER, str(rank), str(where)] for rank in (0, 1)]

    def check(code: int, said: str) -> Iterator[tuple[str, str]]:
        if code == 0:
            found = [float(word) for word in re.findall(r"^inertia (\S+)$", said, re.MULTILINE)]
            values.update(found)
            if len(found) != 2 or len(values) > 1:
                yield "lost", f"two processes found {found}, all runs {sorted(values)}"

    return Victim(words=words, check=check, leftovers=lambda: others(place / "tmp", set()))


VICTIMS: dict[str, Callable[[Path], Victim]] = {
    "generate": generate,
    "ranks": ranks,
    "compare": compare,
    "build": build,
    "kmeans": cluster,
}


def torment(name: str, times: int, seed: int) -> Tally:
    """Run one command until `times` runs of it were killed, and count what came of it."""
    draw, tally = random.Random(f"{seed} {name}"), Tally()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        place = Path(folder)
        (place / "tmp").mkdir()
        victim = VICTIMS[name](place)
        for _ in range(2):  # the first one also fills caches
            effort = Effort()
            victim.ready()
            code, said = run(victim, place, effort=effort)
            faults = list(victim.check(code, said))
            if code != 0 or faults:
                raise SystemExit(f"{name} fails undisturbed: {faults}\n{said}")
        pauses = " ".join(f"{pause * 1e3:.0f}" for pause in effort.pauses)
        print(f"{name}: {effort.computed:.1f} s; files after {pauses} ms", file=sys.stderr)
        for turn in range(3 * times):
            if tally.killed == times:
                break
            moment = draw_moment(draw, turn, effort)
            number = draw.choice(SIGNALS)
            victim.ready()
            code, said = run(victim, place, number, moment, lonely=turn % 2 == 1)
            tally.finished += code == 0
            tally.killed += code != 0
            faults = list(victim.check(code, said))
            early = number == signal.SIGINT and not moment.change and moment.computed < 0.25
            # At first Python itself starts. A program that calls the library is Python's to end;
            # the command `svg` is ours.
            if "Traceback" in said and name in ("generate", "ranks", "compare") and not early:
                faults.append(("tracebacks", said.strip().splitlines()[-1]))
            if "did not end" in said:
                faults.append(("hung", said.strip().splitlines()[-1]))
            for what, sentence in faults:
                setattr(tally, what, getattr(tally, what) + 1)
                tally.notes.append(f"{name}, {number.name} {moment}: {sentence}")
                print(tally.notes[-1], file=sys.stderr, flush=True)
            if turn % 10 == 9:
                print(f"{name}: {tally.killed} killed", file=sys.stderr, flush=True)
        victim.ready()
        code, said = run(victim, place)
        if code != 0:
            tally.lost += 1
            tally.notes.append(f"{name} fails undisturbed afterwards: {said[-300:]}")
        left = victim.leftovers()
        tally.left_over += len(left)
        tally.notes += [f"{name} leaves {path}" for path in left]
    return tally


def draw_moment(draw: random.Random, turn: int, effort: Effort) -> Moment:
    """Return a moment: anywhere, in the last fifth, or behind a change of a file, in turn."""
    if turn % 3 == 2 and effort.pauses:
        change = draw.randrange(len(effort.pauses))
        return Moment(change=change + 1, later=draw.uniform(0.0, effort.pauses[change]))
    return Moment(computed=draw.uniform(0.8 if turn % 3 else 0.0, 1.0) * effort.computed)


def run(
    victim: Victim,
    place: Path,
    number: signal.Signals | None = None,
    moment: Moment | None = None,
    *,
    lonely: bool = False,
    effort: Effort | None = None,
) -> tuple[int, str]:
    """Run a command, send it a signal, and wait until nothing of it is left.

    Args:
        victim: the command.
        place: its folder.
        number: the signal, if any.
        moment: when it is sent.
        lonely: send it to the last one only, of processes that work together.
        effort: filled with what the run took.

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
    lines = victim.words()
    outputs = [tempfile.TemporaryFile() for _ in lines]  # noqa: SIM115 - closed when read
    before = state_of(victim.writes)
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
        if moment is not None and number is not None:
            wait_until(moment, processes, victim.writes, before)
            started = started_by(processes[0].pid) if lonely and victim.starts else []
            if started:  # these heed nothing else
                with contextlib.suppress(ProcessLookupError):
                    os.kill(started[-1], signal.SIGKILL)
                processes_told = processes[:0]
            else:
                processes_told = processes[-1:] if lonely else processes
            for process in processes_told:
                if process.poll() is None:
                    # A terminal sends Ctrl-C to every process of the group, `kill` to one.
                    send = os.killpg if number == signal.SIGINT else os.kill
                    send(process.pid, number)
        elif effort is not None:
            measure(effort, processes, victim.writes, before)
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


def wait_until(
    moment: Moment,
    processes: Sequence[subprocess.Popen[bytes]],
    folder: Path | None,
    before: object,
) -> None:
    """Wait until a moment of a run has come, or the run has ended."""
    changes = 0
    while any(process.poll() is None for process in processes):
        if moment.change:
            now = state_of(folder)
            changes, before = changes + (now != before), now
            if changes == moment.change:
                time.sleep(moment.later)
                return
        elif sum(computed(process.pid) for process in processes) >= moment.computed:
            return
        time.sleep(0.002)


def measure(
    effort: Effort,
    processes: Sequence[subprocess.Popen[bytes]],
    folder: Path | None,
    before: object,
) -> None:
    """Watch an undisturbed run to its end."""
    changes = []
    while any(process.poll() is None for process in processes):
        effort.computed = max(effort.computed, sum(computed(p.pid) for p in processes))
        now = state_of(folder)
        if now != before:
            before = now
            changes.append(time.monotonic())
        time.sleep(0.002)
    ends = [*changes[1:], time.monotonic()]
    effort.pauses = [end - change for change, end in zip(changes, ends, strict=False)]


def computed(process: int) -> float:
    """Return the seconds of the processor that a process and its children have used."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rsplit(") ", 1)[1]
        children = "".join(
            path.read_text(encoding="ascii")
            for path in Path(f"/proc/{process}/task").glob("*/children")
        )
    except OSError:  # it has ended meanwhile
        return 0.0
    own = sum(int(ticks) for ticks in fields.split()[11:15])  # of children that ended, too
    return own / os.sysconf("SC_CLK_TCK") + sum(computed(int(child)) for child in children.split())


def started_by(process: int) -> list[int]:
    """Return the processes that a process has started to work for it."""
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in path.read_text(encoding="ascii").split():
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def state_of(folder: Path | None) -> list[tuple[str, int, int]]:
    """Return the names, sizes and times of the files in a folder."""
    found = []
    for path in folder.rglob("*") if folder is not None and folder.is_dir() else ():
        with contextlib.suppress(OSError):
            status = path.stat()
            found.append((str(path), status.st_size, status.st_mtime_ns))
    return sorted(found)


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
    parser.add_argument("--times", type=int, default=25, help="how many runs of each are killed")
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
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    print(f"{date.today()}, commit {commit}, {os.cpu_count()} cores", flush=True)
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
