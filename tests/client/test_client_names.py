"""File names are names, never protocols, patterns or options; folders in folders; what is no plain file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from client_fakes import FakeTriton, decoded, pictures, run_client, write_clip
from test_client_pipe import y4m

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "client" / "upscale.py"

NAMES = [
    "Alien: Part",
    "pipe:1",
    "file:x",
    "http://x".replace("/", ":"),
    "concat:a|b",
    "-i",
    "--help",
    "100%d %03d",
    "a [1] {b,c} *?",
    "a\\b",
    "~",
    "$HOME `x`",
    "a\nb",
    "[red]bold[bold]",
    "Am\udce9lie",  # bytes that are no UTF-8
    "é 映画",
    "%",
]


@pytest.fixture(scope="module")
def triton():
    with FakeTriton() as server:
        yield server


def client(triton, folder, *arguments):
    command = [sys.executable, SCRIPT, "--url", triton.url, "--", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=120)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_of_any_name(tmp_path, triton, monkeypatch, name, suffix):
    """In and out, relative, from the folder that it lies in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    write_clip(tmp_path / "plain.mp4", pictures(3), audio=True).rename(f"in/{name}.mp4")
    for source, out in ((f"in/{name}.mp4", f"{name}{suffix}"), (f"{name}{suffix}", "again.mkv")):
        arguments = ("--url", triton.url, "--report", "r.html", "--compare", "c.png", "--overwrite")
        result = run_client(*arguments, "--", source, out)
        assert result.exit_code == 0, result.output
        assert len(decoded("file:" + out)) == 3
    assert b"<h1>" in Path("r.html").read_bytes()
    names = {os.fsdecode(entry) for entry in os.listdir()}
    assert names == {"in", f"{name}{suffix}", "again.mkv", "r.html", "c.png"}


def test_names_on_the_command_line(tmp_path, triton):
    """As a shell gives them: bytes."""
    shutil.move(write_clip(tmp_path / "plain.mp4", pictures(3)), tmp_path / "-Am\udce9lie: 1.mp4")
    done = client(triton, tmp_path, b"-Am\xe9lie: 1.mp4", b"-\xff%d.mp4")
    assert done.returncode == 0, done.stderr
    assert b"\\udcff%d.mp4: 3 frames" in done.stdout
    again = client(triton, tmp_path, b"-Am\xe9lie: 1.mp4", b"-\xff%d.mp4")
    assert again.returncode == 1 and b"exists: pass --overwrite" in again.stderr


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_folder_of_images_of_any_name(tmp_path, triton, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name
    folder.mkdir()
    for number, image in enumerate(pictures(3)):
        options = {"update": "1"}
        write_clip(tmp_path / "x.png", [image], codec="png", pix_fmt="rgb24", container_options=options)
        shutil.move(tmp_path / "x.png", folder / f"{name} {number}.png")
    (folder / ".DS_Store").write_text("x")
    result = run_client("--url", triton.url, "--", name, "out")
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir("out")) == [f"{name} {number}.png" for number in range(3)]
    still = run_client("--url", triton.url, "--", f"{name}/{name} 0.png", f"{name}.png")
    assert still.exit_code == 0, still.output


@pytest.mark.parametrize("hidden", [".aaa.png", "._0.png", ".hidden.jpg"])
def test_hidden_files_are_no_images(tmp_path, triton, hidden):
    """They would shift every name by one, or be of another kind."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, image in enumerate(pictures(3)):
        path, options = folder / f"{number}.png", {"update": "1"}
        write_clip(path, [image], codec="png", pix_fmt="rgb24", container_options=options)
    shutil.copy(folder / "2.png", folder / hidden)
    result = run_client(folder, tmp_path / "out", "--url", triton.url)
    assert result.exit_code == 0, result.output
    for number, image in enumerate(pictures(3)):
        assert (decoded(tmp_path / "out" / f"{number}.png")[0][::4, ::4] == image).all()


# Folders


@pytest.fixture
def tree(tmp_path):
    top = tmp_path / "films"
    for name in ("a.mp4", "x/a.mp4", "x/y/b.mkv", ".trash/c.mp4", "x/._a.mp4", "d.mp4.part/joined.mp4"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        write_clip(tmp_path / f"plain{Path(name).suffix}", pictures(2)).rename(top / name)
    (top / "x" / "notes.txt").write_text("to do")
    return top


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_recursive_keeps_the_folders(tmp_path, triton, tree, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "out"
    result = run_client(tree, out, "--url", triton.url, "--recursive")
    assert result.exit_code == 0, result.output
    assert files(out) == ["a.mp4", "x/a.mp4", "x/y/b.mkv"]
    assert "left out what is no video by its name: 1 .txt" in caplog.text
    again = run_client(tree, out, "--url", triton.url, "--recursive")
    assert again.exit_code == 0 and again.output.count("is there already") == 3


def test_recursive_into_a_folder_inside(triton, tree):
    """What comes out does not go in again."""
    for _ in range(2):
        result = run_client(tree, tree / "out", "--url", triton.url, "--recursive")
        assert result.exit_code == 0, result.output
    assert files(tree / "out") == ["a.mp4", "x/a.mp4", "x/y/b.mkv"]


def test_without_it_only_the_folder_itself(tmp_path, triton, tree):
    assert run_client(tree, tmp_path / "out", "--url", triton.url).exit_code == 0
    assert files(tmp_path / "out") == ["a.mp4"]


@pytest.mark.parametrize("suffix", [".gif", ".divx", ".f4v", ".GIF", ".mjpg", ".nut", ".m2v"])
def test_folders_take_every_video(tmp_path, triton, suffix):
    (tmp_path / "in").mkdir()
    codec, pix_fmt = ("gif", "rgb8") if suffix.lower() == ".gif" else ("mpeg4", "yuv420p")
    kind = {".f4v": ".mp4", ".divx": ".avi", ".mjpg": ".avi", ".m2v": ".avi"}.get(suffix, suffix)
    write_clip(tmp_path / f"x{kind}", pictures(2), codec=codec, pix_fmt=pix_fmt).rename(
        tmp_path / "in" / f"a{suffix}"
    )
    result = run_client(tmp_path / "in", tmp_path / "out", "--url", triton.url)
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "out") == [f"a{suffix}.mkv"]


def test_an_output_that_is_another_input(tmp_path, triton):
    """c.avi becomes c.avi.mkv, which is to be upscaled itself."""
    write_clip(tmp_path / "c.avi", pictures(2), codec="mpeg4", pix_fmt="yuv420p")
    clip = write_clip(tmp_path / "c.avi.mkv", pictures(2))
    before = clip.read_bytes()
    result = run_client(f"{tmp_path}/*.avi*", tmp_path, "--url", triton.url, "--overwrite")
    assert result.exit_code == 1
    assert clip.read_bytes() == before


@pytest.mark.parametrize("option", ["--compare", "--report"])
@pytest.mark.parametrize("target", ["in.mp4", "out.mp4", "./in.mp4", "truth.mp4", "link.mp4"])
def test_extras_replace_no_other_file_of_the_run(tmp_path, triton, monkeypatch, option, target):
    monkeypatch.chdir(tmp_path)
    for name in ("in.mp4", "truth.mp4"):
        write_clip(tmp_path / name, pictures(2))
    (tmp_path / "link.mp4").symlink_to("in.mp4")
    before = [Path(name).read_bytes() for name in ("in.mp4", "truth.mp4")]
    extras = [option, target] + (["--report", "r.html"] if option == "--compare" else [])
    result = run_client("in.mp4", "out.mp4", "--url", triton.url, "--reference", "truth.mp4", *extras)
    assert result.exit_code == 1
    assert "expected another name for" in result.output
    assert [Path(name).read_bytes() for name in ("in.mp4", "truth.mp4")] == before


# Pipes and devices


def test_named_pipes_as_shells_make_them(tmp_path, triton):
    """<(...) is /dev/fd/63."""
    (tmp_path / "in.y4m").write_bytes(y4m(pictures(5)))
    line = f'"{sys.executable}" "{SCRIPT}" --url {triton.url} <(cat in.y4m) out.mp4'
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(decoded(tmp_path / "out.mp4")) == 5
    line = f'"{sys.executable}" "{SCRIPT}" --url {triton.url} out.mp4 >(cat > out.y4m); wait $!'
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(decoded(tmp_path / "out.y4m")) == 5


def test_a_device_is_not_replaced(tmp_path, triton):
    clip = write_clip(tmp_path / "in.mp4", pictures(2))
    result = run_client(clip, "/dev/null", "--url", triton.url, "--overwrite")
    assert result.exit_code == 1 and "found a device" in result.output
    assert Path("/dev/null").is_char_device()


def test_a_file_called_dash(tmp_path, triton, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "in.mp4", pictures(2)).rename(tmp_path / "-")
    assert run_client("./-", "out.mp4", "--url", triton.url).exit_code == 0
    assert len(decoded(tmp_path / "out.mp4")) == 2


@pytest.mark.parametrize("cut", [1, 100, 4608, 4610])
def test_y4m_that_breaks_off(tmp_path, triton, cut):
    data = y4m(pictures(8))
    command = [sys.executable, SCRIPT, "-", tmp_path / "out.mp4", "--url", triton.url]
    for options, code in (((), 1), (("--allow-damage", "--restart"), 0)):
        done = subprocess.run([*command, *options], input=data[:-cut], capture_output=True, timeout=120)
        assert done.returncode == code, done.stderr
        if code:
            assert b"the file ends in the middle of frame 8: get it whole, or pass" in done.stderr
    assert len(decoded(tmp_path / "out.mp4")) == 7


def test_a_frame_too_large_names_the_way_out(tmp_path, triton):
    """An H.264 picture has at most 16384 pixels a side."""
    clip = write_clip(tmp_path / "in.mkv", pictures(1, 16, 4200), codec="ffv1", pix_fmt="bgr0")
    result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url)
    assert result.exit_code == 1
    assert "libx264 refused 16800x64" in result.output and "or --final-size" in result.output
    assert triton.shapes == [] or (1, 3, 16, 4200, 3) not in triton.shapes
