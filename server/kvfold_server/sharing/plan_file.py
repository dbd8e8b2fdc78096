"""Plan files: a sharing plan as JSON, bound to a model, with how it was found and what each depth was measured to
cost."""

from __future__ import annotations

import json
import re
from functools import cached_property
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvfold_scheduler.sharing import InvalidPlanError, SharingEntry, SharingPlan
from kvfold_server.generation.model_info import DepthQuality

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable
    from pathlib import Path

    from kvfold_scheduler.geometry import CacheGeometry
    from kvfold_server.sharing.fingerprint import ModelFingerprint

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


_TABLE_ROW = re.compile(r'\{\s+"(?:sharer|shared_layers)"[^{}]*\}')
"""An entry or a measured depth as `json.dumps` indents it."""


class PlanFileError(ValueError):
    """A plan file cannot be read, or is not a plan; the message names the file and says why."""


class PlanMismatchError(ValueError):
    """A plan is for another model than the one at hand; the message says what differs."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PlannedModel(_Part):
    """The model that a plan is bound to. `name` is for people; the rest is compared."""

    name: str
    model_type: str
    layer_count: Annotated[int, Field(ge=1)]
    config_hash: Hash
    weights_hash: Hash
    hash_method: str


class TextDescription(_Part):
    """Text that was used: `generated` by the model itself, or from a `file`. `sha256` is of its token ids."""

    source: Literal["generated", "file"]
    name: str | None = None
    sequences: Annotated[int, Field(ge=1)]
    tokens_per_sequence: Annotated[int, Field(ge=1)]
    seed: int | None = None
    sha256: Hash


class Search(_Part):
    """How the entries were found. `formula` says what their scores are."""

    strategy: str
    formula: str
    seed: int
    dtype: str
    calibration: TextDescription


class PlannedEntry(_Part):
    """`sharer` reads the KV of `owner`; entries are in nested order."""

    sharer: Count
    owner: Count
    score: Finite


class MeasuredDepth(_Part):
    """Quality of one depth; the fields are those of DepthQuality."""

    shared_layers: Count
    kv_bytes_per_token: Count
    perplexity: Finite
    kl: Finite
    quality_cost: Finite


class Measurement(_Part):
    """Quality by depth, on text that the search did not see. The first `prefix` tokens of a sequence are not scored."""

    text: TextDescription
    prefix: Count
    dtype: str
    perplexity_exact: Finite
    depths: tuple[MeasuredDepth, ...]


class PlanFile(_Part):
    """A plan file of version 1."""

    format: Literal["kvfold-sharing-plan"] = "kvfold-sharing-plan"
    version: Literal[1] = 1
    model: PlannedModel
    search: Search
    entries: tuple[PlannedEntry, ...]
    measurement: Measurement

    @model_validator(mode="after")
    def _is_a_plan(self) -> PlanFile:
        plan = self.plan
        for measured in self.measurement.depths:
            if measured.shared_layers > plan.max_depth:
                raise ValueError(f"depth {measured.shared_layers} is measured, but the plan ends at {plan.max_depth}")
        return self

    @cached_property
    def plan(self) -> SharingPlan:
        """The entries as the scheduler knows them."""
        entries = tuple(SharingEntry(entry.sharer, entry.owner) for entry in self.entries)
        return SharingPlan(self.model.layer_count, entries)

    @property
    def depth_quality(self) -> tuple[DepthQuality, ...]:
        """The measured depths, ascending."""
        depths = sorted(self.measurement.depths, key=lambda measured: measured.shared_layers)
        return tuple(DepthQuality(**measured.model_dump()) for measured in depths)

    def check_model(self, fingerprint: ModelFingerprint, geometry: CacheGeometry) -> None:
        """Raises PlanMismatchError if the plan was made for another model, or joins layers that cannot share in this
        one."""
        compared = (
            ("the architecture", self.model.model_type, fingerprint.model_type),
            ("the number of layers", self.model.layer_count, fingerprint.layer_count),
            ("the configuration", self.model.config_hash[:12], fingerprint.config_hash[:12]),
            ("the weights", self.model.weights_hash[:12], fingerprint.weights_hash[:12]),
        )
        differences = [
            f"{what} ({mine} in the plan, {theirs} here)" for what, mine, theirs in compared if mine != theirs
        ]
        if differences:
            raise PlanMismatchError(f"the plan was made for {self.model.name}, another model: {', '.join(differences)}")
        try:
            self.plan.check_kinds(geometry)
        except InvalidPlanError as error:
            raise PlanMismatchError(f"the plan does not fit the model: {error}") from error

    def to_json(self) -> str:
        """The file's text; one entry and one measured depth a line, so that versions of a plan compare well."""
        text = json.dumps(self.model_dump(), indent=2)
        return _TABLE_ROW.sub(lambda row: " ".join(row[0].split()), text) + "\n"


def read_plan(file: Path | Traversable) -> PlanFile:
    """Reads and checks a plan file. Raises PlanFileError."""
    try:
        return PlanFile.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanFileError(f"cannot read the plan {file}: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'plan'}: {one['msg']}" for one in error.errors()[:3])
        raise PlanFileError(f"{file} is not a valid plan: {problems}") from error


def load_plan(file: Path, fingerprint: ModelFingerprint, geometry: CacheGeometry) -> PlanFile:
    """Reads a plan file for a model. Raises PlanFileError, or PlanMismatchError if it is for another model."""
    plan = read_plan(file)
    plan.check_model(fingerprint, geometry)
    return plan


def find_shipped_plan(fingerprint: ModelFingerprint) -> PlanFile | None:
    """The plan that comes with kvfold for a model, if there is one."""
    for file in (resources.files(__package__) / "plans").iterdir():
        if file.name.endswith(".json"):
            plan = read_plan(file)
            if (plan.model.config_hash, plan.model.weights_hash) == (fingerprint.config_hash, fingerprint.weights_hash):
                return plan
    return None
