"""What differs between source and target, prompt by prompt and module by module.

``measure`` (:func:`measure_shifts`: all measures of the contract, streamed; :func:`summarize_shifts`: their means),
``collector`` (tensors become values), ``recorder`` (both models read a batch once, in ``turns``), ``heads`` (head
writes without d_model vectors), ``vectors`` (directions of shifts), ``frames`` (tidy frames), ``decoding`` (the seed
paper's LAE).
"""

from mechtransplant.shifts.decoding import Alignment, decoding_shifts
from mechtransplant.shifts.frames import MEASURES
from mechtransplant.shifts.measure import average_by_template, measure_shifts, shifts_and_vectors, summarize_shifts
from mechtransplant.shifts.vectors import ShiftVectors, shift_vectors

__all__ = [
    "MEASURES",
    "Alignment",
    "ShiftVectors",
    "average_by_template",
    "decoding_shifts",
    "measure_shifts",
    "shift_vectors",
    "shifts_and_vectors",
    "summarize_shifts",
]
