"""Where packed weights arrive without a GPU: nowhere else."""

import torch

from klquant.pipeline.landing import Landing, room


def test_without_a_gpu_tensors_stay_where_they_are():
    x = torch.arange(5)
    with Landing(64, [torch.device("cpu")]) as landing:
        landing.turn()
        assert landing.bring(x) is x
        landing.settle()


def test_tensors_lie_on_whole_lines():
    assert room([1, 64, 65]) == 64 + 64 + 128 and room([]) == 0
