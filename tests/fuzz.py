"""Damaged files of every container through the whole client, in processes of their own: nothing may crash.

By hand, for an hour: ``python tests/fuzz.py --minutes 60 --seed 1 --keep found/``.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from ffmpeg import FILM, H264, TONE, ffmpeg
from PIL import Image, ImageCms

FILES_PER_PROCESS = 40
PATIENCE_S = 120  # for one file: the machine may be busy
STILL = ("-f", "lavfi", "-i", "testsrc2=size=48x32", "-frames:v", "1")
MPEG4 = ("-c:v", "mpeg4", "-bf", "1", "-g", "5")

KINDS: dict[str, tuple[str, ...]] = {
    "h264.mp4": (*FILM, *TONE, *H264, "-c:a", "aac"),
    "hevc.mp4": (*FILM, "-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none"),
    "fragments.mp4": (*FILM, *H264, "-g", "5", "-movflags", "frag_keyframe+empty_moov"),
    "prores.mov": (*FILM, *TONE, "-c:v", "prores_ks", "-c:a", "pcm_s16le"),
    "h264.mkv": (*FILM, *TONE, *H264, "-c:a", "flac"),
    "vp9.webm": (*FILM, *TONE, "-c:v", "libvpx-vp9", "-cpu-used", "8", "-c:a", "libopus"),
    "mpeg4.avi": (*FILM, *TONE, *MPEG4, "-c:a", "mp2"),
    "mjpeg.avi": (*FILM, *TONE, "-c:v", "mjpeg", "-c:a", "pcm_s16le"),
    "h264.ts": (*FILM, *TONE, *H264, "-c:a", "aac"),
    "mpeg2.mpg": (*FILM, *TONE, "-c:v", "mpeg2video", "-bf", "2", "-c:a", "mp2"),
    "h264.flv": (*FILM, *TONE, *H264, "-c:a", "aac"),
    "wmv2.wmv": (*FILM, *TONE, "-c:v", "wmv2", "-c:a", "wmav2"),
    "theora.ogv": (*FILM, *TONE, "-c:v", "libtheora", "-c:a", "libvorbis"),
    "ffv1.nut": (*FILM, "-c:v", "ffv1", "-level", "3"),
    "raw.h264": (*FILM, *H264),
    "animation.gif": FILM,
    "frames.y4m": (*FILM, "-pix_fmt", "yuv420p"),
    "still.png": STILL,
    "still.jpg": STILL,
    "still.webp": STILL,
    "still.tiff": STILL,
    "still.bmp": STILL,
}
"""How a whole file of each kind is made."""
TAGGED = ("still_tagged.png", "still_tagged.jpg", "still_tagged.webp", "still_tagged.tiff")
ORIENTATION, MODEL = 0x0112, 0x0110


def make_seeds(folder: Path) -> list[Path]:
    """A small whole file of each kind."""
    seeds = [ffmpeg(*arguments, folder / name) for name, arguments in KINDS.items()]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[ORIENTATION], exif[MODEL] = 6, "Camera"
    for name in TAGGED:
        Image.new("RGB", (48, 32), "teal").save(folder / name, exif=exif, icc_profile=profile)
        seeds.append(folder / name)
    return seeds


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or move some bytes: more often at the beginning, where headers lie."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
        reach = rng.choice((64, 1024, len(found)))
        place, other = (rng.randrange(min(reach, len(found)) or 1) for _ in range(2))
        length = rng.randrange(1, 64)
        kind = rng.randrange(6)
        if kind == 0:
            found[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            found[place : place + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"))
        elif kind == 3:
            del found[place : place + length]
        elif kind == 4:
            found[place:place] = found[other : other + length]
        elif len(found) > 64:
            del found[max(32, place) :]
        if not found:
            break
    return bytes(found)


def run_files(files: list[Path], folder: Path) -> int:
    """In a process of its own: upscale each file; prints how each ends, after its name.

    Returns:
        1 if one ends neither well nor in one line.
    """
    import client_fakes

    failed = 0
    with client_fakes.FakeTriton() as triton:
        for path in files:
            print(f"{path.name} ", end="", flush=True)
            out = folder / ("out.png" if path.name.startswith("still") else "out.mkv")
            result = client_fakes.run_client(path, out, "--url", triton.url, "--max-frames", 20)
            is_one_line = result.exit_code == 1 and result.output.splitlines()[-1].startswith("Error: ")
            if result.exit_code == 0 or (is_one_line and isinstance(result.exception, SystemExit)):
                print("done" if result.exit_code == 0 else "refused", flush=True)
            else:
                failed = 1
                print(f"BROKE {result.exception!r} {result.output[-300:]!r}", flush=True)
            for left in (out, Path(f"{out}.part")):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return failed


def fuzz(seed: int, count: int, folder: Path, keep: Path | None = None) -> Counter[str]:
    """Damage ``count`` files and run them; returns how often each ending came.

    Endings are ``done``, ``refused``, ``BROKE``, ``CRASHED`` and ``HUNG``; with ``keep``, files of the last
    three are copied there.
    """
    rng = random.Random(seed)
    seeds = make_seeds(folder)
    files = []
    for number in range(count):
        whole = seeds[number % len(seeds)]
        path = folder / f"{whole.stem}-{seed}-{number}{whole.suffix}"
        path.write_bytes(damaged(whole.read_bytes(), rng))
        files.append(path)
    endings: Counter[str] = Counter()
    while files:
        batch, files = files[:FILES_PER_PROCESS], files[FILES_PER_PROCESS:]
        command = [sys.executable, __file__, "--run", str(folder), *map(str, batch)]
        try:
            limit_s = PATIENCE_S + 3 * len(batch)
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
            output, ending = done.stdout, "CRASHED"
        except subprocess.TimeoutExpired as err:
            output, ending = (err.stdout or b"").decode(), "HUNG"
        lines = output.splitlines() or [f"{batch[0].name} "]
        for line in lines:
            how = line.split(" ", 2)[1] if " " in line.strip() else ending
            endings[how] += 1
            if how not in ("done", "refused"):
                print(line, how, flush=True)
                if keep:
                    shutil.copy(folder / line.split(" ")[0], keep)
        files = batch[len(lines) :] + files  # what came after a crash
    return endings


def main() -> None:
    """Fuzz for some minutes."""
    if sys.argv[1:2] == ["--run"]:
        sys.exit(run_files([Path(name) for name in sys.argv[3:]], Path(sys.argv[2])))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
    until_s, seed, endings = time.monotonic() + 60 * given.minutes, given.seed, Counter[str]()
    while time.monotonic() < until_s:
        with tempfile.TemporaryDirectory() as folder:
            endings += fuzz(seed, 10 * len((*KINDS, *TAGGED)), Path(folder), given.keep)
        seed += 1
        print(f"seed {seed}: {dict(endings)}", flush=True)


if __name__ == "__main__":
    main()
