"""Ways to carry sessions: in memory, over QUIC, over gRPC."""

import os

os.environ.setdefault(
    "GRPC_VERBOSITY", "NONE"
)  # read when grpc is imported; its core tells stderr what is raised anyway
