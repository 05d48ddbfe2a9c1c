"""Changes of single logits: minimum length, bias and penalties. They touch the tokens concerned and nothing else.

In vLLM's order: the mask of `min_tokens`, then the bias, then the repetition, frequency and presence penalties.
"""

from __future__ import annotations

import numpy as np
import torch

from .state import SamplingState


def apply_edits(logits: torch.Tensor, states: list[SamplingState]) -> None:
    """Edits `logits` in place, as each row's state asks."""
    # logits: [R, local_vocab] float32; states: R
    _add(logits, states)
    _penalize(logits, states)


def _add(logits: torch.Tensor, states: list[SamplingState]) -> None:
    # logits: [R, local_vocab]
    rows, columns, values = [], [], []
    for row, state in enumerate(states):
        if len(state.bias_columns):
            rows.append(np.full(len(state.bias_columns), row))
            columns.append(state.bias_columns)
            values.append(state.bias_values)
        if state.num_output_tokens < state.min_tokens and len(state.stop_columns):
            rows.append(np.full(len(state.stop_columns), row))
            columns.append(state.stop_columns)
            # Added rather than assigned, so that a NaN stays one and is reported.
            values.append(np.full(len(state.stop_columns), -np.inf, dtype=np.float32))
    if rows:
        device = logits.device
        index = (torch.from_numpy(np.concatenate(rows)).to(device),
                 torch.from_numpy(np.concatenate(columns)).to(device))
        logits.index_put_(index, torch.from_numpy(np.concatenate(values)).to(device), accumulate=True)


def _penalize(logits: torch.Tensor, states: list[SamplingState]) -> None:
    # logits: [R, local_vocab]
    tallies = [(row, state, state.counts) for row, state in enumerate(states) if state.counts is not None]
    tallies = [tally for tally in tallies if len(tally[2].columns)]
    if not tallies:
        return
    lengths = np.array([len(counts.columns) for _, _, counts in tallies])
    per_row = np.array([(s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for _, s, _ in tallies],
                       dtype=np.float32)
    # [num_edits] each
    device = logits.device
    index = (torch.from_numpy(np.repeat(np.array([row for row, _, _ in tallies]), lengths)).to(device),
             torch.from_numpy(np.concatenate([c.columns for _, _, c in tallies])).to(device))
    counts = torch.from_numpy(np.concatenate([c.counts for _, _, c in tallies])).to(device)
    repetition, frequency, presence = torch.from_numpy(np.repeat(per_row, lengths, axis=0)).to(device).unbind(1)
    values = logits[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * counts
    values -= presence * (counts > 0)
    logits[index] = values
