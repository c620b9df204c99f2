"""Interlaced frames in, as many progressive frames out, at the same times."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import av
from av.error import BlockingIOError as NotYet
from av.error import EOFError as Ended
from av.filter import Graph
from av.video.stream import VideoStream

OFF, AUTO, ON = "off", "auto", "on"
DEINTERLACE = (OFF, AUTO, ON)
SMALLEST_SIDE_PX = 3  # of what bwdif takes


def progressive(
    frames: Iterator[av.VideoFrame], stream: VideoStream, deinterlace: str
) -> Iterator[av.VideoFrame]:
    """Deinterlace frames with FFmpeg's bwdif, one frame for each.

    Args:
        frames: All of one size and format; ``pts`` set.
        stream: Where they come from.
        deinterlace: No frames, those that say they are interlaced, or all.
    """
    if deinterlace == OFF:
        yield from frames
        return
    graph: Graph | None = None
    waiting: deque[tuple[int | None, int | None]] = deque()  # what the filter holds back: pts and duration
    shape: tuple[int, int, str] | None = None
    for frame in frames:
        found = (frame.width, frame.height, frame.format.name)
        if min(frame.width, frame.height) < SMALLEST_SIDE_PX:
            yield frame
            continue
        if found != shape:
            if graph:
                yield from _out_of(graph, None, waiting)
            graph, shape = _graph(frame, stream, deinterlace), found
        assert graph is not None
        waiting.append((frame.pts, frame.duration))
        yield from _out_of(graph, frame, waiting)
    if graph:
        yield from _out_of(graph, None, waiting)


def _graph(frame: av.VideoFrame, stream: VideoStream, deinterlace: str) -> Graph:
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=stream.time_base
    )
    which = "all" if deinterlace == ON else "interlaced"
    graph.link_nodes(
        source, graph.add("bwdif", f"mode=send_frame:deint={which}"), graph.add("buffersink")
    ).configure()
    return graph


def _out_of(
    graph: Graph, frame: av.VideoFrame | None, waiting: deque[tuple[int | None, int | None]]
) -> Iterator[av.VideoFrame]:
    graph.vpush(frame)
    while True:
        try:
            done = graph.vpull()
        except (NotYet, Ended):
            return
        done.pts, duration = waiting.popleft()
        done.duration = duration or 0
        yield done
