"""The report's numbers once more, by a second path: from the records and textbook formulas, not from `build`."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from harness.ledger import Event
from harness.report.document import Number, Report, walk
from harness.view import StudyView

Facts = dict[str, float | int | None]
Scores = dict[
    tuple[str, int, str], dict[int, float]
]  # (settings' owner, rung, split) -> seed -> bits per byte
ANY_STATE = ("price", "failures", "seconds")  # what these count, failed trials may be part of


def recheck(view: StudyView, report: Report) -> list[str]:
    """One line per number that the records do not bear out."""
    problems = _wrong_verdicts(view)
    known = facts(view)
    complete = {t.id for t in view.trials.values() if t.finished.get("state") == "COMPLETE"}
    for number in dict.fromkeys(walk(report, Number)):
        if number.value is not None and number.key.split("/")[0] not in ANY_STATE:
            loose = [t for t in number.trials if t not in complete]
            problems += [f"{number.key}: {number} stands on {t}, which has no COMPLETE finish" for t in loose]
        if number.key not in known:
            problems.append(f"{number.key}: {number} stands there, the records give nothing")
        elif not _same(number.value, known[number.key]):
            problems.append(
                f"{number.key}: {number.value} stands there, the records give {known[number.key]}"
            )
    return problems


def _same(a: float | int | None, b: float | int | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def facts(view: StudyView) -> Facts:
    """Every number a report may show, by its key."""
    scores = _scores(view)
    parts = (_measured(view, scores), _decided(view), _counted(view), _spent(view))
    return {key: value for part in parts for key, value in part.items()}


def _scores(view: StudyView) -> Scores:
    scores: Scores = defaultdict(dict)
    for t in view.trials.values():
        c = view.candidates[t.candidate].proposed
        if t.finished.get("state") == "COMPLETE":
            for split, value in t.scores.items():
                scores[c["against"] if c.get("placebo") else t.candidate, t.rung, split][t.seed] = value
    return scores


def _pooled(view: StudyView, scores: Scores, rung: int) -> tuple[float, int, float] | None:
    """(variance, df, seed correlation) at a rung, or None where no settings ran twice."""
    runs = {
        owner: np.array(list(s.values()))
        for (owner, r, split), s in scores.items()
        if (r, split) == (rung, "val")
    }
    df = sum(len(x) - 1 for x in runs.values())
    if df <= 0:
        return None
    spread = {k: (x - x.mean()) / math.sqrt(1 - 1 / len(x)) for k, x in runs.items() if len(x) > 1}
    cap = 4 * 1.4826 * float(np.median(np.abs(np.concatenate(list(spread.values()))))) or math.inf
    capped = {k: np.clip(x, -cap, cap) for k, x in spread.items()}
    variance = max(sum((x**2).sum() * (1 - 1 / len(x)) for x in capped.values()) / df, 1e-18)
    sums = np.zeros((2, 2))
    for owner in runs:
        mine, theirs = (
            scores[owner, rung, "val"],
            scores.get((view.candidates[owner].against, rung, "val"), {}),
        )
        both = [(theirs[s], mine[s]) for s in mine if s in theirs]
        if len(both) >= 2:
            sums += (len(both) - 1) * np.cov(np.array(both).T)
    return variance, df, float(np.clip(sums[0, 1] / (sums.diagonal().max() + 6 * variance), 0.0, 0.95))


def _gain(runs: dict[int, float], control: dict[int, float], v: float, rho: float) -> tuple[float, float]:
    """Control-variate difference and its standard error (see `harness.stats.difference`)."""
    c, x, n, m = np.mean(list(control.values())), np.mean(list(runs.values())), len(runs), len(control)
    if not runs.keys() <= control.keys():
        return float(c - x), math.sqrt(v * (1 / n + 1 / m))
    on_seeds = np.mean([control[s] for s in runs])
    return float(c - (x - rho * (on_seeds - c))), math.sqrt(v * ((1 - rho**2) / n + (1 - rho) ** 2 / m))


def _t(df: int) -> float:
    from scipy.stats import t

    return float(t.isf(0.025, df))


def _measured(view: StudyView, scores: Scores) -> Facts:
    from scipy.stats import chi2

    found: Facts = {f"mean/{c}/{r}/{s}": float(np.mean(list(x.values()))) for (c, r, s), x in scores.items()}
    base, rule = view.baseline, view.space.decision
    for c in view.candidates:
        found.setdefault(f"mean/{c}/0/val", None)
    for rung in range(len(view.space.rungs)):
        control, noise = scores.get((base, rung, "val"), {}), _pooled(view, scores, rung)
        found.setdefault(f"mean/{base}/{rung}/val", None)
        found[f"control/{rung}/n"] = n = len(control)
        sd = float(np.std(list(control.values()), ddof=1)) if n >= 2 else None
        found[f"control/{rung}/sd"] = sd
        for name, q in (("low", 0.025), ("high", 0.975)):
            found[f"control/{rung}/{name}"] = sd and sd * math.sqrt((n - 1) / float(chi2.isf(q, n - 1)))
        if noise:
            found |= {
                f"noise/{rung}/sigma": noise[0] ** 0.5,
                f"noise/{rung}/df": noise[1],
                f"noise/{rung}/rho": noise[2],
            }
        for (owner, r, split), runs in scores.items():
            if (r, split) == (rung, "val"):
                found |= _row(view, owner, rung, runs, control, noise)
    noise, m = _pooled(view, scores, 0), len(scores.get((view.incumbent, 0, "val"), {}))
    for i, n in enumerate(rule.looks):
        if noise and m:
            se = math.sqrt(noise[0] * ((1 - noise[2] ** 2) / n + (1 - noise[2]) ** 2 / m))
            found[f"needed/{i}"] = rule.keep[i] * (1 + 1.5 / noise[1]) * se
    ends = [scores.get((c, 0, "audit"), {}) for c in (base, view.incumbent)]
    return found | _paired("whole", *ends)


def _row(view: StudyView, owner: str, rung: int, runs: dict, control: dict, noise: tuple | None) -> Facts:
    key = f"{owner}/{rung}"
    owners = [owner, *(c.id for c in view.candidates.values() if c.placebo and c.against == owner)]
    seconds = [
        t.finished["train_seconds"]
        for t in view.trials.values()
        if t.candidate in owners
        and t.rung == rung
        and "val" in t.scores
        and t.finished.get("train_seconds") is not None
    ]
    found: Facts = {f"n/{key}": len(runs), f"train/{key}": float(np.mean(seconds)) if seconds else None}
    found |= {f"se/{key}": noise and math.sqrt(noise[0] / len(runs)), f"gain/{key}/delta": None}
    if noise and control and owner != view.baseline:
        delta, se = _gain(runs, control, noise[0], noise[2])
        half = _t(noise[1]) * se
        found |= {
            f"gain/{key}/delta": delta,
            f"gain/{key}/low": delta - half,
            f"gain/{key}/high": delta + half,
        }
    return found


def _paired(key: str, control: dict[int, float], runs: dict[int, float]) -> Facts:
    gains = np.array([control[s] - runs[s] for s in runs if s in control])
    found: Facts = {f"{key}/n": len(gains), f"{key}/delta": None, f"{key}/low": None, f"{key}/high": None}
    if len(gains) >= 2:
        half = _t(len(gains) - 1) * gains.std(ddof=1) / math.sqrt(len(gains))
        middle = gains.mean()
        found |= {f"{key}/delta": middle, f"{key}/low": middle - half, f"{key}/high": middle + half}
    return found


def _listed(view: StudyView, trials: list[str], split: str) -> dict[int, float]:
    known = (view.trials[t] for t in trials if t in view.trials)
    return {
        t.seed: t.scores[split] for t in known if split in t.scores and t.finished.get("state") == "COMPLETE"
    }


def _verdict(view: StudyView, e: Event) -> Facts:
    """delta, se, z and interval of a verdict from the scores of the trials it lists; n and m are their counts."""
    runs, control = (_listed(view, e[side], e["split"]) for side in ("trials", "control"))
    found: Facts = {"n": len(runs), "m": len(control) if "m" in e else None}
    if "delta" not in e or not runs or not control:
        return found | dict.fromkeys(("delta", "se", "z", "low", "high"))
    delta, se = _gain(runs, control, e["sigma"] ** 2, e["rho"])
    half = _t(e["df"]) * se
    return found | {"delta": delta, "se": se, "z": delta / se, "low": delta - half, "high": delta + half}


def _wrong_verdicts(view: StudyView) -> list[str]:
    problems = []
    for c in view.candidates.values():
        for i, e in enumerate(c.verdicts):
            again = _verdict(view, e)
            problems += [
                f"verdict {i} of {c.id}: {name} {e[name]} is recorded, its trials give {again[name]}"
                for name in ("n", "m", "delta", "se", "z")
                if name in e and not _same(e[name], again[name])
            ]
            if e["verdict"] == "keep" and not e["z"] >= e["bounds"][1]:
                problems.append(
                    f"verdict {i} of {c.id}: kept with z {e['z']} below its bound {e['bounds'][1]}"
                )
    return problems


def _decided(view: StudyView) -> Facts:
    found: Facts = {"keeps": sum(_kept(c) for c in view.candidates.values())}
    for c in view.candidates.values():
        for i, e in enumerate(c.verdicts):
            found |= {f"verdict/{c.id}/{i}/{name}": value for name, value in _verdict(view, e).items()}
            for a in (view.trials[t] for t in e["trials"]):
                for b in (view.trials[t] for t in e["control"] if view.trials[t].seed == a.seed):
                    if e["split"] in a.scores and e["split"] in b.scores:
                        gain = np.subtract(b.scores[e["split"]], a.scores[e["split"]])
                        found[f"pair/{a.id}/{b.id}/{e['split']}"] = float(gain)
    for i, e in enumerate(view.promoted):
        found |= _paired(
            f"promoted/{i}", _listed(view, e["control"], e["split"]), _listed(view, e["trials"], e["split"])
        )
    return found


def _kept(c: Any) -> bool:
    return not c.placebo and any(e["verdict"] == "keep" for e in c.verdicts)


def _counted(view: StudyView) -> Facts:
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


def _spent(view: StudyView) -> Facts:
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
    seconds, kept = math.fsum(t.finished.get("train_seconds") or 0.0 for t in trials), sum(map(_kept, mine))
    last = Counter(c.verdicts[-1]["verdict"] if c.verdicts else "retest" for c in mine if arm != "baseline")
    return {
        "proposals": len(mine),
        "rejected": sum(e["arm"] == arm for e in view.rejected),
        "trainings": len(trials),
        "kept": kept,
        "discarded": last["discard"],
        "no-effect": last["no-effect"],
        "open": last["retest"],
        "train s": seconds,
        "kept per training hour": 3600 * kept / seconds if seconds else None,
        "USD": math.fsum(usd) if usd else None,
        "kept per USD": kept / math.fsum(usd) if math.fsum(usd) else None,
    }
