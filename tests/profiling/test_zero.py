"""ZeRO in the simulation: what it divides, what ZeRO-3 gathers, and a real engine's peak."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch.nn.functional as F
from memory_use import measure_allocated

from lavin_ds.config import load_recipe
from lavin_ds.profiling.measure import in_fresh_processes
from lavin_ds.profiling.simulation import simulate
from lavin_ds.profiling.workload import Workload
from lavin_ds.profiling.zero import ZeroPlan, linear_layers_of

WORKLOAD = Workload(samples=3, length=96, image_fraction=2 / 3, labelled_fraction=0.5)
NOTHING_AHEAD = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}


def test_zero3_gathers_what_is_in_use_and_no_more(tiny, tmp_path):
    def gathered(**settings) -> int:
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000} | settings
        (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
        simulation = simulate(tiny.model_copy(update={"deepspeed": str(tmp_path / "zero3.json")}), WORKLOAD, 2)
        assert simulation.components["frozen"] == pytest.approx(weights / 2, rel=0.01)
        return max(held["gathered"] for held in simulation.phases.values())

    weights = simulate(tiny, WORKLOAD).components["frozen"]
    assert gathered(**NOTHING_AHEAD) < weights / 3
    assert gathered(**NOTHING_AHEAD | {"stage3_max_reuse_distance": weights // 16}) < 0.7 * weights
    assert weights < gathered() < 2.2 * weights  # everything at once, and for a while the buffer that it came in


@pytest.mark.parametrize(
    "rules",
    [NOTHING_AHEAD, {"stage3_prefetch_bucket_size": 50_000, "stage3_max_reuse_distance": 50_000}, {}],
    ids=["none", "some", "all"],
)
def test_zero3s_peak_on_two_ranks_is_never_above_the_simulated_one_nor_far_below(rules, tmp_path):
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100_000} | rules
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    small = ["model.llm.n_layers=2", "model.vision.layers=2", "model.vision.readout.every=1"]
    batch = ["training.micro_batch=4", "training.global_batch=8"]
    config = load_recipe("tiny", [*small, *batch, f"deepspeed={tmp_path / 'zero3.json'}"])
    # Ranks are forks, and this process cannot fork once it has simulated.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as new_process:
        allocate = partial(measure_allocated, config, WORKLOAD)
        real = new_process.submit(in_fresh_processes, 2, 1, allocate).result(timeout=300)
    simulated = simulate(config, WORKLOAD, 2).peak_bytes
    assert real <= simulated <= 1.1 * real, f"simulated {simulated / real:.3f} of the real peak"


def test_a_failing_step_leaves_torchs_linear_layers_as_they_were():
    plain = F.linear
    with pytest.raises(RuntimeError, match="a step failed"), linear_layers_of(ZeroPlan(stage=3, ranks=2)):
        assert F.linear is not plain
        raise RuntimeError("a step failed")
    assert F.linear is plain
