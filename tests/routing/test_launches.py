"""How many operations a routed step dispatches beside torch's own: few a
layer, and none where small layers of one shape are edited in one product.
"""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dmr

torch.set_num_threads(1)
#: Operations that compute nothing: views, and numbers read by the host.
FREE = ("view", "transpose", "t.", "detach", "unbind", "alias", "_local_scalar")


class Counted(TorchDispatchMode):
    "Counts what is dispatched, views left out."

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.startswith(FREE):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def dispatched(layers, size, routing):
    "Operations of one AdamW step, after a first one that makes the state."
    torch.manual_seed(0)
    net = nn.Sequential(
        *[nn.Linear(size, size, bias=False) for _ in range(layers)]
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, foreach=True)
    if routing is not None:
        bases = {
            name: torch.linalg.qr(torch.randn(size, 4)).Q
            for name, _ in net.named_parameters()
        }
        method = dmr.Projection(bases=bases)
        dmr.MomentRouter(net, optimizer, method, routing, 0.9)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    with Counted() as counted:
        optimizer.step()
    return counted.seen.total()


def added(layers, size, routing):
    "Beside the plain optimizer's own."
    return dispatched(layers, size, routing) - dispatched(layers, size, None)


def test_the_plain_step_does_not_depend_on_the_number_of_layers():
    assert dispatched(4, 32, None) == dispatched(16, 32, None) > 0


def test_small_layers_of_one_shape_are_decoupled_at_one_price():
    assert added(4, 32, "decoupled") == added(16, 32, "decoupled") > 0


#: Most operations that one more layer may add.
A_LAYER = {"shared": 4, "decoupled": 2, "displacement": 7}


@pytest.mark.parametrize("routing", A_LAYER)
@pytest.mark.parametrize("size", [32, 128])
def test_a_layer_more_adds_a_few(routing, size):
    more = added(16, size, routing) - added(4, size, routing)
    assert 0 <= more <= 12 * A_LAYER[routing]
