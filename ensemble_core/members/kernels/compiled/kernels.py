"""Every operation as compiled loops."""

from __future__ import annotations

from ensemble_core.members.kernels.compiled import attention, layers, logits


class CompiledKernels:
    """See `base.Kernels`."""

    attend_spans = staticmethod(attention.attend_spans)
    add_and_norm = staticmethod(layers.add_and_norm)
    gate = staticmethod(layers.gate)
    turn = staticmethod(layers.turn)
    survey = staticmethod(logits.survey)
