"""Clips of a batch on a Ray cluster of two machines, both of them this one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from processes import children
from typer.testing import CliRunner

from svg_models.cli import app
from svg_models.generation import on_ray
from svg_models.generation.request import GenerateRequest

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.usefixtures("one_thread")]
SMALL = ["--size", "48x48", "--frames", "5", "--steps", "2", "--guidance", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.pipeline().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Start a cluster of two machines, of one CPU and of two."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    machine = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
    try:
        cluster.add_node(**machine | {"num_cpus": 2})
        yield cluster.address
    finally:
        cluster.shutdown()


def test_svg_batch_ray_makes_clips_on_two_machines(
    folder: str, tmp_path: Path, address: str
) -> None:
    lines, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    rows = [
        {"prompt": "a red circle", "method": "svg2@0.5"},
        {"prompt": "a green square", "frames": 6},
        {"prompt": "a blue circle"},
    ]
    lines.write_text("\n".join(map(json.dumps, rows)))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    words = ["batch", str(lines), "-m", folder, *SMALL, "--gpus", "2", "-o", str(out), "--json"]
    result = CliRunner().invoke(app, [*words, "--ray", address])
    assert result.exit_code == 2, result.output
    values = json.loads(result.stdout)
    assert [value["made"] for value in values] == [True, False, True]
    assert "frames must be a multiple of 4 plus 1, got 6" in values[1]["error"]
    assert values[0]["attention"]["mean_density"] < 1
    assert not list(out.glob(".svg-*"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    rows[1]["frames"] = 5
    lines.write_text("\n".join(map(json.dumps, rows)))
    words += ["--gpus-per-clip", "2", "--ray", address]
    result = CliRunner().invoke(app, words)  # the same batch goes on, by two processes of a worker
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [value["made"] for value in values] == [False, True, False]
    assert [value["gpus"] for value in values] == [1, 2, 1]


def test_svg_batch_ray_makes_the_clip_of_a_lost_worker_again(
    folder: str, tmp_path: Path, address: str
) -> None:
    lines, out, killed = tmp_path / "prompts.txt", tmp_path / "out", []

    def kill_the_first() -> None:
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            for process in children(os.getpid()):
                with contextlib.suppress(OSError):
                    if b"ray::ClipWorker.make" in Path(f"/proc/{process}/cmdline").read_bytes():
                        os.kill(process, signal.SIGKILL)
                        killed.append(process)
                        break
            time.sleep(0.02)

    lines.write_text("a red circle\n")
    words = ["batch", str(lines), "-m", folder, *SMALL, "-o", str(out), "--json"]
    killer = threading.Thread(target=kill_the_first)
    killer.start()
    result = CliRunner().invoke(app, [*words, "--ray", address])
    killer.join()
    assert result.exit_code == 0, result.output
    assert len(killed) == 1
    assert [value["made"] for value in json.loads(result.stdout)] == [True]


def test_svg_batch_ray_refuses_what_the_cluster_has_not(
    folder: str, tmp_path: Path, address: str
) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("a red circle\n")
    words = ["batch", str(lines), "-m", folder, "--ray", address, "-o", str(tmp_path / "out")]
    for more, sentence in (
        (["--gpus", "4", "--device", "cpu"], "4 CPUs were asked for, and the Ray cluster has 3"),
        (
            ["--gpus", "4", "--gpus-per-clip", "2", "--device", "cpu"],
            "4 CPUs in groups of 2 were asked for, and the Ray cluster has 2 in groups of 2",
        ),
        (["--gpus", "1"], "1 GPUs were asked for, and the Ray cluster has 0"),
        (["--gpus", "3", "--gpus-per-clip", "2"], "3 GPUs cannot be dealt in groups of 2"),
    ):
        result = CliRunner().invoke(app, [*words, *more])
        assert result.exit_code == 2, result.output
        assert sentence in " ".join(result.stderr.split())


def test_svg_batch_ray_is_a_sentence_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(on_ray.SettingError, match=r'pip install "svg-models\[ray\]"'):
        with on_ray.ray_cluster("auto", GenerateRequest()):
            pass
