"""Files appear whole or not at all, and nothing is left of a process that was killed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from svg_models.errors import OutputError, SettingError, printable
from svg_models.files import (
    atomic_folder,
    atomic_path,
    check_folder,
    check_output,
    check_outputs,
    regular_file,
    sweep,
    user_path,
)
from svg_models.report import write_run_report
from svg_models.stats import RunStats


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def fail_in(place: AbstractContextManager[Path], error: type[BaseException]) -> None:
    with place as temporary:
        if temporary.is_dir():
            temporary = temporary / "index.html"
        temporary.write_text("half")
        raise error


def test_a_file_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "page.html"
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "half"
    assert names(path.parent) == ["page.html"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_what_stood_there_stays_if_the_block_fails(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(error):
        fail_in(atomic_path(path), error)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["page.html"]


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*page\.html \(no space left on device\)"):
        with atomic_path(tmp_path / "page.html"):
            raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_a_file_that_is_replaced_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    path.chmod(mode)
    write(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_mode_that_any_program_would_give_it(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write(tmp_path / "page.html", "new")
    assert (tmp_path / "page.html").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "page.html", tmp_path / "page.html"
    target.write_text("old")
    link.symlink_to("real/page.html")
    write(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    dangling = tmp_path / "dangling.html"
    dangling.symlink_to("real/later.html")
    write(dangling, "later")
    assert dangling.is_symlink()
    assert (tmp_path / "real" / "later.html").read_text() == "later"


def test_what_is_no_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "null").symlink_to("/dev/null")
    before = os.stat("/dev/null")
    for name, reason in {
        "pipe": "device, pipe or socket",
        "null": "device, pipe or socket",
        "folder": "got the folder",
        "loop": "cannot write",
        "new/": "got the folder",
        "n" * 300: "file name too long",
        "a\0b": "expected a path",
    }.items():
        with pytest.raises(SettingError, match=reason):
            check_output(f"{tmp_path}/{name}")
    with pytest.raises(SettingError, match="never replaced"):
        write_run_report(RunStats(records=(), recipe={}), "/dev/null")
    after = os.stat("/dev/null")
    assert (after.st_mode, after.st_ino, after.st_rdev) == (
        before.st_mode,
        before.st_ino,
        before.st_rdev,
    )


def test_a_current_folder_that_was_removed_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for check in (check_output, check_folder):
        with pytest.raises(SettingError, match="give a full path"):
            check("clip.mp4")
    monkeypatch.chdir(tmp_path)


def test_checking_creates_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "clip.mp4")
    check_folder(tmp_path / "c" / "d")
    assert names(tmp_path) == []
    with pytest.raises(SettingError, match="more than 255 bytes"):
        check_folder(tmp_path / "a" / ("d" * 256) / "b")


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".html")
    write(path, "long")
    assert path.read_text() == "long"


def test_a_set_appears_together_and_its_page_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.json").write_text("old")
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: moved.append(Path(b).name) or replace(a, b))
    with atomic_folder(tmp_path) as staging:
        for name in ("index.html", "z.mp4", "b.json"):
            (staging / name).write_text(name)
        assert [n for n in names(tmp_path) if not n.startswith(".")] == ["b.json"]
    assert moved[1:] == ["b.json", "z.mp4", "index.html"]
    assert names(tmp_path) == ["b.json", "index.html", "z.mp4"]
    assert (tmp_path / "b.json").read_text() == "b.json"


def test_a_set_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_in(atomic_folder(tmp_path), KeyboardInterrupt)
    assert names(tmp_path) == []


def test_a_signal_waits_until_a_set_has_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def interrupted(a: str, b: str) -> None:
        signal.raise_signal(signal.SIGINT)
        replace(a, b)

    def make() -> None:
        with atomic_folder(tmp_path) as staging:
            (staging / "a.json").touch()
            (staging / "index.html").touch()
            monkeypatch.setattr(os, "replace", interrupted)

    # A shell starts what runs in its background with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            make()
    finally:
        signal.signal(signal.SIGINT, before)
    assert names(tmp_path) == ["a.json", "index.html"]


KILLED = """
import os, sys
from pathlib import Path
from svg_models.files import atomic_folder, atomic_path
import svg_models.files as files

folder = Path(sys.argv[1])
if sys.argv[2] == "file":
    with atomic_path(folder / "clip.mp4") as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), 9)
with atomic_folder(folder) as staging:
    (staging / "a.json").write_text("whole")
    (staging / "index.html").write_text("whole")
    if sys.argv[2] == "moving":
        replace = os.replace
        def once(a, b):
            replace(a, b)
            if Path(b).name == "a.json":
                os.kill(os.getpid(), 9)
        os.replace = once
    else:
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("moment", "left"), [("file", []), ("staging", []), ("moving", ["a.json", "index.html"])]
)
def test_what_a_killed_process_left_is_swept(moment: str, left: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(tmp_path), moment]
    assert subprocess.run(words, timeout=60).returncode == -9
    assert any(name.startswith(".svg-") for name in names(tmp_path))
    check_output(tmp_path / "next.mp4")
    assert names(tmp_path) == left
    assert all((tmp_path / name).read_text() == "whole" for name in left)


def test_what_a_living_process_writes_is_not_swept(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.html") as one, atomic_folder(tmp_path) as two:
        one.write_text("here")
        (two / "b.html").touch()
        sweep(tmp_path)
        assert one.exists()
        assert two.exists()
    assert names(tmp_path) == ["a.html", "b.html"]


def test_the_sweep_touches_nothing_else(tmp_path: Path) -> None:
    for name in (".svg-notes", ".svg-kernels", ".part", "x.part", ".hidden.part"):
        (tmp_path / name).touch()
    (tmp_path / ".svg-link.part").symlink_to("/etc")
    before = names(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/dev/zero", "got a device, pipe or socket"),
        ("/", "got a folder"),
        ("missing", "no such file"),
        ("", "expected a path"),
        ("a\0b", "expected a path"),
        ("~nobody-of-this-name/x", "no home folder"),
        ("x" * 5000, "too long"),
    ],
)
def test_only_files_are_read(path: str, reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        regular_file(path, "as a video")


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(SettingError, match="the file is empty"):
        regular_file(tmp_path / "empty", "as an image")


def test_the_home_folder_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert user_path("~/clip.mp4") == Path("/somewhere/clip.mp4")


def test_a_sentence_never_holds_what_a_terminal_obeys() -> None:
    hostile = "a\x1b[31mb\x07c\x00d\x9be\u202ef\u2028g\ud800h\nj"
    assert printable(hostile) == r"a\x1b[31mb\x07c\x00d\x9be\u202ef\u2028g\ud800h\nj"
    assert printable("äöü 中文 👩‍🔬 25\u00a0%") == "äöü 中文 👩‍🔬 25\u00a0%"
    assert str(SettingError(hostile)).isprintable()
    assert len(str(SettingError("x" * 10_000))) < 700


def test_check_outputs_refuses_one_file_for_two_things(tmp_path):
    clip, link = tmp_path / "clip.mp4", tmp_path / "link.mp4"
    link.symlink_to(clip)
    assert check_outputs(clip, None, tmp_path / "a.json") == clip
    for other in (str(clip), f"{tmp_path}/./clip.mp4", link):
        with pytest.raises(SettingError, match="two things cannot be written to"):
            check_outputs(clip, other)
