"""What the agent is told: a static page on the question, and a bounded brief of the ledger for each call.

Only results of the development split are told: nothing that the audit measured leaves this module.
Every row is a JSON line without angle brackets, so no text of the ledger can leave its fence.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from harness.ledger import Event, number
from harness.records import BASELINE_ARM, Candidate, Status, TrialState
from harness.space import Settings, Space
from harness.view import StudyView

MAX_BRIEF_CHARS = 12_000
ROW_COUNTS = (12, 8, 5, 3, 2, 1)  # rows a section, from the fullest brief to the barest
BINDING_ROWS = 10  # a person's latest rejections, told in full
TEXT_CHARS = 160  # of one quoted text
CHANGES_CHARS = 300  # of one row's settings
BRACKETS = str.maketrans("<>", "‹›")
DEAD_AFTER = 3  # a family is dead when so many of its candidates ended and none was kept


def system_text(space: Space) -> str:
    """The part that stays the same all night, and so is cached by the API."""
    parameters = [
        json.dumps(
            {"key": key, **param.model_dump(exclude_defaults=True), "baseline": space.baseline[key]},
            ensure_ascii=False,
        )
        for key, param in space.params.items()
    ]
    constraints = [c.expr + (f" ({c.why})" if c.why else "") for c in space.constraints]
    constraints += [f"{key} within {space.match.tolerance:.1%} of the baseline's" for key in space.match.hold]
    fixed = json.dumps({k: v for k, v in space.baseline.items() if k not in space.params}, ensure_ascii=False)
    return _template("system.md").render(
        space=space, parameters=parameters, constraints=constraints, fixed=fixed
    )


def brief_text(view: StudyView, arm: str, made: Iterable[Settings] = ()) -> str:
    """The state of the study in at most MAX_BRIEF_CHARS characters, whatever the ledger's length.

    `made` are the arm's last proposals, oldest first, which the ledger may not hold yet.
    """
    binding, *others = _sections(view, arm)
    others.append(
        ("Your last proposals (waiting or just taken)", [_row(_changes(view, s)) for s in made][::-1])
    )
    for num_rows in ROW_COUNTS:
        shown = [binding, *((title, rows[:num_rows]) for title, rows in others)]
        text = _template("brief.md").render(noise=_noise(view), sections=shown)
        if len(text) <= MAX_BRIEF_CHARS:
            return text
    raise AssertionError(f"a brief of one row a section has {len(text)} characters")


@cache
def _template(name: str) -> Any:
    from jinja2 import Environment, StrictUndefined

    source = (Path(__file__).parent / "prompts" / name).read_text(encoding="utf-8")
    return Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined).from_string(source)


def _sections(view: StudyView, arm: str) -> list[tuple[str, list[str]]]:
    """Titles with their rows, the most telling row first; the first section is never shortened."""
    tried = [c for c in view.candidates.values() if c.arm != BASELINE_ARM and not c.placebo]
    best = heapq.nlargest(ROW_COUNTS[0], (c for c in tried if _look(c)), key=_z)
    shown = {c.id for c in best}
    latest = list(islice((c for c in reversed(tried) if c.id not in shown), ROW_COUNTS[0]))
    own = [c for c in tried if c.arm == arm]
    refused = [e for e in reversed(view.rejected) if e["arm"] == arm]
    people = [e for e in reversed(view.reviews.values()) if e["action"] == "reject"]
    return [
        ("Rejected by a person (binding)", [_row(_reviewed(view, e)) for e in people[:BINDING_ROWS]]),
        ("Incumbent and baseline", _standards(view)),
        ("Best candidates so far", [_row(_candidate(view, c)) for c in best]),
        ("Latest candidates", [_row(_candidate(view, c)) for c in latest]),
        ("Your families without a keep", [_row(f) for f in _dead_families(own)]),
        ("Failed runs by kind", [_row(f) for f in _failures(view)]),
        ("Your proposals that were refused", [_row(_refused(e)) for e in refused[: ROW_COUNTS[0]]]),
    ]


def _row(fields: dict[str, Any]) -> str:
    """One JSON line without angle brackets; what is missing is left out."""
    kept = {key: value for key, value in fields.items() if value not in (None, "", {})}
    return json.dumps(kept, allow_nan=False, ensure_ascii=False).translate(BRACKETS)


def _clip(text: Any, length: int = TEXT_CHARS) -> str:
    """At most `length` printable characters, none of which JSON would have to escape."""
    plain = "".join(c if c.isprintable() else " " for c in str(text or "")[:length])
    return plain.replace('"', "'").replace("\\", "/")


def _changes(view: StudyView, settings: Settings) -> dict[str, Any]:
    base = view.space.baseline
    changed = {k: v for k, v in settings.items() if k in view.space.params and v != base[k]}
    text = json.dumps(changed)
    return changed if len(text) <= CHANGES_CHARS else {"clipped": _clip(text, CHANGES_CHARS)}


def _round(value: Any, digits: int = 5) -> float | None:
    value = number(value)
    return None if value is None else round(value, digits)


def _noise(view: StudyView) -> str:
    sigma = next(
        (
            v["sigma"]
            for c in reversed(view.candidates.values())
            if (v := _look(c)) and number(v.get("sigma"))
        ),
        None,
    )
    control = list(view.control(view.incumbent, 0, "val").values())
    if sigma is None and len(control) >= 2:
        sigma = stdev(control)
    if sigma is None:
        return "not measured yet"
    return f"one seed's standard deviation is {sigma:.5f} bits per byte"


def _look(candidate: Candidate) -> Event | None:
    """The candidate's last verdict on the development split."""
    looks = (v for v in reversed(candidate.verdicts) if v["stage"] == "look" and v["split"] == "val")
    return next(looks, None)


def _z(candidate: Candidate) -> float:
    z = number((_look(candidate) or {}).get("z"))
    return -math.inf if z is None else z


def _standards(view: StudyView) -> list[str]:
    rows = []
    for name, candidate_id in (("incumbent", view.incumbent), ("baseline", view.baseline)):
        scores = list(view.control(candidate_id, 0, "val").values())
        rows.append(
            _row(
                {
                    "role": name,
                    "id": candidate_id,
                    "bpb": _round(mean(scores)) if scores else None,
                    "n": len(scores),
                    "changes": _changes(view, view.candidates[candidate_id].settings),
                }
            )
        )
    return rows


def _candidate(view: StudyView, candidate: Candidate) -> dict[str, Any]:
    look, failed = _look(candidate) or {}, next(iter(view.failures(candidate.id, 0)), None)
    proposed = candidate.proposed
    return {
        "id": candidate.id,
        "arm": candidate.arm,
        "status": candidate.status.value,
        "changes": _changes(view, candidate.settings),
        "gain": _round(look.get("delta")),
        "z": _round(look.get("z"), 2),
        "n": look.get("n"),
        "failed": failed.failure.value if failed else None,
        "family": _clip(proposed.get("family"), 60),
        "hypothesis": _clip(proposed.get("hypothesis")),
        "expected": _round(proposed.get("expected_effect")),
    }


def _reviewed(view: StudyView, review: Event) -> dict[str, Any]:
    candidate = view.candidates.get(review["candidate"])
    return {
        "id": review["candidate"],
        "why": _clip(review["why"]),
        "changes": _changes(view, candidate.settings) if candidate else None,
        "family": _clip(candidate.proposed.get("family"), 60) if candidate else None,
    }


def _dead_families(candidates: list[Candidate]) -> list[dict[str, Any]]:
    families = defaultdict(list)
    for candidate in candidates:
        if candidate.status not in (Status.OPEN, Status.AUDIT) and candidate.proposed.get("family"):
            families[candidate.proposed["family"]].append(candidate)
    dead = [
        {"family": _clip(family, 60), "ended": len(members), "best_z": _round(max(map(_z, members)), 2)}
        for family, members in families.items()
        if len(members) >= DEAD_AFTER and all(c.status != Status.KEPT for c in members)
    ]
    return sorted(dead, key=lambda f: -f["ended"])


def _failures(view: StudyView) -> list[dict[str, Any]]:
    failed = [t for t in view.trials.values() if t.state == TrialState.FAIL]
    latest = {t.failure: t for t in failed}
    return [
        {
            "failure": kind.value,
            "runs": runs,
            "latest": latest[kind].candidate,
            "changes": _changes(view, view.candidates[latest[kind].candidate].settings),
            "detail": _clip(latest[kind].detail),
        }
        for kind, runs in Counter(t.failure for t in failed).most_common()
    ]


def _refused(event: Event) -> dict[str, Any]:
    return {
        "kind": event["kind"],
        "detail": _clip(event["detail"]),
        "settings": _clip(json.dumps(event["settings"]), CHANGES_CHARS) if event.get("settings") else None,
    }
