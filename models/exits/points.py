"""Calibrated operating points, as plain data: what exits and decisions promise at which thresholds.

Without torch, because the server's HTTP process reads them and does without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, TypeVar

from offramp.models.files import is_number
from offramp.models.sampling_params import ExitCriterion, KVFill

_POINT_NUMBERS = (
    *("quality", "confidence", "agreement", "layers_skipped", "mean_depth"),
    *("prompts", "tokens"),
)


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """One calibrated setting of the exits.

    With ``confidence``, at least ``quality`` of all emitted tokens are the full-depth model's
    choice in their context (agreement), on prompts like those of the calibration. ``thresholds``
    are scores of ``criterion`` at each exit point. ``agreement``, ``layers_skipped`` (share) and
    ``mean_depth`` (layers) were measured on ``tokens`` tokens of ``prompts`` free-running answers.
    ``prefill_threshold`` is the gate score at which prompt tokens may leave as well, None where
    that was not calibrated.
    """

    quality: float
    confidence: float
    criterion: ExitCriterion
    kv_fill: KVFill
    thresholds: tuple[float, ...]
    agreement: float
    layers_skipped: float
    mean_depth: float
    prompts: int
    tokens: int
    prefill_threshold: float | None = None

    def contradicts(self, looser: OperatingPoint) -> bool:
        """Whether this one, of higher quality, lets tokens go that ``looser`` keeps."""
        same = (self.criterion, self.kv_fill) == (looser.criterion, looser.kv_fill)
        both = zip(looser.thresholds, self.thresholds, strict=True)
        return same and any(loose > strict for loose, strict in both)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the exit file's metadata."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> OperatingPoint:
        """Back from `to_json`; raises ValueError for missing, unknown or impossible values."""
        known = {field.name for field in fields(cls)}
        if set(row) != known:
            raise ValueError(f"an operating point has {sorted(set(row) ^ known)} wrong")
        scores = row["thresholds"]
        prompt = row["prefill_threshold"]
        numbers = [row[name] for name in _POINT_NUMBERS] + ([] if prompt is None else [prompt])
        if not isinstance(scores, list | tuple) or not all(map(is_number, [*scores, *numbers])):
            raise ValueError("it has values that are not numbers")
        point = cls(
            **{
                **row,
                "criterion": ExitCriterion(row["criterion"]),
                "kv_fill": KVFill(row["kv_fill"]),
                "thresholds": tuple(float(value) for value in row["thresholds"]),
            }
        )
        if not 0 < point.quality <= 1 or not 0 < point.confidence < 1:
            raise ValueError("quality and confidence of an operating point lie between 0 and 1")
        return point


@dataclass(frozen=True, slots=True)
class CoarsePoint:
    """What inputs of 8 bits in all layers keep (kernels/native/matmul_integer.h).

    With ``confidence``, at least ``quality`` of all emitted tokens are in their context the choice
    of full depth with 16 bits, on prompts like those of the calibration. ``agreement`` was measured
    on ``tokens`` tokens of ``prompts`` free-running answers.
    """

    quality: float
    confidence: float
    agreement: float
    prompts: int
    tokens: int

    @classmethod
    def from_json(cls, row: object) -> CoarsePoint:
        """Back from ``asdict``; raises ValueError for missing, unknown or impossible values."""
        known = {field.name for field in fields(cls)}
        if not isinstance(row, dict) or set(row) != known:
            raise ValueError(f"coarse inputs are no object of {', '.join(sorted(known))}")
        if not all(map(is_number, row.values())):
            raise ValueError("coarse inputs have values that are not numbers")
        if not 0 < row["quality"] <= 1 or not 0 < row["confidence"] < 1:
            raise ValueError("quality and confidence of coarse inputs lie between 0 and 1")
        return cls(**row)


@dataclass(frozen=True, slots=True)
class DecisionPoint:
    """A calibrated operating point: the probability at which an answer leaves at each layer.

    With labels ``quality`` 0.98 promises, with 95 % confidence, an accuracy at most 0.02 below full
    depth's; without, that 0.98 of the answers are full depth's (Learn then Test, arXiv 2110.01052).
    ``agreement`` with full depth and ``mean_layer`` are what held-out inputs showed.
    """

    quality: float
    thresholds: tuple[float, ...]
    agreement: float
    mean_layer: float


class _Promise(Protocol):
    @property
    def quality(self) -> float: ...


_Point = TypeVar("_Point", bound=_Promise)


def points_under(
    points: Sequence[OperatingPoint], criterion: ExitCriterion, fill: KVFill
) -> list[OperatingPoint]:
    """Those of ``criterion`` that hold where ``fill`` makes the K,V of skipped layers.

    A point was calibrated with one fill. Where none was with this one, `recompute`, which is exact,
    and `auto`, which chooses between it and `project`, keep what `project` promises.
    """
    own = [point for point in points if point.criterion is criterion]
    found = [point for point in own if point.kv_fill is fill]
    if found or fill is KVFill.COPY:
        return found
    return [point for point in own if point.kv_fill is KVFill.PROJECT]


def point_for(points: Sequence[_Point], quality: float) -> _Point | None:
    """The loosest point that promises at least ``quality``; None if there is none."""
    enough = [point for point in points if point.quality >= quality]
    return min(enough, key=lambda point: point.quality, default=None)
