"""The setting `engine`: where independent pieces of work are done. Results do not depend on it; no run records it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from prunekit.runtime.errors import UserError
from prunekit.runtime.executors import SETTING, Executor, LocalExecutor
from prunekit.runtime.progress import Log
from prunekit.runtime.yaml_files import load_overrides, resolved


class EngineConfig(BaseModel):
    """Where independent pieces of work are done: each model's fine-tuning, batches of pictures, cells of a table."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    kind: Literal["local", "ray"] = Field(
        "local", description="local: by the processes that share the directory; ray: as tasks of a Ray cluster."
    )
    address: str = Field(
        "auto", description='Address of the Ray cluster. "auto": the one of this machine; "local": start one here.'
    )
    cpus: float = Field(1, gt=0, description="CPUs of a Ray task, and the threads that it computes with.")
    gpus: float | None = Field(
        None, ge=0, description="GPUs of a Ray task, or a share of one; unset: 1 if the cluster has GPUs, else 0."
    )


LOCAL = EngineConfig()


def _as_engine(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Engine = Annotated[
    EngineConfig,
    BeforeValidator(_as_engine),
    Field(exclude=True, description="Engine of independent pieces of work: local, ray, or {kind: ray, gpus: 1}."),
]


class _Settings(BaseModel):
    """The settings of a command whose only setting is `engine`."""

    model_config = ConfigDict(extra="forbid")

    engine: Engine = LOCAL


def load_engine(overrides: Iterable[str]) -> EngineConfig:
    """Return the engine from the `key=value` settings of a command that has no other settings.

    Raises:
        UserError: a setting is unknown or has a faulty value.

    """
    try:
        return _Settings.model_validate(resolved(load_overrides(overrides), "settings")).engine
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(
            f"setting {name}: {first['msg'][0].lower()}{first['msg'][1:]}; give {SETTING}=local or {SETTING}=ray, or "
            f"{SETTING}.{{{','.join(EngineConfig.model_fields)}}}"
        ) from error


@contextmanager
def executor_of(engine: EngineConfig, log: Log) -> Iterator[Executor]:
    """Yield the executor of an engine, and close it when the context ends.

    log: receives the lines and rows of tasks on other nodes.

    Raises:
        UserError: Ray is not installed, no cluster is at the address, or this process is one of several in a launch.

    """
    if engine.kind == "local":
        yield LocalExecutor()
        return
    from prunekit.runtime.ray_executor import cluster

    with cluster(engine.address, engine.cpus, engine.gpus, log) as executor:
        yield executor
