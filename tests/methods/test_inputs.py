"Layer inputs are caught without touching the model."

import torch
from torch import nn

from dmr.methods.inputs import capture_inputs
from dmr.routing.modification import find_targets

torch.set_num_threads(1)


def test_a_weight_used_twice_collects_from_both_layers():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    model = nn.Sequential(a, nn.Tanh(), b)
    x = torch.randn(10, 4)
    with torch.no_grad(), capture_inputs(model, find_targets(model)) as moments:
        model(x)
    hidden = torch.tanh(a(x)).double()
    torch.testing.assert_close(
        moments["0.weight"].matrix,
        x.double().T @ x.double() + hidden.T @ hidden,
        rtol=1e-5,
        atol=1e-5,
    )
    assert moments["0.weight"].rows == 20
