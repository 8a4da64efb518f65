"""Ways to carry sessions: in memory, over QUIC, over gRPC."""
