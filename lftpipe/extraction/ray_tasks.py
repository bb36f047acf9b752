"""`--ray`: shards as tasks of a Ray cluster. Ray chooses who computes what; the driver alone commits."""

import sys
from contextlib import redirect_stdout
from typing import Any

import torch

from lftpipe.base.errors import LftpipeError, SettingsError, StoreError
from lftpipe.extraction.compute import Work
from lftpipe.extraction.shard_job import produce, producer_of
from lftpipe.store import Sealed, ShardKey

#: Times that Ray runs a task again whose process or node died. Preemption does not count.
RETRIES = 10

#: Tasks that are asked for at once, for each that can run: the next one waits beside the process.
AHEAD = 2


def run_on_ray(work: Work) -> None:
    """Compute a plan's shards as tasks of a Ray cluster, each committed as it comes.

    Ray runs a task again if its process or node dies, or its result is lost; never if it raised an error.

    Raises
    ------
    LftpipeError
        The first one that a task raises, or if Ray is not installed or not to be reached.
    """
    ray = _ray()
    started = _connect(ray, work.settings.ray or "local")
    try:
        with redirect_stdout(sys.stderr):  # Ray prints there of a node that died, and `--json` has it alone
            _Tasks(ray, work).run()
    finally:
        if started:
            ray.shutdown()


class _Tasks:
    """The tasks that are asked for, and the shards that are not yet."""

    def __init__(self, ray: Any, work: Work) -> None:
        self._ray, self._work = ray, work
        cuda = work.settings.device.startswith("cuda")
        self._threads = work.settings.threads or (None if cuda else torch.get_num_threads())
        options = {
            "num_cpus": self._threads or 1,
            "num_gpus": 1 if cuda else 0,
            "max_retries": RETRIES,
            "retry_exceptions": False,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(self._threads)}} if self._threads else {},
        }
        self._shard = ray.remote(_shard).options(**options)
        self._measure = ray.remote(_measure).options(**options)
        total = ray.cluster_resources()
        slots = total.get("GPU", 0) if cuda else total.get("CPU", 1) // options["num_cpus"]
        if slots < 1:
            raise SettingsError(
                "--ray with no GPU" if cuda else f"--ray with no machine of {self._threads} CPUs",
                "a cluster that can run a task",
                "pass fewer --threads" if not cuda else "pass --device cpu, or add GPUs to the cluster",
            )
        self._ahead = int(slots) * AHEAD

    def run(self) -> None:
        """Until all shards are committed."""
        work, plan = self._work, self._ray.put(self._work.plan.to_json())
        place = work.settings.device, self._threads
        if work.measure:
            work.note(self._result(self._measure.remote(plan, *place)))
        todo, running = iter(work.keys), {}
        try:
            while True:
                for key in todo:
                    running[self._shard.remote(plan, key, *place)] = key
                    if len(running) >= self._ahead:
                        break
                if not running:
                    return
                (done,), _ = self._ray.wait(list(running), num_returns=1)
                key = running.pop(done)
                work.commit(self._result(done))
                work.advance(len(key.sequences) * work.plan.spec.context)
        finally:
            for each in running:
                self._ray.cancel(each, force=True)

    def _result(self, task: Any) -> Any:
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, LftpipeError):
                raise cause from None
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
            raise RuntimeError(f"{reason} (in a task of Ray)") from None
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise StoreError(
                f"a task of Ray that died {RETRIES + 1} times ({reason})",
                "processes that live",
                "look for what kills them (memory?); what is committed is kept",
            ) from None


def _shard(plan: dict[str, Any], key: ShardKey, device: str, threads: int | None) -> Sealed:
    """A task: compute one shard; the teacher stays loaded in the process for the next one."""
    if threads:
        torch.set_num_threads(threads)
    return produce(plan, key, device)


def _measure(plan: dict[str, Any], device: str, threads: int | None) -> dict[str, Any]:
    """A task: what computing in bfloat16 costs."""
    import json

    if threads:
        torch.set_num_threads(threads)
    return producer_of(json.dumps(plan), device).measure()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise SettingsError(
            "--ray without Ray", "the package ray", "install it: pip install 'lftpipe[ray]'"
        ) from None
    return ray


def _connect(ray: Any, address: str) -> bool:
    """Join a cluster, or begin one on this machine; whether this process did."""
    if ray.is_initialized():
        return False
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="error",
            include_dashboard=False if address == "local" else None,
            runtime_env={"env_vars": {"PYTHONPATH": ":".join(filter(None, sys.path))}}
            if address == "local"
            else None,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingsError(
            f"--ray {address} ({reason})", "the address of a Ray cluster", "check it with `ray status`"
        ) from None
    return True
