"""How gRPC connects: sizes of messages, pauses between attempts, signs of life."""

from __future__ import annotations

CHANNEL_OPTIONS: list[tuple[str, str | int]] = [
    # An hr frame of a 1280x720 clip is 44 MB; gRPC would stop at 4 MB.
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    # gRPC's own pause between connection attempts grows to two minutes. Its "minimum reconnect backoff" stays
    # at 20 s: that is also the time an attempt may take (gRPC's connection-backoff.md), and a server 300 ms
    # away with TLS, on a network that loses packets, takes seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 20_000),
    # Triton, as every gRPC server, answers pings without data that come more often than every five minutes
    # with "too_many_pings" and drops all requests: measured after four minutes with pings 60 s apart. Setting
    # them also has Linux close a connection that has not acknowledged what was sent for the second time.
    ("grpc.keepalive_time_ms", 301_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A connection of its own: another Server of this process must not share the one that is given up.
    ("grpc.use_local_subchannel_pool", 1),
]
