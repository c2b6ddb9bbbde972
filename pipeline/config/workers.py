"""The section that says how the work is done. Of it only the device, the batch sizes and the threads can change a row,
and only by rounding: the last bits of an embedding."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_serializer, model_validator

from pipeline.config.section import Section


class PoolSize(Section):
    """How many actors a stage has: one number, or `{min: 2, max: 8}`. `min` of them must fit the cluster before work
    begins; more, up to `max`, are started where there is room and when nodes join."""

    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"min": value, "max": value}
        if not isinstance(value, dict | PoolSize):
            raise ValueError("is a number of actors, or a range of them such as {min: 2, max: 8}")
        return value

    @model_validator(mode="after")
    def _is_a_range(self) -> PoolSize:
        if self.min > self.max:
            raise ValueError(f"has min {self.min} above max {self.max}")
        return self

    @model_serializer
    def _as_given(self) -> int | dict[str, int]:
        return self.min if self.min == self.max else {"min": self.min, "max": self.max}


def _custom_resource(name: str) -> str:
    if name in {"CPU", "GPU", "memory", "object_store_memory"}:
        raise ValueError(f"{name!r} is no custom resource; workers.cpus, .gpus and .memory_gb ask for Ray's own")
    return name


def _placeable(amount: float) -> float:
    if not amount >= 0.0001 or (amount > 1 and amount != int(amount)):
        raise ValueError("is no amount that Ray can reserve: at least 0.0001, and whole above 1")
    return amount


ResourceName = Annotated[str, AfterValidator(_custom_resource)]
Amount = Annotated[float, AfterValidator(_placeable)]


class WorkersConfig(Section):
    size: PoolSize = PoolSize(min=1, max=1)  # actors a stage
    device: str = Field("cpu", pattern="^(cpu|cuda)$")  # Ray shows an actor its own cards alone
    cpus: float = Field(1, gt=0)  # CPUs, and threads, of an actor
    gpus: float = Field(0, ge=0)  # GPUs of an actor; fractions share a card
    # Custom resources of Ray that an actor of a stage of the photos asks for, such as {accelerator_type:H200: 0.001}:
    # it is placed on nodes that have them; other stages run anywhere.
    resources: dict[Annotated[str, AfterValidator(_custom_resource)], Annotated[float, AfterValidator(_placeable)]] = (
        Field(default_factory=dict)
    )
    memory_gb: float = Field(2.5, gt=0)  # heap that Ray reserves for an actor
    # A shard that killed so many workers is given up; an image that alone killed one fewer gets the status `crashed`.
    # Raise it where workers are lost for reasons of their own; those that go down with their node do not count.
    attempts: int = Field(3, ge=2)
    # A worker that takes in no next image for so long, or for ten times as long as the photos it holds took so far (two
    # minutes at least), is killed and its shard tried again; None: it may hang for ever.
    hang_timeout_s: float | None = Field(3600, gt=0)
    batch_size: int = Field(1, ge=1)  # images a forward pass
    crop_batch: int = Field(16, ge=1)  # mask crops a forward pass
    prefetch: int = Field(4, ge=1, le=64)  # images fetched and decoded ahead of the device
    # Of fits that train a network, by Ray Train; 0: in the driver's process, on the CPUs of all workers together.
    train_workers: int = Field(0, ge=0)
    kmeans_device: Literal["cpu", "cuda"] = "cpu"  # cuda needs the extra u2label[gpu]

    @model_validator(mode="after")
    def _gpu_reserved(self) -> WorkersConfig:
        if self.device != "cpu" and self.gpus == 0:
            raise ValueError(f"device {self.device!r} needs workers.gpus above 0, so that Ray assigns the card")
        return self
