"""Pictures and videos of strangers: a sentence, and no more memory than is needed."""

from __future__ import annotations

import http.server
import io
import resource
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from svg_models.errors import SettingError
from svg_models.generation.conditioning import read_image, read_media, resampled
from svg_models.video import VideoFile, read_video, write_video


def clip(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    ramp = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 40 + 20
    return np.broadcast_to(ramp, (frames, height, width, 3)).astype(np.uint8)


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(rows or bytes(1 << 10))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0\0\0\0\xff\xff\xff;"


PICTURES: dict[str, bytes] = {
    "text": b"no picture",
    "a byte": b"\x89",
    "a bomb": png(60_000, 60_000),
    "a larger bomb": png(2**31 - 1, 2**31 - 1),
    "no width": png(0, 10),
    "cut off": png(64, 64, bytes(64 * 193))[:60],
    "too little in it": png(64, 64),
    "a GIF without a picture": gif(10, 10),
    "a wide GIF": gif(65_535, 65_535),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "a document": b"%PDF-1.4\n1 0 obj<<>>endobj\n",
    "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a broken TIFF": b"II*\0\x08\0\0\0\xff\xff" + bytes(40),
    "a broken WEBP": b"RIFF\xff\xff\xff\x7fWEBPVP8 \xff\xff\xff\x7f",
    "a broken JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xda",
    "nothing": b"",
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_broken_picture_is_a_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(PICTURES[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SettingError, match="picture") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
def test_usual_pictures_are_read(kind: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), (250, 0, 0)).save(tmp_path / f"red.{kind}")
    image = read_image(tmp_path / f"red.{kind}")
    assert (image.size, image.mode) == ((40, 20), "RGB")
    assert np.abs(np.asarray(image).astype(int) - (250, 0, 0)).max() < 12


def mp4(tmp_path: Path) -> bytes:
    return write_video(clip(), tmp_path / "sound.mp4", fps=8).read_bytes()


@pytest.mark.parametrize(
    "name", ["text", "nothing", "a list of segments", "a script", "cut", "picture", "sound only"]
)
def test_a_broken_video_is_a_sentence(name: str, tmp_path: Path) -> None:
    whole = mp4(tmp_path)
    content = {
        "text": b"just words\n" * 100,
        "nothing": b"",
        "a list of segments": f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/sound.mp4\n".encode(),
        "a script": f"ffconcat version 1.0\nfile {tmp_path}/sound.mp4\n".encode(),
        "cut": whole[:200],
        "picture": png(8, 8, bytes(8 * 25)),
        "sound only": sound(),
    }[name]
    path = tmp_path / "video.mp4"
    path.write_bytes(content)
    with pytest.raises(SettingError, match="video") as caught:
        read_media(video=path)
    assert "\n" not in str(caught.value)


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44_100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def test_a_video_is_never_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.chdir(tmp_path)
    playlist = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}/segment.ts\n#EXT-X-ENDLIST\n"
    )
    (tmp_path / "list.m3u8").write_text(playlist)
    (tmp_path / "list.mp4").write_text(playlist)
    try:
        for path in (f"{address}/video.mp4", "list.m3u8", "list.mp4"):
            with pytest.raises(SettingError, match="as a video"):
                VideoFile.open(path)
    finally:
        server.shutdown()
    assert asked == []


def test_a_name_that_looks_like_an_address_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_video(clip(), "http:/clip.mp4", fps=8)
    assert (tmp_path / "http:" / "clip.mp4").is_file()
    frames, fps = read_video(path)
    assert (frames.shape, fps) == ((5, 32, 48, 3), 8)


def encode_blank(path: Path, *, frames: int, side: int) -> None:
    """Write a video of next to nothing that is large when it is decoded."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "51"}
        blank = av.VideoFrame(side, side, "yuv420p")
        for plane in blank.planes:
            plane.update(bytes(plane.buffer_size))
        for index in range(frames):
            blank.pts = index
            container.mux(stream.encode(blank))
        container.mux(stream.encode())


# What getrusage calls the largest size is that of the process which started this one, too.
MEASURE = """
import sys
from svg_models.video import VideoFile
video = VideoFile.open(sys.argv[1])
kept = video.pictures([0, video.frames // 2], lambda picture: picture[::64, ::64].copy())
lines = open("/proc/self/status").read().splitlines()
peak = next(line for line in lines if line.startswith("VmHWM:")).split()[1]
print(video.frames, video.height, len(kept), peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account")
def test_a_small_file_that_is_large_when_decoded_is_read_a_frame_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "bomb.mp4"
    encode_blank(path, frames=300, side=1920)  # 3.3 GB in RGB
    assert path.stat().st_size < 300 << 10
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    frames, height, kept, peak = map(int, done.stdout.split())
    assert (frames, height, kept) == (300, 1920, 2)
    assert peak < 700 << 10, "kilobytes"
    encode_blank(path, frames=400, side=1920)
    with pytest.raises(SettingError, match="cut it"):
        read_video(path)


def test_a_picture_beyond_the_limit_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svg_models.video import reader

    path = tmp_path / "large.mp4"
    encode_blank(path, frames=2, side=512)
    monkeypatch.setattr(reader, "MOST_PIXELS", 100_000)
    with pytest.raises(SettingError, match=r"512 x 512, and at most 100,000 pixels|as a video"):
        VideoFile.open(path)
    monkeypatch.setattr(reader, "MOST_PIXELS", 1 << 26)
    monkeypatch.setattr(reader, "MOST_FRAMES", 1)
    with pytest.raises(SettingError, match="more than 1 frames"):
        VideoFile.open(path)


def test_frames_come_as_they_are_asked_for(tmp_path: Path) -> None:
    video = VideoFile.open(write_video(clip(), tmp_path / "clip.mp4", fps=8))
    assert (video.frames, video.height, video.width, video.fps) == (5, 32, 48, 8)
    values = video.pictures([3, 0, 3], lambda picture: int(picture.mean()))
    assert np.abs(np.array(values) - (140, 20, 140)).max() <= 3


def test_a_video_that_ends_early_is_a_sentence(tmp_path: Path) -> None:
    path = write_video(clip(200, 64, 64), tmp_path / "clip.mp4", fps=8)
    video = VideoFile.open(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(SettingError, match=r"is broken: it ends before|as a video"):
        video.pictures(range(video.frames), np.asarray)


def test_a_rate_that_would_make_a_film_of_it_is_refused() -> None:
    with pytest.raises(SettingError, match="cut it to what is needed"):
        resampled(100_000, 1.0, 1000.0)
