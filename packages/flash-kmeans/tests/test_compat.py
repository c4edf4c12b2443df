"""Code written for `flash-kmeans` 0.3.1 runs: its names, paths, shapes, dtypes and meaning."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from kmeans_oracles import blobs

import flash_kmeans as fk
from flash_kmeans import compat

SCRIPT = Path(__file__).with_name("original_calls.py")
SOURCES = Path(fk.__file__).parents[1]


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the original library, unpacked from its wheel."""
    folder = tmp_path_factory.mktemp("original")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "flash-kmeans==0.3.1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"pip cannot fetch flash-kmeans 0.3.1: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
    return folder


def public_names(path: Path) -> set[str]:
    """Return the public functions and classes that a file of the original defines."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    found = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    return {name for name in found if not name.startswith("_")} - {"main"}


def test_compat_has_every_public_name_of_the_original_under_its_path(original: Path) -> None:
    folder = original / "flash_kmeans"
    top = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    names = next(n.value for n in top.body if ast.unparse(n).startswith("__all__"))  # type: ignore[attr-defined]
    for name in ast.literal_eval(names):
        assert callable(getattr(fk, name))
        assert name not in fk.__all__
    for path in folder.glob("[!_]*.py"):
        module = importlib.import_module(f"flash_kmeans.{path.stem}")
        assert Path(module.__file__ or "").parent.name == "compat"
        assert getattr(fk, path.stem) is module
        for name in public_names(path):
            assert getattr(module, name) is getattr(compat, name), name


def test_getattr_raises_attribute_errors_for_unknown_names() -> None:
    with pytest.raises(AttributeError, match="batch_kmeans_Manhattan"):
        fk.batch_kmeans_Manhattan  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_kmeans.kmeans_small")


def test_import_leaves_compat_alone() -> None:
    code = (
        "import sys, flash_kmeans; print([m for m in sys.modules if 'flash_kmeans.compat' in m])\n"
        "from flash_kmeans.interface import FlashKMeans\n"
        "print(FlashKMeans is flash_kmeans.FlashKMeans is flash_kmeans.interface.FlashKMeans)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True"]


def run_calls(path: Path, target: Path) -> dict[str, Any]:
    """Run the calls on the library in `path` and return what it gave."""
    done = subprocess.run(
        [sys.executable, "-O", str(SCRIPT), str(target)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(path), "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = torch.load(target, weights_only=False)
    assert str(path) in results.pop("file")
    return results


def test_compat_gives_what_the_original_gives(original: Path, tmp_path: Path) -> None:
    for needed in ("triton", "tqdm"):
        pytest.importorskip(needed, reason="the original imports it")
    theirs = run_calls(original, tmp_path / "theirs")
    ours = run_calls(SOURCES, tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name], expected, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    rounds = {ours[f"batch_kmeans_{m} early"][2] for m in ("Euclid", "Cosine", "Dot")}
    assert any(1 < n < 100 for n in rounds), rounds


@pytest.mark.parametrize("name", ["batch_kmeans_Euclid", "batch_kmeans_Cosine"])
def test_batch_kmeans_agrees_with_kmeans(name: str) -> None:
    x = blobs(2, 80, 4, 3)
    labels, centroids, rounds = getattr(fk, name)(x, 3, 5, -1.0, x[:, :3], False)
    metric = {"batch_kmeans_Euclid": "euclidean", "batch_kmeans_Cosine": "cosine"}[name]
    expected = fk.kmeans(x, 3, init=x[:, :3], max_iter=5, metric=metric)  # type: ignore[arg-type]
    assert rounds == 5
    assert torch.equal(labels, expected.labels)
    torch.testing.assert_close(centroids, expected.centroids)


def test_batch_kmeans_prints_movements_and_draws_distinct_points(
    capsys: pytest.CaptureFixture[str],
) -> None:
    x = torch.arange(6.0).reshape(1, 6, 1)
    labels, _, _ = compat.batch_kmeans_Euclid(x, 6, 1, verbose=True)
    assert sorted(labels[0].tolist()) == list(range(6))
    assert capsys.readouterr().out == "Iter 0, center shift: 0.000000\n"
    with pytest.raises(ValueError, match="max_iters"):
        compat.batch_kmeans_Euclid(x, 2, 0)
    with pytest.raises(ValueError, match="between 1"):
        compat.batch_kmeans_Euclid(x, 7)


def test_kmeans_largeN_equals_the_whole_at_once() -> None:
    x = blobs(1, 90, 4, 3)[0]
    start = x[:3].clone()
    labels, centroids = compat.kmeans_largeN(x, 3, 4, BLOCK_N=7, init_centroids=start, device="cpu")
    whole = fk.kmeans(x, 3, init=start, max_iter=4)
    assert torch.equal(labels, whole.labels)
    torch.testing.assert_close(centroids, whole.centroids)
    again = compat.kmeans_largeN_assign(x, centroids, BLOCK_N=7, device="cpu")
    assert torch.equal(again, fk.assign(x, centroids))
    settled, _ = compat.kmeans_largeN(x, 3, tol=1e-3, init_centroids=start, device="cpu")
    assert torch.equal(settled, fk.kmeans(x, 3, init=start, max_iter=50).labels)


def test_FlashKMeans_trains_and_predicts() -> None:
    x = blobs(1, 90, 4, 3)[0]
    state = torch.get_rng_state()
    model = compat.FlashKMeans(4, 3, niter=10, seed=1, chunk_size_data=7, device="cpu")
    with pytest.raises(RuntimeError, match="train"):
        model.predict(x)
    labels = model.fit_predict(x)
    assert torch.equal(state, torch.get_rng_state())
    assert labels.shape == (90,)
    assert model.centroids_b is not None
    assert torch.equal(model.predict(x), fk.assign(x, model.centroids_b[0]))
    with pytest.raises(ValueError, match="features"):
        model.predict(x[:, :3])
    with pytest.raises(ValueError, match="batch size"):
        model.predict(x[None])


def test_FlashKMeans_reads_large_points_in_chunks() -> None:
    x = blobs(1, 90, 4, 3)[0]
    whole, parts = (
        compat.FlashKMeans(4, 3, seed=1, chunk_size_data_cpu=n, device="cpu") for n in (90, 20)
    )
    assert torch.equal(whole.fit_predict(x), parts.fit_predict(x))
    assert torch.equal(whole.predict(x), parts.predict(x))
    with pytest.raises(ValueError, match="chunk_size_data_cpu"):
        parts.fit(x[None])
