"""The refusal of a fit of STEGO that has lost its classes: its labels would be worse than none."""

from __future__ import annotations

from typing import Any

from model.stego_terms import LossTerms
from pipeline.semantics.stego_classes import effective_classes, lost_at_end, lost_early
from pipeline.semantics.stego_job import StegoSettings, TrainJob
from pipeline.semantics.stego_start import Similarities, look, margin


def require_classes(job: TrainJob, record: dict[str, Any]) -> None:
    """ValueError for a fit that was left early, or whose probe gives nearly everything to few classes at the end.

    `record` is what `train` has left. The message has the figures and what to do.
    """
    settings = job.settings
    if lost_early(record["history"], settings.classes):
        last = record["history"][-1]
        found = f"at step {last['step']} a batch uses {last['classes_used']} of {settings.classes} classes"
    elif lost_at_end(record["probe_sizes"], settings):
        sizes = record["probe_sizes"]
        used, effective = sum(size > 0 for size in sizes), effective_classes(sizes)
        found = f"{used} of {settings.classes} classes are used, as evenly as {effective:.1f} equal ones would be"
    else:
        return
    known = record.get("similarities")
    similarities = look(job) if known is None else Similarities(**known)
    why, mend = _why(settings.terms, similarities), _mend(settings)
    raise ValueError(f"STEGO's fit has lost its classes: {found}; {why}; {mend}")


def _why(terms: LossTerms, found: Similarities) -> str:
    pairs = ", ".join(
        f"{name} {getattr(terms, f'{name}_shift'):.2f} against {getattr(found, name):.2f}"
        for name in ("intra", "inter", "negative")
    )
    return (
        f"shift against mean similarity of its pairs: {pairs}; weighted together {margin(terms, found):+.2f}, "
        "and below 0 codes that are all alike score better than different ones"
    )


def _mend(settings: StegoSettings) -> str:
    raised = len(settings.auto_shifts) == 3
    first = "raise semantics.shifts" if raised else "set semantics.shifts to auto"
    features = "" if settings.conditioned else ", set semantics.conditioned to true"
    return f"{first}{features}, or ask for fewer semantics.classes"
