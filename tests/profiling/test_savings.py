"""The authors' way beside ours: the way between them starts and ends at what each is."""

import numpy as np
import pytest

from lavin_ds.profiling.published.model import SAVINGS
from lavin_ds.profiling.published.savings import as_published
from lavin_ds.profiling.simulation import simulate
from lavin_ds.profiling.training_set import TrainingSet
from lavin_ds.profiling.workload import worst_case


@pytest.mark.slow
def test_savings_lead_from_the_authors_step_to_ours(tiny):
    llm = tiny.model.llm.model_copy(update={"n_layers": 4})
    config = tiny.model_copy(
        update={
            "model": tiny.model.model_copy(update={"llm": llm, "vision": None, "frozen_dtype": "fp16"}),
            "data": tiny.data.model_copy(update={"max_length": 96}),
            "training": tiny.training.model_copy(update={"packing": False}),
            "deepspeed": "zero0",
        }
    )
    account = as_published(config, TrainingSet(np.full(10, 60), 0.5, 0.7, "10 samples"))
    stages = account.stages
    assert len(stages) == 1 + len(SAVINGS) + 1
    assert stages[0].full_bytes == account.simulation.peak_bytes  # extrapolated from few layers and simulated whole
    accumulated = simulate(config, worst_case(config)).peak_bytes
    assert stages[-1].full_bytes == pytest.approx(accumulated, rel=1e-6)
    assert stages[-1].average_bytes < stages[0].average_bytes == pytest.approx(stages[0].full_bytes, rel=0.1)
    assert stages[-1].average_flops < stages[0].average_flops
