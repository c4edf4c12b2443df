"""Every check of the repository as a session; `make test` runs the default ones."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
# The folder of each distribution; the k-means package is installed by another name than its folder.
PACKAGES = {
    nox.project.load_toml(path)["project"]["name"]: path.parent.relative_to(ROOT)
    for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
PLUG_INS = ("--editable", "integrations/svg-engines")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
CONSTRAINTS = os.environ.get("CONSTRAINTS", "tools/constraints.txt")
TRITON = "tools/constraints-triton.txt"

# Packages are installed without compiling their files to bytecode, which takes longer than the
# download; what is imported is then compiled once, unless the machine forbids writing it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def install(session: nox.Session, *requirements: str) -> None:
    """Install requirements beside the torch of the session `torch`, at the versions tested."""
    site_packages(session).joinpath("torch.pth").write_text(
        str(site_packages(session, "torch")), encoding="utf-8"
    )
    constraints = ["--constraint", CONSTRAINTS]
    if not site_packages(session, "torch").joinpath("triton").exists():
        constraints += ["--constraint", TRITON]
    session.install("--no-compile", *constraints, *requirements)


def site_packages(session: nox.Session, other: str | None = None) -> Path:
    """Return where a session's environment, or that of another session, keeps its packages."""
    location = Path(session.virtualenv.location)
    return next((location.parent / other if other else location).glob("lib/python*/site-packages"))


def group(name: str) -> tuple[str, ...]:
    """Return a dependency group of the root's pyproject.toml."""
    return nox.project.dependency_groups(PYPROJECT, name)


def checkout(*names: str, extra: str = "") -> list[str]:
    """Return pip's arguments that install packages, and what they need, from this checkout."""
    needed: list[str] = []

    def add(name: str) -> None:
        if name in needed:
            return
        project = nox.project.load_toml(ROOT / PACKAGES[name] / "pyproject.toml")["project"]
        optional = project.get("optional-dependencies", {}).get(extra, ())
        for requirement in (*project["dependencies"], *(optional if name in names else ())):
            other = re.split(r"[^\w.-]", requirement)[0]
            if other in PACKAGES and other != name:
                add(other)
        needed.append(name)

    for name in names:
        add(name)
    suffix = f"[{extra}]" if extra else ""
    return [
        argument
        for name in needed
        for argument in ("--editable", f"{PACKAGES[name]}{suffix if name in names else ''}")
    ]


def pytest(session: nox.Session, *arguments: str, parallel: bool = False) -> None:
    """Run pytest as a module, so that processes which a test spawns find its module again."""
    processes = ("--numprocesses=auto", "--maxprocesses=8", "--dist=loadscope") if parallel else ()
    threads = {"OMP_NUM_THREADS": "1"} if parallel else {}
    session.run("python", "-m", "pytest", *processes, *arguments, env=threads)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(default=False)
def torch(session: nox.Session) -> None:
    """Install torch once; the other environments look into this one, which holds nothing else."""
    session.install("--no-compile", "--constraint", CONSTRAINTS, "torch", "numpy")


@nox.session(requires=["torch"])
def types(session: nox.Session) -> None:
    """Check the types of the four packages with mypy."""
    install(session, *group("types"), *checkout(*PACKAGES))
    session.run("mypy")


@nox.session(requires=["torch"])
@nox.parametrize("package", list(PACKAGES), ids=list(PACKAGES))
def tests(session: nox.Session, package: str) -> None:
    """Run one package's tests with nothing installed but what it declares."""
    install(session, *group("test"), *checkout(package, extra="test"))
    pytest(session, str(PACKAGES[package] / "tests"), *session.posargs, parallel=True)


@nox.session(default=False, requires=["torch"])
def composition(session: nox.Session) -> None:
    """Run svg-models with every feature of diffusers and write the table of the documentation."""
    install(session, *group("test"), *checkout("svg-models", extra="test"))
    session.run("python", "tools/composition_matrix.py", *session.posargs)


@nox.session(requires=["torch"])
def repository(session: nox.Session) -> None:
    """Run the tests that belong to no single package, and those of the plug-ins for engines."""
    install(session, *group("test"), *group("repository"), *checkout(*PACKAGES), *PLUG_INS)
    pytest(session, "tests", "integrations", *session.posargs, parallel=True)


@nox.session(default=False, requires=["torch"])
def compile(session: nox.Session) -> None:
    """Compile every kernel for every architecture; no GPU needed. `tests` includes this."""
    install(session, *group("test"), *checkout("svg-kernels", "svg-flash-kmeans", extra="test"))
    pytest(
        session,
        "packages/svg-kernels/tests/test_build.py",
        "packages/flash-kmeans/tests/test_compile.py",
        *session.posargs,
    )


@nox.session(requires=["torch"])
def build(session: nox.Session) -> None:
    """Build every sdist and wheel; run each install line of the documentation against them.

    Without `-- --compiled` the wheel of svg-kernels is pure: its sources are compiled by its tests.
    """
    install(session, *group("build"), *group("repository"))
    pure = {} if "--compiled" in session.posargs else {"SVG_KERNELS_PURE": "1"}
    session.run("python", "tools/check_wheels.py", *session.posargs, env=pure)


@nox.session(default=False, python=PYTHONS)
def wheels(session: nox.Session) -> None:
    """Install the wheels that `build -- --dist dist` kept, on every Python there is."""
    session.install("--no-compile", "--constraint", CONSTRAINTS, "pip", "torch", "numpy")
    session.install("--no-compile", *group("repository"))
    session.run("python", "tools/check_wheels.py", "--built", "dist", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error, and so is a public name on no page."""
    session.install(*group("docs"))
    session.run(
        "mkdocs", "build", "--strict", "--site-dir", "site", env={"NO_MKDOCS_2_WARNING": "1"}
    )
    session.run("python", "tools/check_site.py", "site")


@nox.session(default=False)
def look(session: nox.Session) -> None:
    """Open every page of the documentation in a browser, as phones and desktops show it."""
    session.install(*group("docs"))
    session.run(
        "mkdocs", "build", "--strict", "--site-dir", "site", env={"NO_MKDOCS_2_WARNING": "1"}
    )
    session.run("python", "tools/look_at_site.py", "site", *session.posargs)


@nox.session(default=False)
def site(session: nox.Session) -> None:
    """Build the documentation of every release and of main into one site; needs the tags."""
    session.install(*group("docs"))
    session.run("python", "tools/site_versions.py", "site", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False, requires=["torch"])
def demo(session: nox.Session) -> None:
    """Generate a clip by the embedded model, dense, by SVG2 and by presets, and compare them."""
    install(session, *checkout(*PACKAGES))
    methods = (
        "--method",
        "svg2",
        "--preset",
        "fast",
        "--preset",
        "balanced",
        "--preset",
        "quality",
    )
    session.run("svg", "compare", "--steps", "16", *methods, "--output", "demo", *session.posargs)


@nox.session(default=False, requires=["torch"])
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device, of all packages together."""
    install(session, *group("test"), *checkout(*PACKAGES, extra="test"), *PLUG_INS)
    pytest(session, "-m", "gpu", "packages", "integrations", *session.posargs)


@nox.session(default=False, tags=["weekly"])
@nox.parametrize("source", ["release", "main"], ids=["release", "main"])
def newest(session: nox.Session, source: str) -> None:
    """Run every package's tests with the newest torch and diffusers, whatever is declared."""
    newest = "git+https://github.com/huggingface/diffusers" if source == "main" else "diffusers"
    session.install("--no-compile", "--upgrade", "torch", "numpy", *group("test"))
    session.install("--no-compile", *checkout(*PACKAGES, extra="test"))
    # pip says that svg-models declares an older range; that it is left is what is tried here.
    session.install("--no-compile", "--upgrade", "--no-deps", newest)
    session.run("python", "-m", "pip", "list")
    for folder in PACKAGES.values():
        pytest(session, str(folder / "tests"), *session.posargs, parallel=True)


@nox.session(default=False, requires=["torch"], tags=["weekly"])
def fuzz(session: nox.Session) -> None:
    """Draw inputs at random for five minutes, for all that is marked `fuzz`."""
    install(session, *group("test"), *checkout(*PACKAGES, extra="test"))
    end, took = time.monotonic() + 300, 0.0
    while time.monotonic() + took < end:
        began = time.monotonic()
        where = session.posargs or ["packages"]
        pytest(session, "-m", "fuzz", "--hypothesis-profile=fuzz", *where, parallel=True)
        took = time.monotonic() - began


@nox.session(default=False, requires=["torch"], tags=["weekly"])
def chaos(session: nox.Session) -> None:
    """Kill commands at random moments, a hundred times each, and print what was lost."""
    install(session, *checkout(*PACKAGES))
    session.run("python", "tools/chaos.py", *(session.posargs or ("--times", "100")))


@nox.session(default=False, requires=["torch"])
def sanitize(session: nox.Session) -> None:
    """Run every kernel under CUDA's compute-sanitizer; needs a CUDA device."""
    install(session, *checkout("svg-kernels", "svg-attention"))
    for script, options in (
        ("svg-kernels/tests/sanitize.py", ()),
        ("svg-kernels/tests/sanitize_ops.py", ("--kernel-name", "kns=svg")),
        ("svg-attention/tests/sanitize_planning.py", ()),
    ):
        for tool in ("memcheck", "racecheck", "synccheck"):
            session.run(
                *("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *options),
                *("python", f"packages/{script}"),
                # Many threads of many processes wait for each other; without torch's own allocator
                # each tensor ends where its allocation ends.
                env={"OMP_NUM_THREADS": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                external=True,
            )


@nox.session(default=False, requires=["torch"])
def bench(session: nox.Session) -> None:
    """Measure with pytest-benchmark; pass a file to measure only that."""
    install(session, *group("test"), *checkout(*PACKAGES, extra="test"))
    pytest(session, "--benchmark-enable", *(session.posargs or ("benchmarks",)))
