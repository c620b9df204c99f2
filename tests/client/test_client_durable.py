"""What survives a power cut: the order in which files are flushed, named and deleted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from client_fakes import FakeTriton, pictures, run_client, write_clip


class Disk:
    """Records the calls that decide what is on a disk after a power cut.

    The bytes of a file are there once it was flushed, and a name once its folder was flushed after the
    file had got it; a deleted file may be gone at once.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Path]] = []
        self._renamed: dict[Path, list[Path]] = {}
        self.flushed: set[Path] = set()
        self.durable: set[Path] = set()
        self.lost: list[Path] = []
        """Files that were renamed before their bytes were flushed."""
        self.at_deletion: list[tuple[Path, set[Path]]] = []
        """Every deleted file, and what was durable then."""
        for name in ("fsync", "replace", "rename", "unlink", "remove"):
            monkeypatch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _recorded(self, name, original):
        def call(target, *others, **options):
            folder = options.get("dir_fd") or options.get("src_dir_fd")
            if name == "fsync":
                fd = target if isinstance(target, int) else target.fileno()
                path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            else:
                path = Path(os.readlink(f"/proc/self/fd/{folder}") if folder else "", target)
            result = original(target, *others, **options)
            self._note(name, path, *map(Path, others))
            return result

        return call

    def _note(self, name: str, path: Path, *others: Path) -> None:
        self.calls.append((name, others[0] if others else path))
        if name == "fsync" and path.is_dir():
            self.durable |= {one for one in self._renamed.pop(path, []) if one.exists()}
        elif name == "fsync":
            self.flushed.add(path)
        elif others:
            inside = [one for one in self.flushed if path in one.parents]
            if path in self.flushed or inside:
                self.flushed |= {others[0]} | {others[0] / one.relative_to(path) for one in inside}
            else:
                self.lost.append(others[0])
            self._renamed.setdefault(others[0].parent, []).append(others[0])
        else:
            self.at_deletion.append((path, set(self.durable)))


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture(scope="module")
def triton():
    with FakeTriton() as server:
        yield server


def write_images(folder, count):
    folder.mkdir()
    for number, image in enumerate(pictures(count)):
        options = {"update": "1"}
        write_clip(folder / f"{number}.png", [image], codec="png", pix_fmt="rgb24", container_options=options)
    return folder


def segments_deleted(disk):
    return [(path, durable) for path, durable in disk.at_deletion if path.suffix == ".segment"]


def check_order(disk, out, pieces):
    """Nothing gets its name before its bytes are flushed; no piece goes before the output is durable."""
    assert disk.lost == []
    deleted = [(path, durable) for path, durable in segments_deleted(disk) if path.stem != "rehearsal"]
    assert len(deleted) == pieces
    for path, durable in deleted:
        assert out in durable, f"{path} was deleted before {out} was safe"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video(tmp_path, triton, disk, suffix):
    clip, out = write_clip(tmp_path / "in.mp4", pictures(10)), tmp_path / f"out{suffix}"
    assert run_client(clip, out, "--url", triton.url, "--segment-frames", 4).exit_code == 0
    check_order(disk, out, 3)


def test_a_video_that_replaces_another(tmp_path, triton, disk):
    clip, out = write_clip(tmp_path / "in.mp4", pictures(10)), tmp_path / "out.mp4"
    out.write_text("old")
    assert run_client(clip, out, "--url", triton.url, "--segment-frames", 4, "--overwrite").exit_code == 0
    check_order(disk, out, 3)


def test_pieces_and_manifest_are_durable_before_the_join(tmp_path, triton, disk):
    clip, out = write_clip(tmp_path / "in.mp4", pictures(10)), tmp_path / "out.mp4"
    assert run_client(clip, out, "--url", triton.url, "--segment-frames", 4).exit_code == 0
    folder = tmp_path / "out.mp4.part"
    named = [path for call, path in disk.calls if call in ("replace", "rename")]
    assert named.index(folder / "manifest.json") < named.index(folder / "000000.segment")
    made = {folder / "manifest.json", *(folder / f"00000{n}.segment" for n in range(3))}
    joined = next(call for call in disk.calls if call[1] == out)
    before = disk.calls[: disk.calls.index(joined)]
    for path in made:
        at = before.index(("replace", path))
        assert ("fsync", folder) in before[at:], f"{path} has no durable name"
    assert ("fsync", tmp_path) in before  # the folder itself has a durable name


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_of_images(tmp_path, triton, disk, exists):
    images, out = write_images(tmp_path / "in", 7), tmp_path / "out"
    if exists:
        out.mkdir()
    arguments = ("--url", triton.url, "--segment-frames", 3, "--overwrite")
    assert run_client(images, out, *arguments).exit_code == 0
    assert disk.lost == []
    safe = [out / f"{n}.png" for n in range(7)]
    assert all(path in disk.flushed for path in safe)
    deleted = [one for one in segments_deleted(disk) if one[0].stem != "rehearsal"]
    assert len(deleted) == 3
    for _, durable in deleted:
        assert out in durable or set(safe) <= durable


def test_a_still_image(tmp_path, triton, disk):
    image = next(iter(write_images(tmp_path / "in", 1).iterdir()))
    out = tmp_path / "out.png"
    assert run_client(image, out, "--url", triton.url).exit_code == 0
    check_order(disk, out, 1)


@pytest.mark.parametrize("name", ["look.png", "look.mkv", "look.html"])
def test_comparison_and_report(tmp_path, triton, disk, name):
    clip, target = write_clip(tmp_path / "in.mp4", pictures(5)), tmp_path / name
    option = "--report" if name.endswith("html") else "--compare"
    assert run_client(clip, tmp_path / "out.mp4", "--url", triton.url, option, target).exit_code == 0
    assert disk.lost == []
    assert target in disk.durable
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.mp4", "out.mp4", name])


@pytest.mark.parametrize("name", ["look.png", "look.mkv", "look.html"])
def test_a_comparison_that_fails_leaves_the_old_one(tmp_path, triton, monkeypatch, name):
    clip, target = write_clip(tmp_path / "in.mp4", pictures(5)), tmp_path / name
    target.write_text("old")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mst_gan_client.reports.compare.encode", fail)
    monkeypatch.setattr("mst_gan_client.reports.html_report._figures", fail)
    option = "--report" if name.endswith("html") else "--compare"
    result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url, option, target)
    assert result.exit_code == 1
    assert "No space left on device" in result.output.splitlines()[-1]
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.mp4", "out.mp4", name])


def test_segments_of_shards_are_whole_before_they_are_kept(tmp_path, triton, disk):
    clip, out = write_clip(tmp_path / "in.mp4", pictures(9)), tmp_path / "out.mkv"
    for number in (1, 2):
        options = ("--url", triton.url, "--segment-frames", 3, "--shard", f"{number}/2")
        assert run_client(clip, out, *options).exit_code == 0
    result = run_client("join", clip, out)
    assert result.exit_code == 0, result.output
    assert disk.lost == []
