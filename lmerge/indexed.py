"""Metrics that keep one row for each sample, with its index in the data set.

`sorted_rows` sorts by index and drops repeats, so a distributed sampler that pads with repeats
changes nothing, and one process and many give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class IndexedMetric(Metric):
    """Rows of numbers, each with the index of its sample in the data set."""

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, num_columns: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.num_columns = num_columns
        # One flat float64 state: a process without samples gathers an empty vector of this dtype,
        # and a second axis or another dtype there would hang the others.
        self.set_dtype(torch.float64)
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def _apply(self, *args: Any, **kwargs: Any) -> IndexedMetric:
        # Moving a metric to a device resets the dtype to that of a new tensor, float32.
        super()._apply(*args, **kwargs)
        self._dtype = torch.float64
        return self

    def append(self, index_B: Tensor, columns: dict[str, Tensor]) -> None:
        """Keep one row for each sample: its index, then the columns, as float64."""
        for name, value in columns.items():
            if len(value) != len(index_B) or len(value) == 0:
                raise ValueError(
                    f"`{name}` must have one row for each of the {len(index_B)} indices (at least "
                    f"one), got {len(value)}. Pass columns of one batch."
                )
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"`{name}` must be finite, got NaN or infinity. Look for NaN in the weights."
                )
        parts = [x.reshape(len(index_B), -1) for x in (index_B, *columns.values())]
        row_BX = torch.cat([x.detach().to(self.device, torch.float64) for x in parts], dim=1)
        self.rows.append(row_BX.flatten())

    def last_rows(self) -> list[list[float]]:
        """Return the rows that were appended last, exactly."""
        rows: list[list[float]] = self.rows[-1].reshape(-1, self.num_columns).tolist()
        return rows

    def restore(self, rows: Sequence[Sequence[float]]) -> None:
        """Add rows that `last_rows` gave, perhaps in another process."""
        index_B, *columns = torch.tensor(rows, dtype=torch.float64).unbind(dim=1)
        self.restore_columns(index_B, *columns)

    def restore_columns(self, index_B: Tensor, *columns: Tensor) -> None:
        """Call `update` with the columns that it appended."""
        raise NotImplementedError

    def sorted_rows(self) -> Tensor:
        """Return all rows in index order without repeats (float64, CPU)."""
        if len(self.rows) == 0:
            raise ValueError("A metric needs at least one sample, got none. Call `update` first.")
        row_NX = dim_zero_cat(self.rows).cpu().reshape(-1, self.num_columns)
        row_NX = row_NX[row_NX[:, 0].argsort(stable=True)]
        first_N = torch.ones(len(row_NX), dtype=torch.bool)
        first_N[1:] = row_NX[1:, 0] != row_NX[:-1, 0]
        return row_NX[first_N]
