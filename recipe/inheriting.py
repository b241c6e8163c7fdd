"""What a phase takes over of the phases before it, key by key, before the run file is checked."""

from typing import Any

from pydantic import BaseModel

from data.feed.masking import DEFAULT, MASKINGS
from flexbert_core.composing import merge


def inherit_masking(node: dict[str, Any]) -> Any:
    """The phases of a run file, not yet checked; where one has `masking`, the keys that it leaves out are those of the
    phase before, of the run for the first, unless it names another masking. A schedule of the rate is of one phase.
    What is no section is left to the check."""
    phases = node["phases"]
    known = _known(merge({"name": DEFAULT}, _plain(node.get("masking") or {}), place=_PLACE))
    if not isinstance(phases, list):
        return phases
    whole = []
    for phase in phases:
        if isinstance(phase, dict) and phase.get("masking") is not None:
            phase = {**phase, "masking": merge(known, _plain(phase["masking"]), place=_PLACE)}
            known = _known(phase["masking"])
        known = _settled(known)
        whole.append(phase)
    return whole


_PLACE = ("masking",)


def _settled(masking: dict[str, Any]) -> dict[str, Any]:
    """As the phase behind one of this masking takes it over: the rate is where its schedule ended."""
    schedule = masking.get("rate_schedule")
    if not isinstance(schedule, dict) or "to" not in schedule:
        return masking
    return {**masking, "rate": schedule["to"], "rate_schedule": None}


def _plain(masking: Any) -> Any:
    return masking.model_dump(exclude_unset=True) if isinstance(masking, BaseModel) else masking


def _known(masking: Any) -> dict[str, Any]:
    """Of a section, the keys that its entry knows: a wrong one is told once, where it stands."""
    if isinstance(masking, str):
        masking = {"name": masking}
    if not isinstance(masking, dict):
        return {"name": DEFAULT}
    entry = MASKINGS.entries.get(str(masking.get("name")))
    return {key: value for key, value in masking.items() if entry is None or key in entry.Config.model_fields}
