"""Ray Train without its hold on Ctrl-C."""

from __future__ import annotations

import threading
from typing import Any


def fit(trainer: Any) -> Any:
    """`trainer.fit()` of Ray Train in a thread of its own, its result or its exception.

    In the main thread Ray 2.60 installs a SIGINT handler that it never takes back: neither Ctrl-C nor a lost lease
    could interrupt the fit, or anything after it. Here an interrupt goes up at once; the training ends with the
    driver's connection to Ray.
    """
    outcome: dict[str, Any] = {}

    def target() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=target, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():  # a join without a timeout would hold signals back
        thread.join(0.2)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
