"""Hands trials to workers: Ray Tune over CPUs, GPUs and machines, or one after the other in this process.

Tune only dispatches. Its searcher asks the study for the next trial when a slot is free and tells it the
outcome; one actor per slot is reused and keeps its fork server warm. The ledger is the memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

from harness.errors import UserError
from harness.search import Finished
from harness.space import Rung
from harness.trial import TrialRunner, TrialSpec

IDLE_SECONDS = 0.1


class Source(Protocol):
    """What a dispatcher drives: the night's search."""

    slots: int

    def next_task(self) -> TrialSpec | None: ...
    def on_result(self, spec: TrialSpec, outcome: dict) -> None: ...
    def lost(self, spec: TrialSpec, detail: str) -> None: ...


def run_inline(source: Source) -> None:
    """One trial after the other in this process; for tests and debugging."""
    source.slots = 1
    runner = TrialRunner()
    try:
        while True:
            spec = source.next_task()
            if spec is None:
                time.sleep(IDLE_SECONDS)  # a proposer is still thinking
                continue
            source.on_result(spec, runner.run(spec))
    except Finished:
        return
    finally:
        runner.close()


def run_ray(source: Source, rung: Rung, scratch: Path, *, address: str | None, workers: int | None) -> None:
    """Asynchronous over all of Ray's resources; `scratch` is a folder that every node sees.

    Raises UserError when no cluster can be had or used.
    """
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0",
        RAY_AIR_NEW_OUTPUT="0",
        RAY_DEDUP_LOGS="0",
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_DISABLE_SIGINT_HANDLER="1",
        TUNE_MAX_PENDING_TRIALS_PG="1",
        TUNE_GLOBAL_CHECKPOINT_S="3600",
    )
    import logging

    import ray
    from ray import tune

    try:
        ray.init(
            address=address,
            num_cpus=workers if address is None else None,
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=150 << 20 if address is None else None,
        )
    except Exception as error:
        where = f"--ray-address {address}" if address else "Ray on this machine"
        raise UserError(f"{where}: cannot start: {_first_line(error)}") from None
    try:
        have = ray.cluster_resources()
        source.slots = _slots(have, rung)
        if source.slots < 1:
            raise UserError(
                f"a trial needs {rung.cpus:g} CPUs and {rung.gpus:g} GPUs, the cluster has "
                f"{have.get('CPU', 0):g} and {have.get('GPU', 0):g}; lower [[rungs]] or add machines"
            )
        searcher = _searcher(source)
        tune.Tuner(
            tune.with_resources(_slot_trainable(), _resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher, num_samples=-1, reuse_actors=True, metric="ok", mode="max"
            ),
            run_config=tune.RunConfig(
                storage_path=str(scratch.resolve()),
                name="night",
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        ).fit()
    finally:
        with contextlib.suppress(Exception):
            ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
    if searcher.error is not None:
        raise searcher.error


def _slots(have: dict[str, float], rung: Rung) -> int:
    by_gpu = have.get("GPU", 0) / rung.gpus if rung.gpus else float("inf")
    return int(min(have.get("CPU", 0) / rung.cpus, by_gpu))


def _resources(config: dict) -> Any:
    from ray import tune

    return tune.PlacementGroupFactory([{"CPU": config["spec"]["cpus"], "GPU": config["spec"]["gpus"]}])


def _searcher(source: Source) -> Any:
    """Tune's side of the bridge: suggest asks the study, completion tells it."""
    from ray.tune.search import Searcher

    class StudySearcher(Searcher):
        def __init__(self) -> None:
            super().__init__(metric="ok", mode="max")
            self._specs: dict[str, TrialSpec] = {}
            self.error: BaseException | None = None

        def suggest(self, trial_id: str) -> dict | str | None:
            if self.error is not None:
                return Searcher.FINISHED
            try:
                spec = source.next_task()
            except Finished:
                return Searcher.FINISHED
            except Exception as error:  # ours, not Tune's to log and swallow
                self.error = error
                return Searcher.FINISHED
            if spec is None:
                time.sleep(IDLE_SECONDS)  # Tune's loop spins while there is nothing to start
                return None
            self._specs[trial_id] = spec
            return {"spec": spec.as_dict()}

        def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
            spec = self._specs.pop(trial_id, None)
            if spec is None or self.error is not None:
                return
            try:
                if error or not result or "outcome" not in result:
                    source.lost(spec, "its worker died")
                else:
                    source.on_result(spec, result["outcome"])
            except Exception as failure:
                self.error = failure

        def save(self, checkpoint_path: str) -> None:
            """Tune's folders are scratch: the ledger is the memory."""

        restore = save

    return StudySearcher()


def _slot_trainable() -> Any:
    from ray import tune

    class Slot(tune.Trainable):
        """One worker's slot; reused from trial to trial."""

        def setup(self, config: dict) -> None:
            self._runner = TrialRunner()

        def step(self) -> dict:
            raw = self.config["spec"]
            outcome = self._runner.run(TrialSpec(**{**raw, "splits": tuple(raw["splits"])}))
            return {"ok": 1.0, "outcome": outcome, "done": True}

        def reset_config(self, new_config: dict) -> bool:
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Nothing to keep: a trial's folder is its own."""

        def load_checkpoint(self, checkpoint: Any) -> None:
            """See save_checkpoint."""

        def cleanup(self) -> None:
            self._runner.close()

    return Slot


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
