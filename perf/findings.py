"""What a sweep says in words: gains with their spread, and the choices that follow."""

from __future__ import annotations

from collections.abc import Mapping

from perf.points import Figure, Measured, described, grouped

PAIRED = ("instances", "form", "transport", "target")  # settings whose values are weighed against the first


def findings(points: list[Measured], keys: list[str], committed: Mapping[str, int]) -> list[str]:
    """Sentences for a sweep that varies these settings.

    Args:
        points: All of the sweep.
        keys: The settings in which they differ.
        committed: Setting -> what the served configuration has; empty: not known.
    """
    found = [text for key in PAIRED if key in keys and (text := gains(points, keys, key))]
    for key, choose in (("queue_delay_us", shortest_delay), ("instances", fewest_instances)):
        if key in keys:
            choice, reason = choose(points)
            found.append(reason + _beside_committed(key, choice, committed))
    return found


def gains(points: list[Measured], keys: list[str], key: str) -> str:
    """What every value of a setting gives over the first, all else equal."""
    rest = [other for other in keys if other != key]
    values = list(dict.fromkeys(point.settings[key] for point in points))
    by_place = {(point.settings[key], point.label(rest)): point for point in points}
    sentences = []
    for value in values[1:]:
        parts = [
            f"{change(before.fps, after.fps)}{' at ' * bool(place)}{place} ({verdict(before.fps, after.fps)})"
            for (_, place), before in by_place.items()
            if before.settings[key] == values[0] and (after := by_place.get((value, place)))
        ]
        if parts:
            sentences.append(
                f"Frames/s of {described(key, value)} against {described(key, values[0])}: "
                f"{'; '.join(parts)}."
            )
    return " ".join(sentences)


def change(before: Figure, after: Figure) -> str:
    """In percent; none is +0."""
    percent = round(100 * (after.median / before.median - 1))
    return f"{percent:+d}%"


def verdict(before: Figure, after: Figure) -> str:
    """What a difference means: machines are noisy."""
    if min(len(before.values), len(after.values)) == 1:
        return "one round: spread unknown"
    (low, high), (least, most) = before.span, after.span
    if low <= most and least <= high:
        return "within the spread"
    return "faster" if least > high else "slower"


def shortest_delay(points: list[Measured]) -> tuple[int | None, str]:
    """The shortest delay that costs no throughput under the heaviest load, and the reason in words."""
    most = max(point.settings["concurrency"] for point in points)
    loaded = [point for point in points if point.settings["concurrency"] == most]
    if any(len(point.fps.values) < 2 for point in loaded):
        return None, "One round of some points: without a spread, no choice."
    best = max(loaded, key=lambda point: point.fps.median)
    as_good = [point for point in loaded if point.fps.span[1] >= best.fps.span[0]]
    shortest = min(as_good, key=lambda point: int(point.settings["queue_delay_us"]))
    most_frames, least_wait = (
        f"{described('queue_delay_us', point.settings['queue_delay_us'])} ({point.fps.text(2)} frames/s)"
        for point in (best, shortest)
    )
    return int(shortest.settings["queue_delay_us"]), (
        f"With {most} in flight the most comes out at {most_frames}. The shortest within its spread, and so "
        f"the choice: **{least_wait}**."
    )


def fewest_instances(points: list[Measured]) -> tuple[int | None, str]:
    """The fewest instance groups that nothing beats beyond the spread, and the reason in words."""
    if any(len(point.fps.values) < 2 for point in points):
        return None, "One round of some points: without a spread, no choice."
    places = grouped(points, ["size", "batch", "concurrency", "transport"])
    fewest = max(
        min(
            (one for one in members if one.fps.span[1] >= max(other.fps.span[0] for other in members)),
            key=lambda one: int(one.settings["instances"]),
        ).settings["instances"]
        for members in places.values()
    )
    return int(fewest), (
        "The fewest that lose no throughput beyond the spread, at any batch, and so the choice: "
        f"**{described('instances', fewest)}**."
    )


def _beside_committed(key: str, choice: int | None, committed: Mapping[str, int]) -> str:
    """Whether what is served is what the sweep chooses."""
    if key not in committed:
        return ""
    served = described(key, committed[key])
    if choice is None or choice == committed[key]:
        return f" Served as committed: {served}."
    return f" Served as committed, when this was measured: {served}, **which is not the choice**."
