"""Many clips in one go, and what people and programs are told."""

from __future__ import annotations

import json
import time

import pytest
from client_fakes import FakeTriton, decoded, frame_times, pictures, run_client, write_clip


@pytest.fixture
def folder(tmp_path):
    """Three clips, one of them broken, and a file that is no video."""
    films = tmp_path / "films"
    films.mkdir()
    write_clip(films / "a.mp4", pictures(3))
    (films / "b.mp4").write_text("not a video")
    write_clip(films / "c.avi", pictures(4), codec="mpeg4", pix_fmt="yuv420p")
    (films / "notes.txt").write_text("to do")
    return films


def test_a_folder_of_videos(tmp_path, triton, folder):
    """Each clip has its line; one that fails does not stop the others, and the exit status tells."""
    out = tmp_path / "out"
    result = run_client(folder, out, "--url", triton.url)
    assert result.exit_code == 1
    assert sorted(path.name for path in out.iterdir()) == ["a.mp4", "c.avi.mkv"]
    assert len(decoded(out / "a.mp4")) == 3 and len(decoded(out / "c.avi.mkv")) == 4
    assert f"{folder / 'b.mp4'}: expected a video, found" in result.output
    assert f"{out / 'a.mp4'}: 3 frames" in result.output

    write_clip(folder / "b.mp4", pictures(2))
    before = len(triton.ids)
    result = run_client(folder, out, "--url", triton.url)
    assert result.exit_code == 0, result.output
    assert len(triton.ids) == before + 2  # what is done is left alone
    assert f"{out / 'a.mp4'}: is there already" in result.output


def test_a_pattern(tmp_path, triton, folder):
    result = run_client(folder / "[ac].*", tmp_path / "out", "--url", triton.url)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_one_clip_into_a_folder(tmp_path, triton, folder):
    (tmp_path / "out").mkdir()
    assert run_client(folder / "a.mp4", tmp_path / "out", "--url", triton.url).exit_code == 0
    assert len(decoded(tmp_path / "out" / "a.mp4")) == 3


def test_a_pattern_without_matches(tmp_path, triton):
    result = run_client(tmp_path / "*.mp4", tmp_path / "out", "--url", triton.url)
    assert result.exit_code == 1
    assert "expected files, found none that match" in result.output


def test_a_folder_without_videos(tmp_path, triton):
    result = run_client(tmp_path, tmp_path / "out", "--url", triton.url)
    assert result.exit_code == 1
    assert "expected a folder of videos or images, found none in" in result.output


def test_many_clips_into_one_file(triton, folder):
    result = run_client(folder, folder / "a.mp4", "--url", triton.url)
    assert result.exit_code == 1
    assert "expected a folder for the 3 clips of" in result.output


def test_an_output_that_is_its_input(tmp_path, triton, folder):
    before = (folder / "a.mp4").read_bytes()
    for src, dst in ((folder / "a.mp4", folder / "a.mp4"), (folder, folder)):
        result = run_client(src, dst, "--url", triton.url, "--overwrite")
        assert result.exit_code == 1
        assert f"found that {folder / 'a.mp4'} is the input" in result.output
    assert (folder / "a.mp4").read_bytes() == before


def test_a_folder_that_cannot_be_made(triton, folder):
    result = run_client(folder, "/sys/out", "--url", triton.url)
    assert result.exit_code == 1
    assert "cannot make the folder /sys/out" in result.output


def test_json_events(tmp_path, monkeypatch):
    monkeypatch.setattr("mst_gan_client.progress.EVENT_EVERY_S", 0.05)
    clip = write_clip(tmp_path / "in.mp4", pictures(40))
    with FakeTriton(before_answer=lambda _: time.sleep(0.05)) as triton:
        result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url, "--json")
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "started" and kinds[-1] == "finished" and set(kinds[1:-1]) == {"progress"}
    assert events[0]["frames"] == 40
    done = [event["frames_done"] for event in events[1:-1]]
    assert done == sorted(done) and 0 < done[0] <= done[-1] <= 40
    assert events[-1]["frames"] == 40 and events[-1]["hr_size"] == [128, 192]
    assert set(events[-1]["stages_s"]) == {"decode", "transfer", "inference", "encode"}
    assert all(busy_s >= 0 for busy_s in events[-1]["stages_s"].values())


def test_json_tells_of_a_failure(tmp_path, triton):
    result = run_client(tmp_path / "none.mp4", tmp_path / "out.mp4", "--url", triton.url, "--json")
    assert result.exit_code == 1
    (event,) = map(json.loads, result.stdout.splitlines())
    assert event == {"event": "failed", "input": f"{tmp_path}/none.mp4", "reason": event["reason"]}
    assert "no such file" in event["reason"]


def test_json_events_of_a_folder(tmp_path, triton, folder):
    result = run_client(folder, tmp_path / "out", "--url", triton.url, "--json")
    kinds = [json.loads(line)["event"] for line in result.stdout.splitlines()]
    assert (result.exit_code, kinds) == (1, ["started", "finished", "failed", "started", "finished"])


def test_quiet(tmp_path, triton):
    clip = write_clip(tmp_path / "in.mp4", pictures(3))
    result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url, "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_lines_where_there_is_no_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr("mst_gan_client.progress.LINE_EVERY_S", 0.05)
    clip = write_clip(tmp_path / "in.mp4", pictures(40))
    with FakeTriton(before_answer=lambda _: time.sleep(0.05)) as triton:
        result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url)
    lines = [line for line in result.stderr.splitlines() if line.startswith("out.mp4: frame ")]
    assert lines and "/40, " in lines[0] and " fps, " in lines[0] and lines[0].endswith(" s left")


def test_a_bar_on_a_terminal(tmp_path, triton, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    clip = write_clip(tmp_path / "in.mp4", pictures(20))
    result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url)
    assert result.exit_code == 0
    assert "20/20" in result.stderr and "fps" in result.stderr


def test_dry_run_of_images(tmp_path, triton):
    (tmp_path / "frames").mkdir()
    for number, image in enumerate(pictures(3)):
        path = tmp_path / "frames" / f"{number}.png"
        write_clip(path, [image], codec="png", pix_fmt="rgb24", container_options={"update": "1"})
    result = run_client(tmp_path / "frames", tmp_path / "out", "--url", triton.url, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "3 frames to" in result.output and not (tmp_path / "out").exists()


def test_dry_run(tmp_path, triton):
    clip = write_clip(tmp_path / "in.mp4", pictures(60), audio=True)
    result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url, "--dry-run")
    assert result.exit_code == 0, result.output
    assert f"{clip}: 60 frames to {tmp_path / 'out.mp4'}, 192x128, about " in result.output
    assert len(triton.ids) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_defaults_from_the_environment(tmp_path, triton, monkeypatch):
    monkeypatch.setenv("UPSCALE_URL", triton.url)
    monkeypatch.setenv("UPSCALE_MAX_FRAMES", "2")
    clip = write_clip(tmp_path / "in.mp4", pictures(5))
    assert run_client(clip, tmp_path / "out.mp4").exit_code == 0
    assert len(frame_times(tmp_path / "out.mp4")) == 2


def test_help_is_in_topics_that_fit_a_screen():
    result = run_client("--help")
    assert result.exit_code == 0
    topics = [topic.splitlines() for topic in result.output.split("\n\n")]
    names = [topic[0] for topic in topics if topic[0].endswith(":")]
    assert names == ["The server:", "What is read:", "What is written:", "The run:"]
    assert all(len(topic) <= 24 for topic in topics)
    options = [line for topic in topics for line in topic if topic[0] in names and line.startswith(" ")]
    assert all(line.startswith("  --") and len(line) < 80 for line in options)
