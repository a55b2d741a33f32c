"""What the night counted and spent once more, straight from the records: the second path beside `accounts`."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from harness.view import StudyView

Facts = dict[str, float | int | None]


def kept(c: Any) -> bool:
    return not c.placebo and any(e["verdict"] == "keep" for e in c.verdicts)


def counted(view: StudyView) -> Facts:
    candidates, trials = view.candidates.values(), view.trials.values()
    tried = [c for c in candidates if c.placebo and c.verdicts]
    audits = [
        c.verdicts[-1]["verdict"] for c in candidates if c.verdicts and c.verdicts[-1]["stage"] == "audit"
    ]
    a, f = len(audits), audits.count("discard")
    found: Facts = {"placebos/tried": len(tried), "audits/decided": a, "audits/failed": f}
    found["placebos/kept"] = sum(c.verdicts[-1]["verdict"] == "keep" for c in tried)
    found["audits/false_share"] = 0.1 * max(0.0, (f - 0.2 * a) / 0.7) / (a - f) if a >= 10 and a > f else None
    found |= {f"failures/{k}": n for k, n in Counter(str(t.failure) for t in trials if t.failure).items()}
    found |= {f"rejected/{k}": n for k, n in Counter(e["kind"] for e in view.rejected).items()}
    for c in candidates:
        mine = [t for t in trials if t.candidate == c.id]
        found[f"price/{c.id}/trainings"] = len(mine)
        found[f"price/{c.id}/seconds"] = math.fsum(t.seconds for t in mine)
        for rung, facts in enumerate(c.proposed["facts_by_rung"]):
            found |= {f"facts/{c.id}/{rung}/{name}": count for name, count in facts.items()}
    for t in trials:
        for split in ("val", "audit"):
            found[f"trial/{t.id}/{split}"] = (
                t.scores.get(split) if t.finished.get("state") == "COMPLETE" else None
            )
        found[f"seconds/{t.id}"] = t.finished.get("train_seconds")
    return found


def spent(view: StudyView) -> Facts:
    trials, calls = view.trials.values(), {e["call"]: e for e in view.spends}.values()
    found: Facts = {"cost/trainings": len(trials)}
    found |= {f"cost/{state}": n for state, n in Counter(str(t.state) for t in trials).items()}
    on_cpu = [t.seconds for t in trials if not view.space.rungs[t.rung].gpus]
    found["cost/cpu"] = math.fsum(on_cpu) if on_cpu else None
    found["cost/gpu_hours"] = view.gpu_seconds / 3600 if view.gpu_seconds else None
    found["cost/wall_hours"] = view.elapsed_seconds() / 3600
    for phase in ("settled", "reserved"):
        usd = [e["usd"] for e in calls if e["phase"] == phase]
        found[f"cost/usd/{phase}"] = math.fsum(usd) if usd else None
    for name in ("input_tokens", "output_tokens", "cache_write_tokens", "cache_read_tokens"):
        counts = [e[name] for e in calls if e.get(name) is not None]
        found[f"cost/{name}"] = sum(counts) if counts else None
    arms = {c.arm for c in view.candidates.values()} | {e["arm"] for e in (*view.rejected, *view.spends)}
    for arm in arms:
        usd = [e["usd"] for e in calls if e["arm"] == arm]
        found |= {f"arm/{arm}/{name}": value for name, value in _arm(view, arm, usd).items()}
    return found


def _arm(view: StudyView, arm: str, usd: list[float]) -> Facts:
    mine = [c for c in view.candidates.values() if c.arm == arm]
    ids = {c.id for c in mine}
    trials = [t for t in view.trials.values() if t.candidate in ids]
    seconds = math.fsum(t.finished.get("train_seconds") or 0.0 for t in trials)
    keeps, decided = sum(map(kept, mine)), mine if arm not in ("baseline", "source") else []
    last = Counter(c.verdicts[-1]["verdict"] if c.verdicts else "retest" for c in decided)
    return {
        "proposals": len(mine),
        "rejected": sum(e["arm"] == arm for e in view.rejected),
        "trainings": len(trials),
        "kept": keeps,
        "discarded": last["discard"],
        "no-effect": last["no-effect"],
        "open": last["retest"],
        "train s": seconds,
        "kept per training hour": 3600 * keeps / seconds if seconds else None,
        "USD": math.fsum(usd) if usd else None,
        "kept per USD": keeps / math.fsum(usd) if math.fsum(usd) else None,
    }
