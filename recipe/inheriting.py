"""What a phase takes over of the phases before it, key by key, before the run file is checked."""

from typing import Any

from data.feed.masking import MaskingConfig


def inherit_masking(node: dict[str, Any]) -> Any:
    """The phases of a run file, not yet checked; where one has `masking`, the keys that it leaves out are those of the
    phase before, of the run for the first. What is no section is left to the check."""
    phases, known = node["phases"], _keys(node.get("masking"))
    if not isinstance(phases, list):
        return phases
    whole = []
    for phase in phases:
        if isinstance(phase, dict) and phase.get("masking") is not None:
            given = phase["masking"]
            if isinstance(given, MaskingConfig):
                given = given.model_dump(exclude_unset=True)
            if isinstance(given, dict):
                phase = {**phase, "masking": known | given}
                known = _keys(phase["masking"])
        whole.append(phase)
    return whole


def _keys(masking: Any) -> dict[str, Any]:
    """Of a section, those that the schema knows."""
    if isinstance(masking, MaskingConfig):
        masking = masking.model_dump(exclude_unset=True)
    return (
        {key: masking[key] for key in MaskingConfig.model_fields if key in masking} if isinstance(masking, dict) else {}
    )
