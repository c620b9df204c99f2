"""The folder of an unfinished run beside files that are not ours: only what we made is ever deleted."""

from __future__ import annotations

import errno
import fcntl
import json

import pytest
from client_fakes import FakeTriton, decoded, pictures, run_client, write_clip

from mst_gan_client.errors import UpscaleError
from mst_gan_client.resume import ResumeState


@pytest.fixture(scope="module")
def triton():
    with FakeTriton() as server:
        yield server


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "in.mp4", pictures(10))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.mp4"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FOREIGN = {
    "notes": {"notes.txt": "precious"},
    "a lock of others": {"lock": "pid 17", "data.bin": "precious"},
    "an empty lock of others": {"lock": "", "data.bin": "precious"},
    "names like ours": {"000000.segment": "precious", "joined.mp4": "precious"},
    "a manifest of others": {"manifest.json": '{"name": "a web app", "icons": []}', "000000.segment": "x"},
    "a manifest that is no object": {"manifest.json": "[1, 2]"},
    "a manifest that is no JSON": {"manifest.json": "Name: a web app", "icon.png": "precious"},
    "a manifest that is no text": {"manifest.json": "\udcff\udcfe", "icon.png": "precious"},
    "folders": {"deep/er/notes.txt": "precious"},
}


@pytest.mark.parametrize("options", [(), ("--restart",), ("--overwrite", "--restart")])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_of_somebody_else_is_refused_and_left_alone(clip, out, triton, kind, options):
    folder = out.with_name("out.mp4.part")
    for name, text in FOREIGN[kind].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, errors="surrogateescape")
    before, requests = contents(folder), triton.requests
    result = run_client(clip, out, "--url", triton.url, *options)
    assert result.exit_code == 1
    last = result.output.splitlines()[-1]
    assert f"{folder}" in last and "move it away, or name another output" in last
    assert contents(folder) == before
    assert triton.requests == requests and not out.exists()


def test_a_file_named_like_the_folder_is_left_alone(clip, out, triton):
    out.with_name("out.mp4.part").write_text("precious")
    result = run_client(clip, out, "--url", triton.url, "--restart")
    assert result.exit_code == 1
    assert "expected a folder or nothing at" in result.output
    assert out.with_name("out.mp4.part").read_text() == "precious"


def test_what_a_crash_at_the_very_start_left_is_ours(clip, out, triton):
    """A folder that is empty, or has only the lock in it and a manifest that was never finished."""
    for names in ((), ("lock",), ("lock", "manifest.draft")):
        folder = out.with_name("out.mp4.part")
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        result = run_client(clip, out, "--url", triton.url, "--overwrite")
        assert result.exit_code == 0, result.output
        assert not folder.exists()


def unfinished(clip, out, triton):
    """Let a run end after its segments; returns its folder."""
    with pytest.MonkeyPatch.context() as patch:

        def fail(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("mst_gan_client.video.mux.Muxer.write", fail)
        result = run_client(clip, out, "--url", triton.url, "--segment-frames", 2)
    assert result.exit_code == 1
    folder = out.with_name(out.name + ".part")
    assert len(list(folder.glob("*.segment"))) == 5, result.output
    return folder


@pytest.mark.parametrize("options", [(), ("--restart",)])
def test_foreign_files_in_our_folder_survive_and_are_named(clip, out, triton, options, caplog):
    folder = unfinished(clip, out, triton)
    foreign = {"notes.txt": "a", "0_list.txt": "b", "lock.old": "c", "deep/000001.segment": "d"}
    for name, text in foreign.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    result = run_client(clip, out, "--url", triton.url, "--segment-frames", 2, *options)
    assert result.exit_code == 0, result.output
    assert len(decoded(out)) == 10
    assert contents(folder) == {name: text.encode() for name, text in foreign.items()}
    assert f"left 0_list.txt, deep, lock.old, notes.txt in {folder}" in caplog.text


def test_foreign_files_survive_a_refused_run(clip, out, triton):
    folder = unfinished(clip, out, triton)
    (folder / "notes.txt").write_text("a")
    before = contents(folder)
    result = run_client(clip, out, "--url", triton.url, "--segment-frames", 3)
    assert result.exit_code == 1
    assert "holds an unfinished run with another segment length" in result.output
    assert contents(folder) == before


def test_foreign_files_survive_a_run_that_fails_at_once(clip, out, triton, monkeypatch):
    """Such a run removes what it made, and only that."""

    def refuse(*_):
        out.with_name("out.mp4.part").joinpath("notes.txt").write_text("a")
        raise UpscaleError("no")

    monkeypatch.setattr("mst_gan_client.run.rehearse", refuse)
    assert run_client(clip, out, "--url", triton.url).exit_code == 1
    assert list(contents(out.with_name("out.mp4.part"))) == ["notes.txt"]


def test_images_in_a_folder_keep_their_company(tmp_path, triton):
    """Replacing a folder of images replaces the images, nothing else in it."""
    (tmp_path / "in").mkdir()
    for number, image in enumerate(pictures(4)):
        options = {"update": "1"}
        path = tmp_path / "in" / f"{number}.png"
        write_clip(path, [image], codec="png", pix_fmt="rgb24", container_options=options)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("precious")
    (out / "9.png").write_text("precious")
    assert run_client(tmp_path / "in", out, "--url", triton.url, "--overwrite").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
        "9.png",
        "notes.txt",
    ]
    assert (out / "9.png").read_text() == "precious"


def test_a_run_without_a_finished_piece_leaves_nothing(tmp_path, out):
    with ResumeState(out, {"input": "x"}, {}) as state:
        assert json.loads((state.folder / "manifest.json").read_text())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_locks(clip, out, triton, monkeypatch, code):
    """As network file systems may be: the lease has to do."""

    def refuse(file, operation):
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    result = run_client(clip, out, "--url", triton.url)
    assert result.exit_code == 0, result.output


def test_a_lock_held_by_another_run(out):
    with (
        ResumeState(out, {"input": "x"}, {}),
        pytest.raises(UpscaleError, match="another run is writing"),
    ):
        ResumeState(out, {"input": "x"}, {})
