"""What the phone and the cloud say to each other: frames, tensors, limits, errors, transports."""
