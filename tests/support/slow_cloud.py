"""A cloud server whose layers take their time: `python -m support.slow_cloud MS serve …`, so many ms each."""

from __future__ import annotations

import sys
import time
from typing import Any

from cloud_server.__main__ import main
from split_model.model import Model


def slow_down(layer_s: float) -> None:
    """From now on, in this process; the numbers stay what they are."""
    run = Model.run

    def slowly(model: Model, x: Any, start: int, stop: int, *more: Any) -> Any:
        due = time.perf_counter() + (stop - start) * layer_s
        made = run(model, x, start, stop, *more)
        time.sleep(max(0.0, due - time.perf_counter()))
        return made

    Model.run = slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    slow_down(float(sys.argv[1]) / 1000)
    sys.exit(main(sys.argv[2:]))
